"""Each guard where it stands, against a real Postgres and a real Valkey; `tests/faults/mutants.py` takes them away.

Roles are moved by hand here, one step at a time, so that each moment of interest can be held.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest
from sqlalchemy import event as sa_event
from sqlalchemy import text

from tests.harness import ACTOR, World, wait_until
from wfm import acts, gaps
from wfm.backends import runjob
from wfm.backends.local import LocalBackend
from wfm.bus import Entry
from wfm.collect import collect
from wfm.config import load
from wfm.errors import HeldError, InputError, RefusedError, UnavailableError
from wfm.events import JobBuilt, Message
from wfm.kinds import Cancel, Poll, Stage, Submit, _register
from wfm.model import Actor, FailureClass, JobRef, JobSpec, JobStatus, Report, Resources, Role, RunState
from wfm.roles import next_attempt
from wfm.service import Service, build
from wfm.staging import stage
from wfm.store import Move, RunRow, TaskEnd, TaskRow, Tx, failed
from wfm.tasks import Outcome

ONE = [{"name": "one", "group_by": ["executed_obs_unit"], "max_retries": 1}]
TWO = [*ONE, {"name": "two", "depends_on": ["one"], "group_by": []}]


_NEW_RUN = [
    "step_id",
    "unit_id",
    "pipeline_id",
    "location_id",
    "generation",
    "wanted",
    "result",
    "software_version_id",
    "config_revision_id",
    "priority",
    "cpu",
    "memory_gb",
]


class CrashError(BaseException):
    """A role dies here."""


class Hands:
    """Roles that do nothing by themselves."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.closing = ExitStack()

    def role(self, role: Role) -> Service:
        service = build(self.world.settings, role)
        service.bus.join()
        self.closing.callback(self._close, service)
        return service

    def _close(self, service: Service) -> None:
        service.work.stop()
        service.work.close()
        service.store.close()
        service.bus.client.close()

    def do(self, role: Role, sweep: str) -> None:
        """One sweep of a role, in its own transaction."""
        service = build(self.world.settings, role)
        try:
            service.bus.join()
            service._commit(next(s.work for s in service._sweeps if s.name == sweep))
        finally:
            self._close(service)

    def staging(self, steps: Any = ONE) -> RunRow:
        """A run that is to be staged."""
        self.pending(steps)
        self.do(Role.WORKFLOW_MANAGER, "admission")
        return self.run()

    def pending(self, steps: Any = ONE) -> RunRow:
        """A run that waits for a slot."""
        self.world.pipeline("p", steps)
        self.world.register(self.world.package("a"))
        self.do(Role.TRIGGER_MANAGER, "reconcile")
        return self.run()

    def run(self) -> RunRow:
        """The newest run."""
        with self.world.store.begin() as tx:
            return list(tx.find_runs("true").values())[-1]

    def move(self, trigger: str, **sets: Any) -> RunRow:
        """Move the newest run, whatever it takes."""
        with self.world.store.begin() as tx:
            (run,) = tx.lock_runs([self.run().id]).values()
            one = Move(run, trigger, ACTOR, sets=sets)
            if trigger == "fail":
                one = failed(run, FailureClass.EXIT, "it broke", ACTOR, 0.0)
            moved, refused = tx.move([one])
            assert not refused, refused
            return moved[run.id]

    def next_attempt(self) -> RunRow:
        """The newest run fails, and is at the same place again with its next attempt."""
        before = self.run()
        self.move("fail")
        self.move("retry_due", **next_attempt(self.run()))
        self.do(Role.WORKFLOW_MANAGER, "admission")
        if before.state is RunState.SUBMITTED:
            self.move("submit", handle="new")
        after = self.run()
        assert (after.state, after.attempt) == (before.state, before.attempt + 1)
        return after

    def lease(self, *kinds: str, owner: str = "me", seconds: float = 60.0) -> list[TaskRow]:
        with self.world.store.begin() as tx:
            return tx.claim_tasks(1, dict.fromkeys(kinds, 10), owner, seconds)


@pytest.fixture
def hands(world: World) -> Iterator[Hands]:
    hands = Hands(world)
    with hands.closing:
        yield hands


