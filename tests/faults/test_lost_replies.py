"""The server did it and the client does not know: replies of COMMIT, XADD, XREADGROUP and XACK that are lost."""

from __future__ import annotations

import pytest

from tests.faults.checker import EFFECTS
from tests.faults.network import SHORT_LEASE, TWO
from tests.faults.proxy import PostgresProxy
from tests.harness import wait_until
from wfm.config import load
from wfm.model import Role
from wfm.service import open_store


def run_through(net, packages, enough):
    """Until enough was lost: how much a role commits at once depends on what it finds, and so on the machine."""
    net.world.environ |= SHORT_LEASE  # one whose commit nobody knows of must run out
    net.world.pipeline("p", TWO)
    with net.roles():
        for first in range(0, 10 * packages, packages):
            net.world.register(*(net.world.package(f"a{first + i}") for i in range(packages)))
            wait_until(lambda first=first: net.world.all_covered(first + packages + 1), what="all covered")
            if enough():
                break
        net.world.check(repeats=EFFECTS)
    assert enough()


@pytest.mark.parametrize("first", [0, 1])
def test_every_other_commit_of_every_role_loses_its_reply(net, first):
    """The two together meet the first, the second, … and the n-th commit of each role."""
    rules = {r: net.postgres[r].lose_replies("COMMIT", skip=first, every=2) for r in Role}
    run_through(net, 1, lambda: all(r.hits >= 2 for r in rules.values()))


def test_commits_and_their_replies_are_lost_at_random(net, chance):
    replies = [p.lose_replies("COMMIT", p=0.2, seed=chance.random()) for p in net.postgres.all()]
    requests = [p.lose_requests("COMMIT", p=0.1, seed=chance.random()) for p in net.postgres.all()]
    run_through(net, 3, lambda: all(sum(r.hits for r in lost) >= 3 for lost in (replies, requests)))


def test_registrations_of_clients_lose_their_replies(net, chance):
    """What the client does not know, it asks again; what it was promised, is so."""
    world = net.world
    world.pipeline("p", TWO)
    with PostgresProxy(world.settings.database_url) as proxy, net.roles():
        direct, world.store = world.store, open_store(load({**world.environ, "WFM_DATABASE_URL": proxy.url}))
        try:
            replies = proxy.lose_replies("COMMIT", p=0.5, seed=chance.random())
            requests = proxy.lose_requests("COMMIT", p=0.2, seed=chance.random())
            for i in range(8):
                world.register(world.package(f"a{i}"))
            assert replies.hits + requests.hits == sum(c.outcome == "unknown" for c in world.history.calls)
        finally:
            world.store.close()
            world.store = direct
        world.register(*(world.package(f"a{i}") for i in range(8)))
        wait_until(lambda: world.all_covered(9), what="all covered")
        assert world.check().unknown >= 1


def test_every_other_reply_of_redis_is_lost(net):
    """They go in one pipeline: when the reply to one is lost, so are those to all that follow."""
    world = net.world
    proxies = net.redis.all()
    world.pipeline("p", TWO)
    with net.roles():
        for n, command in enumerate(("XADD", "XREADGROUP", "XACK"), start=1):
            rules = [p.lose_replies(command, every=2) for p in proxies]
            world.register(world.package(f"a{n}"), world.package(f"b{n}"))
            wait_until(lambda n=n: world.all_covered(2 * n + 1), what=f"{command}: all covered")
            assert sum(r.hits for r in rules) >= 3
            for p in proxies:
                p.heal()
        world.check()
