"""Every role is killed at every point it comes by; others, and the same role started again, put all right.

The points are gone through in a few worlds side by side, since most of the time is spent waiting for leases to run out;
each point is a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.faults.bench import Bench, bench
from tests.faults.checker import EFFECTS
from tests.faults.history import Call
from tests.faults.points import POINTS
from tests.harness import wait_until
from wfm.model import Role
from wfm.roles import streams_of
from wfm.service import open_bus

Case = tuple[Role, str]
CASES: list[Case] = [(role, name) for name, point in POINTS.items() for role in point.roles]
LANES = 4

STEP = {"name": "one", "group_by": ["executed_obs_unit"], "retention_days": 0}


@pytest.fixture(scope="module")
def outcomes(request, servers, migrated, tmp_path_factory) -> Iterator[dict[Case, Future[None]]]:
    """What became of the cases that were asked for."""
    cases = [i.callspec.params["case"] for i in request.session.items if i.module is request.module]
    futures: dict[Case, Future[None]] = {case: Future() for case in cases}
    stop = False

    def go(mine: Sequence[Case]) -> None:
        """Through some cases in one world, and in a new one after each that failed."""
        with ExitStack() as stack:
            here: Bench | None = None
            for case in mine:
                if stop:
                    return
                try:
                    if here is None:
                        here = stack.enter_context(bench(servers, migrated, tmp_path_factory.mktemp("crash")))
                        here.world.pipeline(
                            "p", [{"name": "one", "group_by": ["executed_obs_unit"], "retention_days": 0}]
                        )
                        here.start()
                    crash(here, *case)
                    futures[case].set_result(None)
                except BaseException as e:
                    futures[case].set_exception(e)
                    here = None
                    stack.close()

    with ThreadPoolExecutor(LANES) as pool:
        for lane in range(LANES):
            pool.submit(go, cases[lane::LANES])
        yield futures
        stop = True


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_killed(outcomes, case):
    outcomes[case].result()


def crash(bench: Bench, role: Role, name: str) -> None:
    """Have something to do, kill the role at the point, start it again, and see that all is well."""
    world = bench.world
    n = len(world.history.calls)
    arguments = ["--kill", name]
    if name.endswith("purge"):  # an older result is purged when a worker starts
        world.register(world.package(f"a{n}"))
        wait_until(lambda: world.query("SELECT 1 FROM run WHERE state = 'COMPLETED'"))
        world.check(repeats=EFFECTS, dead_letters=dead_letters(bench))
        world.register(world.package(f"a{n}", "changed\n"))
        world.check(repeats=EFFECTS, dead_letters=dead_letters(bench))
    if name == "after-relay":  # a message waits for somebody who is not there, and nobody else may relay it
        bench.stop(*set(Role) - {Role.TRIGGER_MANAGER})
    else:
        bench.stop(role)
    world.register(world.package(f"b{n}"), world.package(f"c{n}"))
    if name == "after-relay":
        wait_until(lambda: world.states()["one", "PENDING"] == 2)
        bench.stop()
    if "dead-letter" in name:
        bus = open_bus(world.settings)
        key = bus.prefix + streams_of(role, world.store.charts[1])[0]
        world.history.call([Call("garbage", key)], lambda: bus.client.xadd(key, {"event": b"garbage"}))
        bus.client.close()
    if name.endswith("cancel"):
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 2)
        world.cancel(max(r.id for r in world.runs()))
    if name.endswith("renewal"):  # something must be in hand
        arguments += ["--hold", "after-stage" if role is Role.WORKER else "before-poll"]
    victim = bench.victim(role, *arguments)
    assert victim.wait() == -9, f"{role} never came by {name}, but ended by itself:\n{victim.tail()}"
    bench.start(*Role if name == "after-relay" else [role])
    report = world.check(repeats=EFFECTS, dead_letters=dead_letters(bench))
    assert report.completed >= 1


def dead_letters(bench: Bench) -> int:
    """Garbage that was sent so far."""
    return sum(c.operation == "garbage" for c in bench.world.history.calls)