def is_refused(work: Callable[[], Any]) -> bool:
    """Whether the chart or its keeper says no; what the database says is not that."""
    try:
        work()
    except RefusedError:
        return True
    except Exception as error:
        raise AssertionError(f"not refused, but broken: {error}") from error
    return False


@contextmanager
def beside(world: World, work: Callable[[Tx], Any]) -> Iterator[Callable[[], bool]]:
    """`work` in a transaction of its own, at the same time; what is given tells whether it waits for a lock.

    At the end it must have ended, and well.
    """
    ended = threading.Event()
    faults: list[BaseException] = []

    def other() -> None:
        try:
            with world.store.begin() as tx:
                work(tx)
        except BaseException as error:
            faults.append(error)
        finally:
            ended.set()

    def waits() -> bool:
        def seen() -> str:
            locked = world.query(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return "ended" if ended.is_set() else "waits" if locked else ""

        return bool(wait_until(seen, what="the other transaction ends, or waits") == "waits")

    thread = threading.Thread(target=other)
    thread.start()
    try:
        yield waits
    finally:
        thread.join(timeout=60)
    assert not faults, faults


def job_built(event_id: int | None = None) -> Message:
    return Message(
        "job.built", Role.WORKER, json.dumps({"type": "job.built", "run": 1, "version": 1}).encode(), event_id
    )


def stream(service: Service, kind: str) -> int:
    return service.bus.backlog([kind])[kind]


# --- runs ---


def test_a_move_that_was_decided_on_an_old_picture_is_refused(hands):
    old = hands.staging()
    hands.move("submit")

    def decide_late():
        with hands.world.store.begin() as tx:
            tx.move([Move(old, "submit", ACTOR)])

    assert is_refused(decide_late)
    assert hands.run().version == old.version + 1


def test_who_locks_a_run_has_it_alone(hands):
    run = hands.pending()
    with hands.world.store.begin() as tx:
        tx.lock_runs([run.id])
        with beside(hands.world, lambda other: other.lock_runs([run.id], coverage=False)) as waits:
            held = waits()
            tx.conn.commit()
    assert held, "two transactions had the same run at the same time"


def test_a_report_about_an_earlier_attempt_moves_nothing(hands):
    hands.staging()
    was = hands.move("submit", handle="old")
    poll = Poll(hands.world.settings, LocalBackend())
    report = Report(JobStatus.FAILED, exit_code=3)
    now = hands.next_attempt()
    with hands.world.store.begin() as tx:
        task = TaskRow(id=1, kind="poll", run_id=None, attempt=0, epoch=1, tries=0, payload={})
        assert poll.succeeded(tx, {}, [Outcome(task, {now.id: (was, report)})]) == []
        assert poll.succeeded(tx, {}, [Outcome(task, {now.id: (now, report)})]) != []  # the same with the right one


def test_a_task_of_another_attempt_or_state_is_not_wanted(hands):
    run = hands.staging()
    (task,) = hands.lease("stage")
    stage, submit = (k(hands.world.settings, LocalBackend(), *n) for k, n in ((Stage, [1]), (Submit, [])))
    with hands.world.store.begin() as tx:
        assert set(stage.prepare(tx, [task])) == {task.id}
    hands.next_attempt()
    with hands.world.store.begin() as tx:
        assert stage.prepare(tx, [task]) == {}, f"run {run.id} is at another attempt"
    hands.move("submit", handle="h")
    second = TaskRow(id=9, kind="submit", run_id=run.id, attempt=2, epoch=1, tries=0, payload={})
    with hands.world.store.begin() as tx:
        assert submit.prepare(tx, [second]) == {}, f"run {run.id} was submitted already"


def test_one_active_run_for_a_unit_whoever_decides(hands):
    run = hands.pending()
    with hands.world.store.begin() as tx:
        (row,) = tx.all("SELECT * FROM run")
        again = {k: str(v) if k == "result" else v for k, v in row._mapping.items() if k in _NEW_RUN}
        assert tx.create_runs([again], ACTOR) == {}
    assert [r.id for r in hands.world.runs()] == [run.id]


def test_a_pipeline_that_is_being_deleted_gets_no_run(hands):
    hands.world.pipeline("p", ONE)
    hands.world.register(hands.world.package("a"))
    with hands.world.store.begin() as tx:
        pairs = gaps.fold(tx, 1, [r.id for r in tx.all("SELECT id FROM raw_data_package")])
    with hands.world.store.begin() as tx:
        tx.run("UPDATE pipeline SET deleted_at = now()")
        with beside(hands.world, lambda other: gaps.evaluate(other, pairs, ACTOR)) as waits:
            waits()
            tx.conn.commit()
    assert not hands.world.runs(), "a deleted pipeline has a new run"


def test_two_workflow_managers_share_the_slots(hands):
    """Both look because a slot is free, no message waits to be marked by either, and each chooses another run."""
    hands.world.environ["WFM_MAX_IN_FLIGHT"] = "1"
    hands.world.pipeline("p", ONE)
    hands.world.pipeline("urgent", ONE, priority=1)
    hands.world.register(hands.world.package("a"))
    hands.do(Role.TRIGGER_MANAGER, "reconcile")
    for name in ("p", "urgent"):
        hands.world.act(lambda tx, name=name: acts.pause(tx, name, None, None, ACTOR))
    hands.do(Role.WORKFLOW_MANAGER, "admission")
    assert not hands.world.query("SELECT 1 FROM event WHERE type = 'gap.detected' AND done_at IS NULL")
    one, two = (hands.role(Role.WORKFLOW_MANAGER).work for _ in range(2))
    hands.world.act(lambda tx: acts.resume(tx, "p", None, None, ACTOR))
    with hands.world.store.begin() as tx:
        one.admit(tx)
        hands.world.act(lambda other: acts.resume(other, "urgent", None, None, ACTOR))
        with beside(hands.world, two.admit) as waits:
            waits()
            tx.conn.commit()
    first, urgent = sorted(hands.world.runs(), key=lambda r: r.priority)
    assert (first.state, urgent.state) == ("STAGING_DATA", "PENDING"), "more runs than slots"
    assert urgent.waiting_for == "a free slot: 1 of 1 runs are in flight"  # it was looked at, after the other's commit


def test_a_run_whose_inputs_changed_before_it_was_built_is_withdrawn(hands):
    run = hands.pending()
    hands.world.register(hands.world.package("a", "changed\n"))
    with hands.world.store.begin() as tx:
        gaps.fold(tx, 1, [r.id for r in tx.all("SELECT id FROM raw_data_package")])
    hands.do(Role.WORKFLOW_MANAGER, "admission")
    assert (hands.run().id, hands.run().state) == (run.id, "CANCELLED")


def test_of_two_results_the_older_one_is_superseded(hands):
    """Not the newer one, although it was there when the older one came."""
    world = hands.world
    world.pipeline("p", ONE)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        world.register(world.package("a", "changed\n"))
        wait_until(lambda: world.states()["one", "COMPLETED"] == 2)
    world.query("UPDATE data_product SET superseded_by = NULL RETURNING 1")
    first, second = world.runs()
    with world.store.begin() as tx:
        tx.run("DELETE FROM physical_copy USING data_product d WHERE d.id = product_id AND d.run_id = :i", i=first.id)
        tx.run("DELETE FROM data_product WHERE run_id = :i", i=first.id)
    with world.store.begin() as tx:
        run = tx.find_runs("r.id = :i", i=first.id)[first.id]
        _register(tx, [(run, collect(run.ref.directory, step="one", final=True))])
    newer = world.query("SELECT superseded_by FROM data_product WHERE run_id = :i", i=second.id)
    assert {p.superseded_by for p in newer} == {None}, "a newer result is superseded by an older one"


# --- tasks ---


def test_only_who_holds_the_lease_is_heard(hands):
    hands.staging()
    (frozen,) = hands.lease("stage", owner="frozen", seconds=-1)
    (other,) = hands.lease("stage", owner="other")
    assert (frozen.id, frozen.epoch + 1) == (other.id, other.epoch)
    with hands.world.store.begin() as tx:
        assert tx.end_tasks([TaskEnd(frozen, "failed", "too late")]) == set()
        assert tx.renew_leases([frozen], 60.0) == set()
        assert tx.renew_leases([other], 60.0) == {other.id}
        assert tx.end_tasks([TaskEnd(other, "done")]) == {other.lease}
        assert tx.end_tasks([TaskEnd(other, "failed", "said twice")]) == set()
        assert tx.renew_leases([other], 60.0) == set()


def test_the_outcome_of_a_lost_lease_moves_nothing(hands):
    hands.staging()
    (frozen,) = hands.lease("stage", owner="frozen", seconds=-1)
    hands.lease("stage", owner="other")
    worker = hands.role(Role.WORKER)
    worker._settle([Outcome(frozen, error=InputError("what it saw then"))])
    assert hands.run().state == "STAGING_DATA", "who lost the lease was heard"


def test_a_worker_that_took_its_own_task_again_is_heard_once(hands):
    """Its lease ran out while it was frozen; thawed, it has both outcomes to write at the same time."""
    hands.staging([{**ONE[0], "max_retries": 0}])
    (old,) = hands.lease("stage", seconds=-1)
    (new,) = hands.lease("stage")
    worker = hands.role(Role.WORKER)
    worker._settle([Outcome(old), Outcome(new, error=HeldError("no space"))])
    opened = hands.world.query("SELECT 1 FROM task WHERE kind = 'submit'")
    assert not opened, "what a lost lease had to say counts, because its successor was heard"


def test_a_lease_that_ran_out_is_taken_over_and_no_other(hands):
    hands.staging()
    (first,) = hands.lease("stage", seconds=60)
    assert hands.lease("stage") == [], "a living lease was taken over"
    hands.world.query("UPDATE task SET lease_until = now() - interval '1 s' WHERE id = :i RETURNING 1", i=first.id)
    taken = hands.lease("stage")
    assert [(t.id, t.tries) for t in taken] == [(first.id, 1)], "a lease that ran out was not taken over"


def test_two_workers_never_lease_the_same_task(hands):
    hands.staging()
    got: list[TaskRow] = []
    with hands.world.store.begin() as tx:
        mine = tx.claim_tasks(1, {"stage": 1}, "one", 60.0)
        with beside(hands.world, lambda other: got.extend(other.claim_tasks(1, {"stage": 1}, "two", 60.0))) as waits:
            held = waits()
            tx.conn.commit()
    assert (held, len(mine), got) == (False, 1, []), "a worker waits for another's task, or takes it too"


def test_a_move_closes_the_tasks_that_the_run_no_longer_waits_for(hands):
    hands.staging()
    (task,) = hands.lease("stage")
    hands.move("cancel")
    with hands.world.store.begin() as tx:
        assert tx.end_tasks([TaskEnd(task, "done")]) == set(), "the outcome of a task that nobody waits for is heard"


def test_a_task_that_is_done_is_not_opened_again(hands):
    run = hands.staging()
    (task,) = hands.lease("stage")
    with hands.world.store.begin() as tx:
        tx.end_tasks([TaskEnd(task, "done")])
        tx.open_tasks({run.id: "stage"}, {run.id: run})
    assert hands.lease("stage") == []


def test_a_stage_that_ends_after_a_cancellation_submits_nothing(hands):
    run = hands.staging()
    (task,) = hands.lease("stage")
    now = hands.move("cancel")
    with hands.world.store.begin() as tx:
        Stage(hands.world.settings, LocalBackend(), 1).succeeded(tx, {run.id: now}, [Outcome(task)])
    assert hands.lease("submit") == [], "a run that is being cancelled would be submitted"


def work_off(hands, kind, broken, *, tries=9):
    """A worker whose tasks of a kind break; until the task has ended."""
    worker = hands.role(Role.WORKER)
    worker.work.runner.kinds[kind].perform = broken
    for _ in range(tries):
        hands.world.query("UPDATE task SET due_at = now() WHERE state = 'ready' RETURNING 1")
        worker._commit(worker.work.claim)
        if not worker.work.busy:
            return
        wait_until(lambda: not worker.inbox.empty(), what="an outcome")
        worker.turn(0.0)


def test_a_task_that_breaks_every_time_is_given_up(hands):
    hands.world.environ["WFM_MAX_TASK_TRIES"] = "3"
    run = hands.staging([{**ONE[0], "max_retries": 0}])

    def broken(work, alive):
        raise UnavailableError("the disk is away")

    work_off(hands, "stage", broken)
    assert (hands.run().state, hands.run().attempt) == ("FAILED", run.attempt), "it is tried for ever"
    assert "the disk is away" in hands.run().message


def test_a_task_whose_workers_die_every_time_is_given_up(hands):
    hands.world.environ["WFM_MAX_TASK_TRIES"] = "2"
    hands.staging([{**ONE[0], "max_retries": 0}])
    for _ in range(3):
        hands.lease("stage", seconds=-1)
    tried = []
    work_off(hands, "stage", lambda work, alive: tried.append(work) or [None], tries=1)
    assert (tried, hands.run().state) == ([], "FAILED")


def test_a_task_that_cannot_be_prepared_harms_no_other(hands):
    hands.world.pipeline("p", ONE)
    hands.world.register(*(hands.world.package(n) for n in "ab"))
    hands.do(Role.TRIGGER_MANAGER, "reconcile")
    hands.do(Role.WORKFLOW_MANAGER, "admission")
    hands.world.register(hands.world.package("a", "changed\n"))
    worker = hands.role(Role.WORKER)
    worker._commit(worker.work.claim)
    wait_until(lambda: hands.world.states()["one", "FAILED"] or worker.turn(0.1), what="the bad one falls out")
    wait_until(
        lambda: hands.world.query("SELECT 1 FROM task WHERE kind = 'stage' AND state = 'done'") or worker.turn(0.1),
        what="the good one is staged",
    )


def test_an_outcome_that_cannot_be_written_harms_no_other(hands):
    hands.world.pipeline("p", ONE)
    hands.world.register(*(hands.world.package(n) for n in "ab"))
    hands.do(Role.TRIGGER_MANAGER, "reconcile")
    hands.do(Role.WORKFLOW_MANAGER, "admission")
    worker = hands.role(Role.WORKER)
    kind = worker.work.runner.kinds["stage"]
    bad = hands.run().id
    whole = kind.succeeded

    def succeeded(tx, runs, outcomes):
        if any(o.task.run_id == bad for o in outcomes):
            tx.run("SELECT 1 / 0")
        return whole(tx, runs, outcomes)

    kind.succeeded = succeeded
    worker._commit(worker.work.claim)
    outcomes = [wait_until(lambda: worker.inbox.get(timeout=30)) for _ in range(2)]
    worker._settle(outcomes)
    done = hands.world.query("SELECT run_id FROM task WHERE kind = 'stage' AND state = 'done'")
    assert bad not in {t.run_id for t in done}
    assert len(done) == 1, "the good outcome was lost with the bad one"


def test_leases_in_hand_are_handed_back_at_the_end(hands, monkeypatch):
    monkeypatch.setattr("wfm.service.GRACE_SECONDS", 0.1)
    hands.staging()
    worker = build(hands.world.settings, Role.WORKER)
    go_on = threading.Event()
    worker.work.runner.kinds["stage"].perform = lambda work, alive: go_on.wait(60) and [None]
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: worker.work.busy)
        worker.stop()
        thread.join(timeout=60)
        states = hands.world.query("SELECT state FROM task WHERE kind = 'stage'")
    finally:
        go_on.set()
    assert [t.state for t in states] == ["ready"], "others must wait until the lease runs out"


