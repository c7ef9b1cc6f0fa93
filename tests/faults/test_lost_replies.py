"""The server did it and the client does not know: replies of COMMIT, XADD, XREADGROUP and XACK that are lost."""

from __future__ import annotations

import pytest

from tests.faults.network import TWO
from tests.harness import wait_until
from wfm.model import Role

SEED = 11


def run_through(net, packages=4):
    net.world.pipeline("p", TWO)
    net.world.register(*(net.world.package(f"a{i}") for i in range(packages)))
    with net.roles():
        wait_until(lambda: net.world.all_covered(packages + 1), what="all covered")
        net.world.assert_quiet()


@pytest.mark.parametrize("first", [0, 1])
def test_every_other_commit_of_every_role_loses_its_reply(net, first):
    """The two together meet the first, the second, … and the n-th commit of each role."""
    rules = {r: net.postgres[r].lose_replies("COMMIT", skip=first, every=2) for r in Role}
    run_through(net, packages=2)
    assert all(r.hits >= 1 for r in rules.values()), {r: rule.hits for r, rule in rules.items()}


def test_commits_of_all_roles_lose_their_replies_at_random(net):
    rules = [p.lose_replies("COMMIT", p=0.3, seed=SEED + i) for i, p in enumerate(net.postgres.all())]
    run_through(net, packages=3)
    assert sum(r.hits for r in rules) >= 3


def test_commits_of_all_roles_are_lost_at_random(net):
    rules = [p.lose_requests("COMMIT", p=0.2, seed=SEED + i) for i, p in enumerate(net.postgres.all())]
    run_through(net, packages=3)
    assert sum(r.hits for r in rules) >= 3


@pytest.mark.parametrize("command", ["XADD", "XREADGROUP", "XACK"])
def test_every_other_reply_of_redis_is_lost(net, command):
    rules = [p.lose_replies(command, every=2) for p in net.redis.all()]
    run_through(net)
    assert all(r.hits >= 1 for r in rules) or command == "XADD"
