"""Side-effecting work: leased tasks, their kinds, and the runner that performs them.

A `Kind` does three things, so that effects never hold a transaction open and a database never waits for a disk:
`prepare` reads what it needs for many tasks at once, in the transaction that leases them; `perform` touches the outside
world, in a thread, without the database; `settle` says what the outcome means for the runs, in one transaction that
counts only if the lease is still ours (its epoch is the fencing token).

Kinds of other packages are found through the entry point group ``wfm.tasks``.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import entry_points
from typing import Any, Protocol

from msgspec import Struct
from sqlalchemy.exc import DBAPIError

from wfm.decide import backoff
from wfm.errors import HeldError, RefusedError, UnavailableError, WfmError
from wfm.model import FailureClass
from wfm.store import Move, RunRow, Store, TaskEnd, TaskRow, Tx, failed, is_connection_error

log = logging.getLogger(__name__)


class Outcome(Struct, frozen=True):
    """How one task ended: a value, or the error that ended it."""

    task: TaskRow
    value: Any = None
    error: Exception | None = None


class Kind(Protocol):
    """One kind of task.

    Attributes:
        name: as in ``task.kind``. slots: how many threads work on it. batch: how many tasks one `perform` takes.
    """

    name: str
    slots: int
    batch: int

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, Any]:
        """By task id, what `perform` needs; a task that is left out is no longer wanted and will be closed."""
        ...

    def perform(self, work: Sequence[Any], alive: Callable[[], bool]) -> Sequence[Any]:
        """Do it; for each piece of work a value, or an exception.

        `HeldError` and `UnavailableError` mean "again later", any other `WfmError` that it will never succeed.
        `alive` turns false when a lease was lost: stop then.
        """
        ...

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        """Write what was found out; return the moves of the (locked) runs."""
        ...

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        """What it means for the runs that these tasks cannot succeed."""
        ...

    def again_in(self, tx: Tx) -> float | None:
        """For a task that repeats for ever: seconds until its next turn."""
        ...


def foreign_kinds() -> list[Kind]:
    """Kinds that installed packages offer through entry points."""
    return [e.load()() for e in entry_points(group="wfm.tasks")]


class _Job(Struct):
    """A leased piece of work on its way through the threads."""

    task: TaskRow
    work: Any


class TaskRunner:
    """Leases tasks, performs them in threads, and settles their outcomes.

    All database work happens in the caller's thread and transactions, except the renewal of leases.

    Args:
        deliver: called from the threads with each outcome; the caller brings it to `settle`.
    """

    def __init__(
        self,
        store: Store,
        kinds: Sequence[Kind],
        *,
        owner: str,
        location_id: int,
        lease_seconds: float,
        max_tries: int,
        deliver: Callable[[Outcome], None],
    ) -> None:
        self.kinds = {k.name: k for k in kinds}
        self.store = store
        self.owner = owner
        self.location_id = location_id
        self.lease = lease_seconds
        self.max_tries = max_tries
        self.deliver = deliver
        self.stopping = False
        self.again_in: float | None = None
        self._alone = False
        self._held: dict[int, TaskRow] = {}
        self._lock = threading.Lock()
        self._pools = {k.name: ThreadPoolExecutor(k.slots, thread_name_prefix=k.name) for k in kinds}
        self._stop_renewing = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="renew-leases", daemon=True)
        self._renewer.start()

    @property
    def held(self) -> int:
        """The number of leases in hand."""
        return len(self._held)

    # --- lease ---

    def claim(self, tx: Tx) -> Callable[[], None]:
        """Lease what there are threads for; call the result after the commit to begin the work."""
        if self.stopping or (self._alone and self._held):
            return lambda: None
        with self._lock:
            busy: dict[str, int] = defaultdict(int)
            for t in self._held.values():
                busy[t.kind] += 1
        free = {k.name: k.slots * max(k.batch, 4) - busy[k.name] for k in self.kinds.values()}
        tasks = self._part(tx, tx.claim_tasks(self.location_id, free, self.owner, self.lease))
        fresh = [t for t in tasks if t.tries <= self.max_tries]
        works, broken = self._prepare(tx, fresh)
        broken += [
            Outcome(t, error=UnavailableError(f"{t.tries} workers ended or lost touch while doing it"))
            for t in tasks
            if t.tries > self.max_tries
        ]
        given_up = {o.task.id for o in broken}
        jobs = [_Job(t, works[t.id]) for t in fresh if t.id in works]
        unwanted = [t for t in fresh if t.id not in works and t.id not in given_up]
        tx.end_tasks([TaskEnd(t, "closed", "no longer wanted") for t in unwanted])

        def begin() -> None:
            with self._lock:
                self._held |= {j.task.id: j.task for j in jobs} | {o.task.id: o.task for o in broken}
            for outcome in broken:
                self.deliver(outcome)
            for kind in self.kinds.values():
                mine = [j for j in jobs if j.task.kind == kind.name]
                for i in range(0, len(mine), kind.batch):
                    self._pools[kind.name].submit(self._perform, kind, mine[i : i + kind.batch])

        return begin

    def _part(self, tx: Tx, tasks: Sequence[TaskRow]) -> Sequence[TaskRow]:
        """Of leased tasks, those to take on; the others are given back.

        A task whose workers ended, as often as is allowed, may be what ended them, or may only have been beside it: it
        has one more chance, alone. Nothing else is begun until it is over, and it waits for what is in hand.
        """
        last = [t for t in tasks if t.tries == self.max_tries]
        self._alone = bool(last)
        if not last:
            return tasks
        mine = [t for t in tasks if t.tries > self.max_tries] + ([] if self._held else last[:1])
        tx.end_tasks([TaskEnd(t, "ready", tries=t.tries) for t in tasks if t not in mine])
        return mine

    def _prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> tuple[dict[int, Any], list[Outcome]]:
        """Prepare all at once; if that breaks, one by one, so that a bad one falls out alone."""
        by_kind: dict[str, list[TaskRow]] = defaultdict(list)
        for t in tasks:
            by_kind[t.kind].append(t)
        works: dict[int, Any] = {}
        faults: list[Outcome] = []
        try:
            with tx.conn.begin_nested() if tasks else nullcontext():
                for kind, rows in by_kind.items():
                    works |= self.kinds[kind].prepare(tx, rows)
                return works, faults
        except Exception as e:
            if isinstance(e, DBAPIError) and is_connection_error(e):
                raise
            if len(tasks) == 1:
                log.exception("task %s %s cannot be prepared", tasks[0].kind, tasks[0].id)
                return {}, [Outcome(tasks[0], error=e)]
        works.clear()
        for t in tasks:
            one, fault = self._prepare(tx, [t])
            works |= one
            faults += fault
        return works, faults

    def _perform(self, kind: Kind, jobs: Sequence[_Job]) -> None:
        jobs = [j for j in jobs if j.task.id in self._held]
        if not jobs:
            return

        def alive() -> bool:
            return not self.stopping and all(j.task.id in self._held for j in jobs)

        try:
            values = kind.perform([j.work for j in jobs], alive)
        except Exception as e:
            values = [e] * len(jobs)
        for job, value in zip(jobs, values, strict=True):
            if isinstance(value, Exception):
                self.deliver(Outcome(job.task, error=value))
            else:
                self.deliver(Outcome(job.task, value=value))

    def _renew(self) -> None:
        while not self._stop_renewing.wait(self.lease / 4):
            with self._lock:
                tasks = list(self._held.values())
            if not tasks:
                continue
            try:
                with self.store.begin() as tx:
                    kept = tx.renew_leases(tasks, self.lease)
            except Exception as e:
                log.warning("leases not renewed: %s", e)
                continue
            for t in tasks:
                if t.id not in kept:
                    log.warning("lost the lease of %s task %s (run %s)", t.kind, t.id, t.run_id)
                    self._forget(t)

    def _forget(self, task: TaskRow) -> None:
        with self._lock:
            if self._held.get(task.id) == task:
                del self._held[task.id]

    # --- settle ---

    def settle(self, tx: Tx, outcomes: Sequence[Outcome]) -> Callable[[], None]:
        """Write outcomes whose lease still counts, and move their runs. Call the result after the commit."""
        runs = tx.lock_runs([o.task.run_id for o in outcomes if o.task.run_id is not None])
        for_good: set[tuple[int, int]] = set()
        ends: list[TaskEnd] = []
        for o in outcomes:
            end, final = self._end(tx, o)
            ends.append(end)
            if final:
                for_good.add(o.task.lease)
        counted = tx.end_tasks(ends)
        self.again_in = min((e.due_in for e in ends if e.state == "ready"), default=None)
        good: dict[str, list[Outcome]] = defaultdict(list)
        bad: dict[str, list[Outcome]] = defaultdict(list)
        held: dict[int, str] = {}
        for o in outcomes:
            if o.task.lease not in counted:
                log.info("outcome of %s task %s came too late; another epoch holds it", o.task.kind, o.task.id)
            elif o.error is None:
                good[o.task.kind].append(o)
            elif o.task.lease in for_good:
                bad[o.task.kind].append(o)
            elif o.task.run_id is not None:
                held[o.task.run_id] = str(o.error)
        moves: list[Move] = []
        shared: list[Move] = []
        for kind, group in good.items():
            of_one_run = group[0].task.run_id is not None
            (moves if of_one_run else shared).extend(self.kinds[kind].succeeded(tx, runs, group))
        for kind, group in bad.items():
            moves += self.kinds[kind].failed(tx, runs, group)
        _, refused = tx.move(moves)
        refused |= _move_apart(tx, shared)
        for run, error in refused.items():
            log.info("run %s: %s", run, error)
        _say_waiting(tx, held)

        def forget() -> None:
            for o in outcomes:
                self._forget(o.task)

        return forget

    def _end(self, tx: Tx, o: Outcome) -> tuple[TaskEnd, bool]:
        """How the lease ends, and whether the task has failed for good."""
        again = self.kinds[o.task.kind].again_in(tx)
        if o.error is None:
            return (
                TaskEnd(o.task, "done") if again is None else TaskEnd(o.task, "ready", due_in=again, tries=0)
            ), False
        text = f"{type(o.error).__name__}: {o.error}" if not isinstance(o.error, WfmError) else str(o.error)
        if isinstance(o.error, HeldError):
            return TaskEnd(o.task, "ready", text, due_in=o.error.retry_in), False
        tries = o.task.tries + 1
        repeatable = isinstance(o.error, UnavailableError) or not isinstance(o.error, WfmError)
        if not isinstance(o.error, WfmError):
            log.error("%s task %s (run %s) broke", o.task.kind, o.task.id, o.task.run_id, exc_info=o.error)
        if again is not None:
            return TaskEnd(o.task, "ready", text, due_in=max(again, backoff(tries, 1.0, 60.0)), tries=0), False
        if repeatable and tries < self.max_tries:
            return TaskEnd(o.task, "ready", text, due_in=backoff(tries, 1.0, 60.0), tries=tries), False
        return TaskEnd(o.task, "failed", text, tries=tries), True

    # --- stop ---

    def stop(self) -> None:
        """Take no new work and tell what runs to stop; outcomes that still come may be settled."""
        self.stopping = True
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def hand_back(self, tx: Tx) -> None:
        """Return the leases that are still in hand, so that others can go on at once."""
        with self._lock:
            tasks = list(self._held.values())
            self._held.clear()
        tx.end_tasks([TaskEnd(t, "ready", "handed back at shutdown", tries=t.tries) for t in tasks])

    def close(self) -> None:
        """End the renewal of leases."""
        self._stop_renewing.set()
        self._renewer.join(timeout=5)


def _move_apart(tx: Tx, moves: Sequence[Move]) -> dict[int, RefusedError]:
    """Moves that one outcome makes for many runs: what cannot be written of one run fails it, and no other.

    Returns:
        the refusals of the chart, by run.
    """
    if not moves:
        return {}
    published = len(tx.outbox)
    try:
        with tx.conn.begin_nested():
            return tx.move(moves)[1]
    except DBAPIError as e:
        if is_connection_error(e):
            raise
        del tx.outbox[published:]
        if len(moves) == 1:
            (m,) = moves
            log.exception("what became of run %s cannot be written", m.run.id)
            text = f"what became of it cannot be written down: {str(e.orig).splitlines()[0]}"
            due_in = backoff(m.run.failures + 1, 10.0, 600.0)
            return tx.move([failed(m.run, FailureClass.TASK, text, m.actor, due_in)])[1]
    refused: dict[int, RefusedError] = {}
    for m in moves:
        refused |= _move_apart(tx, [m])
    return refused


def _say_waiting(tx: Tx, reasons: Mapping[int, str]) -> None:
    if reasons:
        tx.run(
            """
            UPDATE run r SET waiting_for = h.reason
            FROM unnest(CAST(:ids AS bigint[]), CAST(:reasons AS text[])) AS h(id, reason)
            WHERE r.id = h.id AND r.waiting_for <> h.reason
            """,
            ids=list(reasons),
            reasons=list(reasons.values()),
        )