# --- jobs ---


@pytest.mark.parametrize("how", ["its replies are lost", "its workers die"])
def test_a_job_that_may_have_been_submitted_is_asked_for_by_name(hands, how):
    """Another attempt must not begin while this one's job may be on its way."""
    hands.world.environ["WFM_MAX_TASK_TRIES"] = "2"
    run = hands.staging()
    hands.lease("stage")
    with hands.world.store.begin() as tx:
        tx.open_tasks({run.id: "submit"}, {run.id: run})
    if how == "its workers die":
        for _ in range(3):
            hands.lease("submit", seconds=-1)

    def broken(work, alive):
        raise UnavailableError("the reply was lost")

    work_off(hands, "submit", broken)
    assert (hands.run().state, hands.run().attempt) == ("SUBMITTED", 1), hands.run().message


def test_a_lost_job_can_not_begin_any_more(hands):
    """It never came to life within the grace period; the next attempt may begin, so this one must not."""
    world = hands.world
    world.environ["WFM_VANISH_GRACE_SECONDS"] = "0.1"
    hands.staging()
    worker = hands.role(Role.WORKER)
    del worker.work.runner.kinds["submit"]
    worker._commit(worker.work.claim)
    wait_until(lambda: world.query("SELECT 1 FROM task WHERE kind = 'submit'") or worker.turn(0.1))
    run = hands.move("submit")
    manager = hands.role(Role.RESULT_MANAGER)
    wait_until(
        lambda: hands.do(Role.RESULT_MANAGER, "look again") or _poll(manager) or hands.run().state == "RETRY_WAIT"
    )
    backend = LocalBackend()
    assert run.job is not None
    backend.submit([run.job])
    report = wait_until(lambda: (r := backend.poll([run.ref])[run.ref.name]).status is not JobStatus.PENDING and r)
    backend.cancel([run.ref])
    backend.close()
    assert report.status is JobStatus.CANCELLED, f"the lost attempt began after all: {report.status}"


