"""Fifty workers on one run at once: exactly one is heard, and the history has no gap."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.faults.checker import examine
from tests.harness import ACTOR, World, wait_until
from wfm.errors import RefusedError
from wfm.model import Role
from wfm.service import open_store
from wfm.store import Move, Store, TaskEnd
from wfm.tasks import Outcome, TaskRunner
from wfm.views import verify

CROWD = 50


@pytest.fixture
def stores(world: World) -> Iterator[list[Store]]:
    """As many connections as there are workers."""
    made = [open_store(world.settings) for _ in range(CROWD // 10)]
    yield made
    for store in made:
        store.close()


@pytest.fixture
def built(world: World) -> World:
    """A run whose stage task is ready, and nobody at work."""
    world.pipeline("p", [{"name": "one"}])
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 1)
    return world


def at_once(stores: list[Store], work: Callable[[Store, int], Any]) -> list[Any]:
    """Do it in fifty threads that begin together; what each returned or raised."""
    gate = threading.Barrier(CROWD)

    def one(n: int) -> Any:
        gate.wait()
        try:
            return work(stores[n % len(stores)], n)
        except RefusedError as e:
            return e

    with ThreadPoolExecutor(CROWD) as pool:
        return list(pool.map(one, range(CROWD)))


def test_one_of_fifty_leases_a_task(built, stores):
    def lease(store: Store, n: int) -> list[Any]:
        with store.begin() as tx:
            return tx.claim_tasks(1, {"stage": 4}, f"worker-{n}", 30.0)

    got = [tasks for tasks in at_once(stores, lease) if tasks]
    assert len(got) == 1
    (task,) = built.query("SELECT state, epoch FROM task WHERE kind = 'stage'")
    assert (task.state, task.epoch) == ("leased", 1)
    assert got[0][0].epoch == 1


def test_of_fifty_holders_in_turn_only_the_last_is_heard(built, stores):
    """Each took over from one whose lease had run out; now all come back with their outcome."""
    holders = []
    for n in range(CROWD):
        with built.store.begin() as tx:
            holders += tx.claim_tasks(1, {"stage": 1}, f"worker-{n}", 0.0)
    assert [t.epoch for t in holders] == list(range(1, CROWD + 1))

    def end(store: Store, n: int) -> set[int]:
        with store.begin() as tx:
            return tx.end_tasks([TaskEnd(holders[n], "done")])

    heard = [n for n, counted in enumerate(at_once(stores, end)) if counted]
    assert heard == [CROWD - 1]


def test_of_fifty_outcomes_of_one_lease_one_is_written(built, stores):
    """Fifty deliveries of the same outcome: one opens the next task, none opens a second."""
    with built.store.begin() as tx:
        (task,) = tx.claim_tasks(1, {"stage": 1}, "worker", 30.0)
    runners = [
        TaskRunner(
            store,
            _stage_alone(built),
            owner="worker",
            location_id=1,
            lease_seconds=3600.0,
            max_tries=5,
            deliver=lambda _: None,
        )
        for store in stores
    ]
    try:

        def settle(store: Store, n: int) -> None:
            store.retrying(lambda tx: runners[n % len(stores)].settle(tx, [Outcome(task)])())

        at_once(stores, settle)
    finally:
        for runner in runners:
            runner.stop()
            runner.close()
    tasks = built.query("SELECT kind, state, epoch FROM task WHERE run_id IS NOT NULL ORDER BY id")
    assert [(t.kind, t.state, t.epoch) for t in tasks] == [("stage", "done", 1), ("submit", "ready", 0)]


def _stage_alone(world: World) -> list[Any]:
    from wfm.backends import open_backend
    from wfm.kinds import Stage

    return [Stage(world.settings, open_backend(world.settings), 1)]


def test_of_fifty_who_move_a_run_from_what_they_saw_one_succeeds(built, stores):
    """None of them locks: what each saw is the same version, and the write is guarded by it."""
    (seen,) = built.store.retrying(lambda tx: list(tx.find_runs("true").values()))[0]

    def move(store: Store, n: int) -> Any:
        with store.begin() as tx:
            return tx.move([Move(seen, "cancel", ACTOR)])

    results = at_once(stores, move)
    assert sum(isinstance(r, RefusedError) for r in results) == CROWD - 1
    _sound(built, "CANCELLING")


def test_of_fifty_who_lock_and_move_a_run_one_succeeds_and_the_others_are_refused(built, stores):
    (run,) = built.runs()

    def move(store: Store, n: int) -> Any:
        trigger = ("cancel", "submit")[n % 2]

        def work(tx: Any) -> Any:
            runs = tx.lock_runs([run.id])
            return tx.move([Move(r, trigger, ACTOR) for r in runs.values()])

        return trigger, *store.retrying(work)[0]

    moved = [trigger for trigger, moved, _ in at_once(stores, move) if moved]
    history = [t.trigger for t in built.query("SELECT trigger FROM transition WHERE version > 2 ORDER BY version")]
    assert sorted(history) == sorted(moved)
    assert moved.count("cancel") == 1  # from STAGING_DATA, or from SUBMITTED if that came first
    assert moved.count("submit") <= 1
    _sound(built, "CANCELLING")


def _sound(world: World, state: str) -> None:
    assert [r.state for r in world.runs()] == [state]
    with world.store.begin() as tx:
        assert not verify(tx.conn, tx.charts).faults
    events = world.query("SELECT type FROM event WHERE type = 'run.cancelling'")
    assert len(events) == 1
    tasks = world.query("SELECT kind FROM task WHERE state = 'ready' AND run_id IS NOT NULL")
    assert [t.kind for t in tasks] == ["cancel"]


def test_fifty_trigger_managers_make_one_run_of_a_gap(world, stores):
    """Copies of the role decide on the same unit at once."""
    from wfm import gaps

    world.pipeline("p", [{"name": "one"}])
    world.register(world.package("a"))

    def decide(store: Store, n: int) -> None:
        def work(tx: Any) -> None:
            gaps.evaluate(tx, gaps.fold(tx, 1, [1]), ACTOR)

        store.retrying(work)

    at_once(stores, decide)
    assert [r.state for r in world.runs()] == ["PENDING"]
    assert not [v for v in examine(world).violations if v.startswith("history")]
