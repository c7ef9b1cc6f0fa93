"""Networks that part a worker from one of its servers, for longer than its lease."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.faults.checker import EFFECTS
from tests.faults.network import ONE, SHORT_LEASE, TWO, at_work
from tests.harness import wait_until
from wfm.model import Role, TaskKind
from wfm.store import connect

OTHERS = [r for r in Role if r is not Role.WORKER]


class Paused:
    """Stops a kind of task in the middle: before its effect, or between the effect and its outcome."""

    def __init__(self, service, kind, *, before):
        self._kind = service.work.runner.kinds[kind]
        self._before = before
        self.reached = threading.Event()
        self.go_on = threading.Event()
        service.work.runner.kinds[kind] = self

    def __getattr__(self, name):
        return getattr(self._kind, name)

    def perform(self, work, alive):
        values = [] if self._before else self._kind.perform(work, alive)
        self.reached.set()
        assert self.go_on.wait(100)
        return self._kind.perform(work, alive) if self._before else values


@pytest.mark.parametrize(
    ("kind", "before", "fault"),
    [
        (TaskKind.STAGE, True, "refuse"),
        (TaskKind.STAGE, False, "stall"),
        (TaskKind.SUBMIT, True, "stall"),
        (TaskKind.SUBMIT, False, "refuse"),
        (TaskKind.COLLECT, False, "stall"),
    ],
)
def test_a_worker_parted_from_postgres_for_longer_than_its_lease_changes_nothing(net, kind, before, fault):
    """Another worker ends what it had begun; then its network is healed and it goes on where it was."""
    world = net.world
    world.environ |= SHORT_LEASE
    world.pipeline("p", ONE)
    network = net.postgres[Role.WORKER]
    parted = net.service(Role.WORKER, slots=1)
    paused = Paused(parted, kind, before=before)
    with net.roles(OTHERS), at_work(parted):
        world.register(world.package("a"))
        assert paused.reached.wait(60)
        getattr(network, fault)()
        with at_work(net.service(Role.WORKER, direct=True)):
            wait_until(lambda: world.all_covered(1), what="another worker did it")
            network.heal()
            paused.go_on.set()
            wait_until(lambda: not parted.work.runner.held, what="the parted worker knows")
        world.register(world.package("b"))
        wait_until(lambda: world.all_covered(2), what="the parted worker works again")
        report = world.check(repeats=EFFECTS)
    assert report.repeated >= 1 or before, "the parted worker did nothing"


@pytest.mark.parametrize("deaf", [[Role.WORKER], list(Role)], ids=["worker", "all"])
def test_without_redis_the_work_goes_on(net, deaf):
    world = net.world
    world.environ |= {"WFM_RECONCILE_SECONDS": "0.5"}  # that is how the trigger-manager finds data without a message
    world.pipeline("p", TWO)
    for role in deaf:
        net.redis[role].refuse()
    with net.roles():
        world.register(*(world.package(f"a{i}") for i in range(3)))
        wait_until(lambda: world.all_covered(4), what="all covered without Redis")
        for role in deaf:
            net.redis[role].heal()
        world.check()


def test_a_black_hole_before_everything_swallows_nothing(net):
    """Postgres and Redis of all roles say nothing for longer than a lease; what was held arrives late, or never."""
    world = net.world
    world.environ |= SHORT_LEASE
    world.config("c", seconds=0.1)
    world.pipeline("p", [{**TWO[0], "config": "c"}, TWO[1]])
    proxies = [*net.postgres.all(), *net.redis.all()]
    with net.roles():
        world.register(*(world.package(f"a{i}") for i in range(4)))
        wait_until(lambda: any(r.state != "PENDING" for r in world.runs()))
        for p in proxies:
            p.stall()
        wait_until(
            lambda: not world.query("SELECT 1 FROM task WHERE state = 'leased' AND lease_until > now()"),
            what="leases ran out",
        )
        for p in proxies:
            p.heal()
        wait_until(lambda: world.all_covered(5), what="all covered")
        world.check(repeats=EFFECTS)


def test_a_slow_network_is_only_slow(net):
    world = net.world
    world.pipeline("p", TWO)
    net.postgres[Role.WORKER].delay(0.005)
    net.redis[Role.WORKER].delay(0.005)
    with net.roles():
        world.register(*(world.package(f"a{i}") for i in range(2)))
        wait_until(lambda: world.all_covered(3), what="all covered")
        world.check()


def test_a_postgres_that_fell_silent_is_given_up(net):
    """A host that is gone sends nothing, not even an end: only the kernel can notice, when it is told to look."""
    engine = connect(net.postgres[Role.WORKER].url, "wfm")
    with engine.connect() as c:
        fileno = c.connection.dbapi_connection.fileno()
        with socket.socket(fileno=os.dup(fileno)) as s:
            assert s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, interval, count = (
                s.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            unheard = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
    engine.dispose()
    assert idle + interval * count <= 60
    assert 0 < unheard <= 60