def _poll(manager):
    manager._commit(manager.work.claim)
    manager.turn(0.1)


def test_without_the_lease_no_attempt_is_declared_complete(hands):
    """Lost after the last byte was read (here: there was none), it ends without the manifest all the same."""
    hands.staging()
    (task,) = hands.lease("stage")
    kind = Stage(hands.world.settings, LocalBackend(), 1)
    with hands.world.store.begin() as tx:
        plan = msgspec.structs.replace(kind.prepare(tx, [task])[task.id], files=())
    with pytest.raises(UnavailableError):
        stage(plan, kind.policy, alive=lambda: False)
    assert not os.path.exists(f"{plan.spec.directory}/config/manifest.json")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "exit.json"
    runjob.write_json(str(path), {"exit_code": 0})
    with pytest.raises(TypeError):
        runjob.write_json(str(path), {"exit_code": object()})
    assert path.exists(), "the old record is gone, and there is no new one"
    assert json.loads(path.read_text() or '"nothing is left"') == {"exit_code": 0}


def test_a_job_that_does_not_end_yet_is_not_called_cancelled(tmp_path, monkeypatch):
    monkeypatch.setattr("wfm.backends.local.CANCEL_WAIT_SECONDS", 0.0)
    backend = LocalBackend(grace_seconds=0.5)
    directory = tmp_path / "r1-a1"
    (directory / "logs").mkdir(parents=True)
    stubborn = ("sh", "-c", "trap '' TERM; echo here; sleep 600 & wait; sleep 600")
    spec = JobSpec("job-1", str(directory), stubborn, {}, str(directory), Resources())
    backend.submit([spec])
    job = JobRef("job-1", str(directory))
    wait_until(lambda: (directory / "logs/job.log").exists() and (directory / "logs/job.log").read_text())
    cancel = Cancel(load({"WFM_HOME": str(tmp_path)}), backend)
    (first,) = cancel.perform([job], lambda: True)
    assert isinstance(first, HeldError), f"it still runs, and is called {first.status}"
    wait_until(lambda: not isinstance(cancel.perform([job], lambda: True)[0], HeldError), what="the job is ended")
    backend.close()


def test_inputs_are_durable_before_the_manifest_says_so(hands, monkeypatch):
    """A power failure cannot be made here; what was asked of the disk, and when, can be seen."""
    run = hands.staging()
    assert run.job is not None
    asked: list[str] = []
    sync, replace = runjob.sync_directory, os.replace
    monkeypatch.setattr(runjob, "sync_directory", lambda path: asked.append(path) or sync(path))
    monkeypatch.setattr(os, "replace", lambda old, new: replace(old, new) or asked.append(new))
    worker = hands.role(Role.WORKER)
    del worker.work.runner.kinds["submit"]
    worker._commit(worker.work.claim)
    wait_until(lambda: hands.world.query("SELECT 1 FROM task WHERE kind = 'submit'") or worker.turn(0.1))
    last = asked.index(f"{run.job.directory}/config/manifest.json")
    (package,) = hands.world.query("SELECT name FROM raw_data_package")
    placed = f"{run.job.directory}/input/{package.name}"
    assert asked.index(f"{placed}/raw.txt") < last
    kept = asked[asked.index(f"{placed}/raw.txt") + 1 : last]
    assert {f"{placed}/raw.txt", placed} <= set(kept), "the manifest stands there before its inputs are on the disk"


# --- the ledger and the bus ---


def test_a_message_is_kept_until_its_work_is_committed(hands):
    worker = hands.role(Role.WORKER)
    worker.bus.send([job_built()])
    entries = worker.bus.read(10, 0.1)

    def dies(work):
        raise CrashError

    worker.store.retrying = dies
    with pytest.raises(CrashError):
        worker._consume(entries)
    assert worker.bus.read_own_pending(10) == entries, "acknowledged, and the work was not done"


@pytest.fixture
def emitting(hands) -> tuple[Service, Callable[[Tx], None]]:
    """A role, and work that writes one event to the worker."""
    service = hands.role(Role.WORKER)
    service._commit(service._relay_turn)
    return service, lambda tx: tx.emit(1, JobBuilt(run=1, version=1), Role.WORKER, Actor("test"))


def test_nothing_is_published_that_is_not_committed(emitting):
    service, work = emitting

    def dies(conn):
        raise CrashError

    sa_event.listen(service.store.engine, "commit", dies)
    with pytest.raises(CrashError):
        service._commit(work)
    sa_event.remove(service.store.engine, "commit", dies)
    assert stream(service, "job.built") == 0, "published, and not committed"


def test_what_is_committed_is_published_at_once(emitting):
    service, work = emitting
    service._commit(work)
    assert stream(service, "job.built") == 1


def test_what_is_pending_for_too_long_is_published_again(emitting):
    service, work = emitting
    service.store.retrying(work)  # it dies before it publishes
    service._commit(service._relay_turn)
    assert stream(service, "job.built") == 0, "it is not due yet"
    service.store.retrying(lambda tx: tx.run("UPDATE event SET publish_at = now()"))
    service._commit(service._relay_turn)
    assert stream(service, "job.built") == 1, "nobody will ever be told"


def test_two_relays_publish_a_due_event_once(emitting, hands):
    service, work = emitting
    service.store.retrying(work)
    service.store.retrying(lambda tx: tx.run("UPDATE event SET publish_at = now()"))
    mine, others = [], []
    with hands.world.store.begin() as tx:
        tx.due_events(1, {"job.built": 10})
        mine = tx.outbox

        def relay(other):
            other.due_events(1, {"job.built": 10})
            others.extend(other.outbox)

        with beside(hands.world, relay) as waits:
            held = waits()
            tx.conn.commit()
    assert (held, len(mine), len(others)) == (False, 1, 0)


def test_after_redis_was_emptied_everything_pending_is_published_at_once(emitting):
    service, work = emitting
    service._commit(work)
    service.bus.client.flushdb()
    service._commit(service._relay_turn)
    assert stream(service, "job.built") == 1, "lost with Redis until its time comes"


def test_a_long_stream_is_not_made_longer(emitting, hands):
    service, work = emitting
    service.store.retrying(work)
    service.store.retrying(lambda tx: tx.run("UPDATE event SET publish_at = now()"))
    most = hands.world.settings.stream_high_water
    service.bus.send([job_built()] * (most + 1))
    service._commit(service._relay_turn)
    assert stream(service, "job.built") == most


def test_what_was_handed_to_us_and_never_arrived_is_read_first(hands):
    """The reply to a read was lost: the entry is ours, and nobody else may take it for an hour."""
    hands.world.environ["WFM_CLAIM_IDLE_SECONDS"] = "3600"
    service = build(hands.world.settings, Role.WORKER)
    service.bus.join()
    service.bus.send([job_built()])
    service.bus.read(10, 0.1)
    with at_work(service):
        wait_until(lambda: stream(service, "job.built") == 0, 20, "our own pending entry is handled")


def test_what_a_dead_reader_held_is_taken_over(hands):
    hands.world.environ["WFM_CLAIM_IDLE_SECONDS"] = "0.2"
    dead = hands.role(Role.WORKER)
    dead.bus.send([job_built()])
    assert len(dead.bus.read(10, 0.1)) == 1
    service = build(hands.world.settings, Role.WORKER)
    with at_work(service):
        wait_until(lambda: stream(service, "job.built") == 0, 20, "the dead reader's entry is handled")


@contextmanager
def at_work(service: Service) -> Iterator[None]:
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        yield
    finally:
        service.stop()
        thread.join(timeout=60)


def test_a_message_that_comes_again_and_again_is_buried(hands):
    worker = hands.role(Role.WORKER)
    body = job_built().body
    most = hands.world.settings.max_deliveries
    worker._consume([Entry("wfm:{1}:job.built", "1-1", body, most), Entry("wfm:{1}:job.built", "1-2", body, most + 1)])
    assert [d.entry_id for d in hands.world.query("SELECT entry_id FROM dead_letter")] == ["1-2"]


def test_an_event_that_breaks_every_time_is_buried(emitting, hands):
    hands.world.environ["WFM_MAX_DELIVERIES"] = "3"
    service = hands.role(Role.WORKER)
    service._commit(emitting[1])

    def breaks(tx, events):
        raise ValueError("it breaks")

    service.work.handle = breaks
    for _ in range(3):
        service.store.retrying(lambda tx: tx.run("UPDATE event SET publish_at = now() WHERE done_at IS NULL"))
        service._commit(service._relay_turn)
        service._consume(service.bus.read(10, 0.1))
    (dead,) = hands.world.query("SELECT reason FROM dead_letter") or [None]
    assert dead is not None, "it breaks for ever"
    assert "it breaks" in dead.reason


def test_a_poisoned_message_harms_no_neighbour(hands):
    worker = hands.role(Role.WORKER)
    handled = []

    def handle(tx, events):
        if any(e.run == 13 for e in events):
            raise ValueError("13")
        handled.extend(e.run for e in events)

    worker.work.handle = handle
    bodies = [json.dumps({"type": "job.built", "run": n, "version": 1}).encode() for n in (12, 13, 14)]
    worker._consume([Entry("wfm:{1}:job.built", f"1-{i}", body) for i, body in enumerate(bodies)])
    assert handled == [12, 14]
    assert len(hands.world.query("SELECT 1 FROM dead_letter")) == 1


def test_what_no_message_tells_of_is_found_by_reconciliation(hands):
    hands.world.pipeline("p", ONE)
    hands.world.register(hands.world.package("a"))
    hands.world.query("UPDATE event SET done_at = now() RETURNING 1")
    hands.do(Role.TRIGGER_MANAGER, "reconcile")
    assert len(hands.world.runs()) == 1, "a package that nobody told of is never found"


def test_an_entry_that_was_deleted_while_it_was_held_is_no_poison(hands):
    worker = hands.role(Role.WORKER)
    worker._consume([Entry("wfm:{1}:job.built", "1-1", b"")])
    assert not hands.world.query("SELECT reason FROM dead_letter")


# --- Postgres ---


def test_who_loses_a_deadlock_tries_again(hands):
    hands.world.pipeline("p", ONE)
    hands.world.register(*(hands.world.package(n) for n in "ab"))
    hands.do(Role.TRIGGER_MANAGER, "reconcile")
    first, second = (r.id for r in hands.world.runs())
    both = threading.Barrier(2)
    tries: list[int] = []

    def lock(order):
        def work(tx):
            tries.append(1)
            tx.lock_runs([order[0]], coverage=False)
            if len(tries) <= 2:
                both.wait(30)
            tx.lock_runs([order[1]], coverage=False)

        return work

    faults = []

    def other():
        try:
            hands.world.store.retrying(lock([second, first]))
        except Exception as error:
            faults.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        hands.world.store.retrying(lock([first, second]))
    except Exception as error:
        faults.append(error)
    thread.join(timeout=60)
    assert not faults, f"the loser gave up: {faults}"
    assert len(tries) == 3


def test_a_transaction_whose_connection_is_lost_is_repeated(hands):
    worker = hands.role(Role.WORKER)
    tries = []

    def work(tx):
        tries.append(1)
        if len(tries) == 1:
            tx.conn.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    try:
        worker._commit(work)
    except Exception as error:
        raise AssertionError(f"given up: {error}") from error
    assert len(tries) == 2
