"""Whatever the order, whatever breaks: the same end. A stateful property test without servers, clock or disk.

Real, called as they stand: the chart, every decision of `wfm.decide`, the codec of events, `Tx.move` and what it makes
of its moves, the kinds of tasks with `TaskRunner`, the roles worker and result-manager, cancellation, and `Service`
with its order of commit, publication and acknowledgement. Modelled, as small as can be: Redis (lists), the target of
jobs (what it remembers of each), and the tables.

These rules of the core live in SQL only, so this test has a copy of them, and `tests/faults/mutants.py` shows for the
originals that each is needed: the version in the guarded UPDATE of runs, `state = 'leased'` and the epoch in
`end_tasks`, the closing of tasks that a run no longer waits for, the lease in `claim_tasks`, the conflict rule of
`open_tasks`, `done_at` of events, what the end of a run means for coverage whose wish has changed, the gathering of
facts for `decide.gap`, and the order of admission. One rule is left out on purpose: the unique index of active runs.
Here `decide.gap` alone must see to it.

A transaction is atomic here, so what protects one transaction from another (row locks, SKIP LOCKED) is not tested here.

`WFM_EXAMPLES=2000 pytest tests/unit/test_any_order.py` looks further, in other places each time.
"""

from __future__ import annotations

import logging
import os
import queue
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec import Struct, field
from sqlalchemy.exc import OperationalError

from wfm import acts, service
from wfm.backends import Backend
from wfm.bus import Entry
from wfm.charts import Chart
from wfm.config import load
from wfm.decide import (
    DIGEST_MODULUS,
    ActiveRun,
    Capacity,
    EndedRun,
    GapFacts,
    PendingRun,
    SoftwareVersion,
    Upstream,
    admit,
    choose_version,
    gap,
    item_hash,
    set_digest,
    wanted_digest,
)
from wfm.errors import InputError, RefusedError, UnavailableError
from wfm.events import ENTRANCES, DataArrived, Event, Message, PipelineChanged, RunEvent
from wfm.jobs import job_name
from wfm.kinds import Collect, Collected, Poll, Stage, _runs_of
from wfm.model import FINAL_STATES, Actor, JobRef, JobSpec, JobStatus, Report, Resources, Role, RunState, VersionPolicy
from wfm.roles import ResultManager, Sweep, Worker, _Quiet, streams_of
from wfm.service import Service
from wfm.store import (
    HOLDS_SLOT,
    TASK_ON_ENTRY,
    WITHDRAWN,
    Move,
    RunRow,
    TaskEnd,
    TaskRow,
    Tx,
    encode,
    message,
    result_hash,
)
from wfm.tasks import Outcome

PERSON = Actor("user:test", "a test")
SETTINGS = load({"WFM_LEASE_SECONDS": "3600", "WFM_MAX_TASK_TRIES": "3", "WFM_RETRY_BACKOFF_SECONDS": "10"})
CHARTS = service.load_charts()
CHART: Chart = CHARTS[max(CHARTS)]
STEPS: dict[str, tuple[str, ...]] = {"scan": (), "map": ("scan",)}
BUILT = {
    "scan": {"WORKFLOW_STEP": "scan", "WORKFLOW_OUTPUT_DIR": "//workspace/scan"},
    "map": {"WORKFLOW_STEP": "map", "WORKFLOW_OUTPUT_DIR": "//output"},
}
SLOTS = 3
RETRIES = 1

Pair = tuple[str, str]
"""(step, unit)"""


# --- the tables -----------------------------------------------------------------------------------------------------


class Coverage(Struct, frozen=True):
    state: str = "waiting"
    why: str = "arrivals_not_sorted_yet"
    wanted: str = ""
    run: int | None = None
    result: int = 0


class TaskLine(Struct, frozen=True):
    kind: str
    run: int | None
    attempt: int
    state: str = "ready"
    epoch: int = 0
    tries: int = 0
    due: float = 0.0
    expired: bool = False


class Pinned(Struct, frozen=True):
    """What an attempt reads: packages with their content, results of upstream units, the software's version."""

    packages: Mapping[str, int]
    upstream: Mapping[str, int]
    version: str

    def digest(self, step: str) -> str:
        """The digest that these inputs give."""
        results = {name: sum(self.upstream.values()) % DIGEST_MODULUS for name in STEPS[step]}
        return wanted_digest(_members(self.packages), len(self.packages), results, step, self.version, "")


class Tables(Struct):
    """All that Postgres keeps. Values are immutable, so that a copy of the dictionaries is a snapshot."""

    now: list[float] = field(default_factory=lambda: [0.0])
    packages: dict[str, int] = {}
    folded: dict[str, int] = {}
    versions: dict[str, str] = {}
    coverage: dict[Pair, Coverage] = {}
    runs: dict[int, RunRow] = {}
    since: dict[int, float] = {}
    due: dict[int, float] = {}
    pinned: dict[int, Pinned] = {}
    history: list[Mapping[str, Any]] = []
    ledger: list[Mapping[str, Any]] = []
    done: dict[int, bool] = {}
    publish_at: dict[int, float] = {}
    tasks: dict[int, TaskLine] = {}
    accepted: list[tuple[int, int]] = []
    ended: list[int] = []

    def snapshot(self) -> Tables:
        return Tables(*(type(v)(v) for v in msgspec.structs.astuple(self)))


def _members(packages: Mapping[str, int]) -> int:
    return set_digest(item_hash(name, content) for name, content in packages.items())


def _scan(package: str) -> str:
    return package.split("-", maxsplit=1)[0]


class _Connection:
    def begin_nested(self) -> Any:
        return nullcontext()


class ModelTx(Tx):
    """A transaction on the tables; what `Tx` does beside SQL is inherited."""

    def __init__(self, world: World) -> None:
        super().__init__(_Connection(), CHARTS, SETTINGS.republish_seconds)  # type: ignore[arg-type]
        self.world = world
        self.db = world.db

    # --- runs ---

    def _row(self, i: int) -> RunRow:
        return msgspec.structs.replace(self.db.runs[i], seconds_in_state=self.db.now[0] - self.db.since[i])

    def lock_runs(self, ids: Sequence[int], *, coverage: bool = True) -> dict[int, RunRow]:
        return {i: self._row(i) for i in sorted(set(ids)) if i in self.db.runs}

    def find_runs(self, where: str, *, limit: int = 1000, **params: Any) -> dict[int, RunRow]:
        if "ids" in params:
            return self.lock_runs(params["ids"])
        states = params.get("states") or [s for s in RunState if f"'{s}'" in where]
        return self.lock_runs([i for i, r in self.db.runs.items() if r.state in states])

    def _write_moves(self, rows: list[dict[str, Any]], moved: Mapping[int, RunRow]) -> None:
        for row in rows:
            if self.db.runs[row["id"]].version != row["expected"]:
                raise RefusedError(f"run {row['id']} moved under a lock that should hold it")
            self.db.runs[row["id"]] = moved[row["id"]]
            self.db.since[row["id"]] = self.db.now[0]
            self.db.due[row["id"]] = self.db.now[0] + (row["due_in"] or 0.0)
            self.db.history.append(row)
        self._write_tasks(moved)
        self._write_coverage([r for r in moved.values() if r.state in FINAL_STATES or r.state == RunState.PENDING])
        self.emit_entries(moved.values(), {r["id"]: Actor(r["actor"], r["reason"]) for r in rows})

    def create_run(self, pair: Pair, wanted: str) -> int:
        i = len(self.db.runs) + 1
        self.db.runs[i] = msgspec.convert(
            {
                **dict.fromkeys(("backend", "handle", "waiting_for", "failure", "message", "node"), ""),
                **dict.fromkeys(("job", "exit_code", "wall_seconds", "cpu_hours", "peak_memory_gb"), None),
                **dict.fromkeys(("location_id", "pipeline_id", "step_id", "unit_id", "generation", "version"), 1),
                "id": i,
                **dict.fromkeys(("pipeline", "pipeline_name"), "p"),
                **dict.fromkeys(("step", "step_name"), pair[0]),
                "unit": pair[1],
                "wanted": wanted,
                "result": result_hash(*pair, wanted),
                "state": CHART.initial,
                "chart_version": 1,
                "attempt": 1,
                "failures": 0,
                "max_retries": RETRIES,
                "priority": 0,
                "seconds_in_state": 0.0,
                "evidence": {},
            },
            RunRow,
        )
        self.db.since[i] = self.db.now[0]
        self.db.history.append({"id": i, "expected": 0, "source": None, "state": CHART.initial, "trigger": "create"})
        self.emit_entries([self.db.runs[i]], {i: PERSON})
        return i

    # --- the ledger ---

    def _write_events(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            i = len(self.db.ledger) + 1
            self.db.ledger.append({"id": i, "created_at": datetime(2026, 1, 1, tzinfo=UTC), **row})
            self.db.done[i] = row["recipient"] == ""
            self.db.publish_at[i] = self.db.now[0] + self.republish_seconds
            self.outbox.append(message(SimpleNamespace(**self.db.ledger[-1])))

    def mark_done(self, event_ids: Sequence[int]) -> set[int]:
        if "no done mark" in self.world.broken:
            return set()
        new = {i for i in event_ids if self.db.done.get(i) is False}
        self.db.done |= dict.fromkeys(new, True)
        return new

    def due_events(self, location_id: int, limit: int, full: Sequence[str] = ()) -> None:
        if "no relay" in self.world.broken:
            return
        for row in self.db.ledger:
            if not self.db.done[row["id"]] and self.db.publish_at[row["id"]] <= self.db.now[0]:
                self.db.publish_at[row["id"]] = self.db.now[0] + self.republish_seconds
                self.outbox.append(message(SimpleNamespace(**row)))

    def republish_all(self, location_id: int) -> int:
        self.db.publish_at = dict.fromkeys(self.db.publish_at, self.db.now[0])
        return 1

    # --- tasks ---

    def claim_tasks(self, location_id: int, free: Mapping[str, int], owner: str, lease: float) -> list[TaskRow]:
        left = dict(free)
        claimed = []
        for i, t in self.db.tasks.items():
            open_ = t.due <= self.db.now[0] if t.state == "ready" else t.state == "leased" and t.expired
            if open_ and left.get(t.kind, 0) > 0:
                left[t.kind] -= 1
                tries = t.tries + (t.state == "leased")
                leased = msgspec.structs.replace(t, state="leased", epoch=t.epoch + 1, tries=tries, expired=False)
                self.db.tasks[i] = leased
                keys = {"id": i, "kind": t.kind, "run_id": t.run, "attempt": t.attempt}
                claimed.append(TaskRow(**keys, epoch=leased.epoch, tries=tries, payload={}))
        return claimed

    def end_tasks(self, ends: Sequence[TaskEnd]) -> set[tuple[int, int]]:
        heard = set()
        for e in ends:
            t = self.db.tasks[e.task.id]
            if "no lease check" not in self.world.broken and (t.state, t.epoch) != ("leased", e.task.epoch):
                continue
            tries = t.tries if e.tries is None else e.tries
            due = self.db.now[0] + e.due_in
            self.db.tasks[e.task.id] = msgspec.structs.replace(t, state=e.state, tries=tries, due=due, expired=False)
            heard.add(e.task.lease)
            if e.state == "done":
                self.db.ended.append(e.task.id)
        return heard

    # --- statements that Python code of the product gives ---

    def run(self, sql: str, **params: Any) -> int:
        sql = " ".join(sql.split())
        rows = msgspec.json.decode(params["rows"]) if "rows" in params else []
        if sql.startswith("UPDATE task SET state = 'closed'"):
            self._close_tasks(params["ids"])
        elif sql.startswith("INSERT INTO task (location_id, kind, run_id"):
            self._open_tasks(rows)
        elif sql.startswith("INSERT INTO task (location_id, kind) VALUES (:loc, :kind)"):
            self._poll_now(params["kind"])
        elif sql.startswith("UPDATE coverage c SET"):
            self._cover(rows)
        elif "INSERT INTO data_product" in sql:
            self.db.accepted += [(r["run"], r["attempt"]) for r in rows]
        elif sql.startswith("UPDATE event e SET done_at = NULL"):
            self._send_again(params["ids"], params["role"])
        else:
            assert sql.startswith(("UPDATE run r SET waiting_for", "UPDATE run r SET look", "WITH older AS")), sql
        return len(rows)

    def all(self, sql: str, **params: Any) -> Sequence[Any]:
        sql = " ".join(sql.split())
        runs = self.db.runs.values()
        if "state = 'RETRY_WAIT' AND due_at <= now()" in sql:
            return [r for r in runs if r.state is RunState.RETRY_WAIT and self.db.due[r.id] <= self.db.now[0]]
        if sql.startswith("SELECT count(*) AS jobs"):
            jobs = sum(r.state in (RunState.SUBMITTED, RunState.RUNNING) for r in runs)
            return [SimpleNamespace(jobs=jobs, youngest=0.0)]
        if sql.startswith("SELECT run_id, bool_or"):
            return self._task_summary(params["ids"])
        assert sql.startswith("SELECT r.id, s.active AND p.deleted_at IS NULL AS part"), sql
        return self._ended(params["ids"])

    def _close_tasks(self, ids: Sequence[int]) -> None:
        if "no closing of tasks" in self.world.broken:
            return
        for i, t in self.db.tasks.items():
            if t.run in ids and t.state in ("ready", "leased"):
                self.db.tasks[i] = msgspec.structs.replace(t, state="closed")

    def _open_tasks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            key = (row["kind"], row["run"], row["attempt"])
            i = next((i for i, t in self.db.tasks.items() if (t.kind, t.run, t.attempt) == key), None)
            if i is None:
                self.db.tasks[len(self.db.tasks) + 1] = TaskLine(*key, due=self.db.now[0])
            elif self.db.tasks[i].state in ("closed", "failed"):
                self.db.tasks[i] = TaskLine(*key, due=self.db.now[0], epoch=self.db.tasks[i].epoch + 1)

    def _poll_now(self, kind: str) -> None:
        i = next((i for i, t in self.db.tasks.items() if t.kind == kind), None)
        if i is None:
            self.db.tasks[len(self.db.tasks) + 1] = TaskLine(kind, None, 0)
        elif self.db.tasks[i].state == "ready":
            self.db.tasks[i] = msgspec.structs.replace(self.db.tasks[i], due=self.db.now[0])

    def _cover(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            r = self.db.runs[row["id"]]
            c = self.db.coverage[r.step, r.unit]
            if row["state"] != "covered":
                c = msgspec.structs.replace(c, state=row["state"], why=row["why"])
            elif c.wanted == r.wanted:
                c = Coverage("covered", "covered", c.wanted, r.id, r.result)
            else:
                c = Coverage("waiting", "newer_input", c.wanted, r.id, r.result)
            self.db.coverage[r.step, r.unit] = c

    def _send_again(self, ids: Sequence[int], role: str) -> None:
        for row in self.db.ledger:
            i = row.get("run")
            if i in ids and row["version"] == self.db.runs[i].version and row["recipient"] == role:
                self.db.done[row["id"]] = False
                self.db.publish_at[row["id"]] = self.db.now[0]

    def _task_summary(self, ids: Sequence[int]) -> Sequence[Any]:
        found: dict[int, Any] = {}
        for t in self.db.tasks.values():
            if t.run in ids and t.attempt == self.db.runs[t.run].attempt:
                seen = found.setdefault(t.run, SimpleNamespace(run_id=t.run, open=False, staged=False))
                seen.open |= t.state in ("ready", "leased")
                seen.staged |= (t.kind, t.state) == ("stage", "done")
        return list(found.values())

    def _ended(self, ids: Sequence[int]) -> Sequence[Any]:
        """What decides whether ended runs may begin again."""
        return [
            SimpleNamespace(
                id=r.id,
                part=True,
                newest=self.db.coverage[r.step, r.unit].wanted == r.wanted,
                active=active.id if (active := self.world.active((r.step, r.unit))) else None,
                exit_code=r.exit_code,
                purged=False,
                probe_of=None,
            )
            for r in (self.db.runs[i] for i in ids if self.db.runs[i].state in FINAL_STATES)
        ]


class CrashError(BaseException):
    """A role dies here."""


class ModelStore:
    """Transactions that commit, or do not, or of which nobody knows."""

    def __init__(self, world: World) -> None:
        self.world = world

    @contextmanager
    def begin(self) -> Iterator[ModelTx]:
        before = self.world.db
        self.world.db = before.snapshot()
        try:
            yield ModelTx(self.world)
        except BaseException:
            self.world.db = before
            raise

    def retrying(self, work: Callable[[Tx], Any]) -> tuple[Any, list[Message]]:
        with self.begin() as tx:
            value = work(tx)
            if self.world.fault == "dies before the commit":
                raise CrashError
        fault, self.world.fault = self.world.fault, ""
        if fault == "dies after the commit":
            raise CrashError
        if fault == "nobody knows of the commit":
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))
        self.world.fault = fault
        return value, tx.outbox

    def close(self) -> None:
        pass


# --- Redis ----------------------------------------------------------------------------------------------------------


class Redis:
    """Streams by event type: entries that nobody read yet, and those that readers hold."""

    def __init__(self) -> None:
        self.number = 0
        self.clear()

    def clear(self) -> None:
        self.unread: dict[str, list[Entry]] = defaultdict(list)
        self.held: dict[str, list[Entry]] = defaultdict(list)
        self.life = ""

    def add(self, kind: str, body: bytes) -> None:
        self.number += 1
        self.unread[kind].append(Entry(kind, str(self.number), body))

    def take(self, kinds: Sequence[str], consumer: str, count: int) -> list[Entry]:
        taken = [e for kind in kinds for e in self.unread[kind]][:count]
        for e in taken:
            self.unread[e.stream].remove(e)
        self.held[consumer] += taken
        return taken

    def claim(self, kinds: Sequence[str], consumer: str) -> list[Entry]:
        claimed = [e for held in self.held.values() for e in held if e.stream in kinds]
        for name in list(self.held):
            self.held[name] = [e for e in self.held[name] if e not in claimed]
        self.held[consumer] += claimed
        return claimed


class ModelBus:
    """The streams as one consumer sees them."""

    def __init__(self, world: World, consumer: str) -> None:
        self.world = world
        self.consumer = consumer

    def send(self, messages: Sequence[Message], done: Sequence[Entry] = ()) -> None:
        redis, fault = self.world.redis, self.world.fault
        self.world.fault = ""
        if fault == "Redis is away":
            raise service.RedisError("away")
        for entry in done:
            event_id = msgspec.json.decode(entry.body).get("id")
            if event_id is not None and not self.world.db.done[event_id]:
                self.world.early.append(event_id)
            for name in redis.held:
                redis.held[name] = [e for e in redis.held[name] if e.id != entry.id]
        for m in messages:
            if m.recipient:
                redis.add(m.type, m.body)
        if fault == "dies after publishing":
            raise CrashError

    def mend(self, error: Exception) -> None:
        """No key is ever of another type here."""

    def life(self) -> tuple[str, bool]:
        born = not self.world.redis.life
        if born:
            self.world.redis.number += 1
            self.world.redis.life = f"life {self.world.redis.number}"
        return self.world.redis.life, born

    def backlog(self, kinds: Sequence[str]) -> dict[str, int]:
        return {kind: len(self.world.redis.unread[kind]) for kind in kinds}


# --- the target -----------------------------------------------------------------------------------------------------


class Target:
    """Where jobs execute: a launched supervisor claims its attempt or leaves; its claim and its record stay."""

    name = "model"
    poll_seconds = 0.05

    def __init__(self, world: World) -> None:
        self.world = world
        self.away = False
        self.reply_lost = False
        self.staged: dict[str, Pinned] = {}
        self.launched: list[str] = []
        self.state: dict[str, JobStatus] = {}
        self.marks: set[str] = set()
        self.computations: Counter[str] = Counter()
        self.read: dict[str, Pinned] = {}

    def submit(self, specs: Sequence[JobSpec]) -> Mapping[str, JobRef | Exception]:
        if self.away:
            raise UnavailableError("the target is away")
        for spec in specs:
            if spec.name not in self.state:
                self.launched.append(spec.name)
        if self.reply_lost:
            self.reply_lost = False
            raise UnavailableError("the reply was lost")
        return {spec.name: JobRef(spec.name, spec.directory, "h") for spec in specs}

    def poll(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        return {job.name: self._report(job.name) for job in jobs}

    def cancel(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        if not self.away and "no mark" not in self.world.broken:
            self.marks |= {job.name for job in jobs}
        return self.poll(jobs)

    def _report(self, name: str) -> Report:
        if self.away:
            return Report(JobStatus.UNKNOWN)
        if name in self.state:
            status = self.state[name]
            code = {JobStatus.COMPLETED: 0, JobStatus.FAILED: 3}.get(status)
            return Report(status, "h", exit_code=code)
        if name in self.launched:
            return Report(JobStatus.PENDING, "h")
        return Report(JobStatus.CANCELLED if name in self.marks else JobStatus.ABSENT)

    def begin(self, name: str) -> None:
        """A supervisor comes to life: it claims the attempt, then looks at the mark, then computes."""
        self.launched.remove(name)
        if name in self.state and "no claim" not in self.world.broken:
            return
        if name in self.marks:
            self.state[name] = JobStatus.CANCELLED
            return
        self.computations[name] += 1
        self.read[name] = self.staged[name]
        self.state[name] = JobStatus.RUNNING

    @property
    def running(self) -> list[str]:
        return [name for name, state in self.state.items() if state is JobStatus.RUNNING]

    def can_act(self, name: str) -> bool:
        """Whether a computation of this attempt is going on, or can still begin."""
        return self.state.get(name) is JobStatus.RUNNING or (
            name in self.launched and name not in self.state and name not in self.marks
        )


class ModelStage(Stage):
    """Staging without a disk: what a job will read is remembered under its name."""

    def __init__(self, world: World) -> None:
        super().__init__(SETTINGS, world.target, 4)
        self.world = world

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, Any]:
        plans = {}
        for task, run in _runs_of(tx, tasks, RunState.STAGING_DATA).items():
            pinned = self.world.db.pinned[run.id]
            now = {p: self.world.db.packages[p] for p in pinned.packages}
            if not STEPS[run.step] and now != pinned.packages:
                raise InputError(f"run {run.id}: a package was registered with other content since")
            plans[task] = (run.ref.name, pinned)
        return plans

    def perform(self, work: Sequence[Any], alive: Callable[[], bool]) -> Sequence[Any]:
        self.world.target.staged |= dict(work)
        return [None] * len(work)


class ModelCollect(Collect):
    """Collection without a disk: one product for each attempt."""

    def perform(self, work: Sequence[Any], alive: Callable[[], bool]) -> Sequence[Any]:
        product = SimpleNamespace(type="SCIENCE", path="product", size=1, checksum="", metrics={})
        return [Collected(products=(product,), warnings=()) for _ in work]  # type: ignore[arg-type]


class CarelessPoll(Poll):
    """A planted bug: takes a report for one of the run as it is now, whatever attempt was asked for."""

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        now = {
            i: (run, report)
            for o in outcomes
            for i, (_, report) in o.value.items()
            for run in tx.lock_runs([i]).values()
        }
        return super().succeeded(tx, runs, [Outcome(outcomes[0].task, value=now)])


# --- the roles ------------------------------------------------------------------------------------------------------


class Trigger(_Quiet):
    """The trigger-manager: folds recorded arrivals, evaluates what they touch."""

    role = Role.TRIGGER_MANAGER

    def __init__(self, world: World) -> None:
        self.world = world
        self.sweeps = [Sweep("reconcile", 1.0, self.reconcile)]

    def handle(self, tx: ModelTx, events: Sequence[Event]) -> None:
        pairs = self._fold(tx, [str(e.raw_data_package) for e in events if isinstance(e, DataArrived)])
        if any(isinstance(e, PipelineChanged) for e in events):
            pairs |= self._everything(tx)
        ended = [tx.db.runs[e.run] for e in events if isinstance(e, RunEvent)]
        self._evaluate(tx, pairs | {(r.step, r.unit) for r in ended} | ({("map", "all")} if ended else set()))

    def reconcile(self, tx: ModelTx) -> None:
        self._fold(tx, list(tx.db.packages))
        self._evaluate(tx, self._everything(tx))

    def _everything(self, tx: ModelTx) -> set[Pair]:
        self._fold(tx, list(tx.db.packages))
        return {("scan", _scan(p)) for p in tx.db.folded} | ({("map", "all")} if tx.db.folded else set())

    def _fold(self, tx: ModelTx, named: Sequence[str]) -> set[Pair]:
        recorded = [e for e in tx.db.ledger if e["type"] == "data.arrived" and not tx.db.done[e["id"]]]
        tx.mark_done([e["id"] for e in recorded])
        names = {str(e["body"]["raw_data_package"]) for e in recorded} | set(named)
        new = {n: tx.db.packages[n] for n in names if n in tx.db.packages}
        tx.db.folded |= new
        return {("scan", _scan(p)) for p in new} | ({("map", "all")} if new else set())

    def _evaluate(self, tx: ModelTx, pairs: set[Pair]) -> None:
        waves = {step: {pair for pair in pairs if pair[0] == step} for step in STEPS}
        for step in STEPS:
            for pair in sorted(waves[step]):
                before = tx.db.coverage.get(pair)
                if self._decide(tx, pair) != before and step == "scan":
                    waves["map"].add(("map", "all"))

    def _decide(self, tx: ModelTx, pair: Pair) -> Coverage:
        facts = self.world.facts(pair)
        d = gap(facts)
        c = tx.db.coverage.setdefault(pair, Coverage())
        if d.withdraw:
            reason = "newer input, version or config arrived before it started"
            runs = tx.lock_runs([d.withdraw], coverage=False)
            tx.move(
                [Move(r, "withdraw", PERSON, sets={"failure": WITHDRAWN, "message": reason}) for r in runs.values()]
            )
        if d.run:
            tx.create_run(pair, facts.wanted)
        run, result = (d.covered_by, tx.db.runs[d.covered_by].result) if d.covered_by else (c.run, c.result)
        tx.db.coverage[pair] = Coverage(d.state, d.why, facts.wanted, run, result)
        return tx.db.coverage[pair]


class Workflow(_Quiet):
    """The workflow-manager: admits what fits, and pins its inputs."""

    role = Role.WORKFLOW_MANAGER

    def __init__(self, world: World) -> None:
        self.world = world
        self.sweeps = [Sweep("admission", 1.0, self.admit)]

    def handle(self, tx: ModelTx, events: Sequence[Event]) -> None:
        self.admit(tx)

    def admit(self, tx: ModelTx) -> None:
        used = sum(r.state in HOLDS_SLOT for r in tx.db.runs.values())
        pending = [PendingRun(r.id, 1.0, 1.0) for r in tx.db.runs.values() if r.state is RunState.PENDING]
        chosen, _ = admit(pending, Capacity(used, used, used), Capacity(10, SLOTS, None))
        for run in tx.lock_runs(chosen).values():
            pinned = tx.db.pinned[run.id] = self.world.inputs((run.step, run.unit))
            if pinned.digest(run.step) != run.wanted:
                sets = {"failure": WITHDRAWN, "message": "its inputs, or its pipeline, changed before it was built"}
                tx.move([Move(run, "withdraw", PERSON, sets=sets)])
            else:
                name = job_name(1, run.id, run.attempt)
                # "/" is there already: nothing is made where a cancellation makes the directory.
                job = JobSpec(name, "/", ("true",), BUILT[run.step], "/", Resources())
                tx.move([Move(run, "build", PERSON, sets={"job": job})])


class HastyService(Service):
    """A planted bug: acknowledges before the commit."""

    def _commit(self, work: Any, done: Sequence[Entry] = ()) -> None:
        fault, self.world.fault = self.world.fault, ""  # type: ignore[attr-defined]
        self.bus.send([], done)
        self.world.fault = fault  # type: ignore[attr-defined]
        super()._commit(work)


class EarlyService(Service):
    """A planted bug: publishes before the commit."""

    def _transact(self, work: Any) -> Any:
        def and_publish(tx: Tx) -> Any:
            value = work(tx)
            fault, self.world.fault = self.world.fault, ""  # type: ignore[attr-defined]
            self.bus.send(tx.outbox)
            self.world.fault = fault  # type: ignore[attr-defined]
            tx.outbox = []
            return value

        return super()._transact(and_publish)


SERVICES: dict[str, type[Service]] = {"acknowledge before the commit": HastyService, "publish early": EarlyService}


class Pool:
    """Instead of threads: what they would do waits here until its turn comes."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def submit(self, work: Callable[..., None], *args: Any) -> None:
        self.work.append(lambda: work(*args))


class World:
    """The tables, Redis, the target, and the living copies of the roles."""

    def __init__(self, broken: frozenset[str]) -> None:
        self.broken = broken
        self.db = Tables(versions=dict.fromkeys(STEPS, "1.0"))
        self.redis = Redis()
        self.target = Target(self)
        self.fault = ""
        self.early: list[int] = []
        self.births = 0
        roles = [Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER, *[Role.WORKER] * 2, *[Role.RESULT_MANAGER] * 2]
        self.services = [self.start(role) for role in roles]

    def start(self, role: Role) -> Service:
        self.births += 1
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        store: Any = ModelStore(self)
        target: Backend = self.target  # type: ignore[assignment]
        work: Any
        match role:
            case Role.TRIGGER_MANAGER:
                work = Trigger(self)
            case Role.WORKFLOW_MANAGER:
                work = Workflow(self)
            case Role.WORKER:
                work = Worker(SETTINGS, store, target, inbox, "w", 4)
                work.runner.kinds |= {"stage": ModelStage(self), "collect": ModelCollect(SETTINGS, target, 4)}
                del work.runner.kinds["purge"], work.sweeps[2:]
            case Role.RESULT_MANAGER:
                work = ResultManager(SETTINGS, store, target, inbox)
                if "no version check" in self.broken:
                    work.runner.kinds["poll"] = CarelessPoll(SETTINGS, target)
        pool = Pool()
        if role in (Role.WORKER, Role.RESULT_MANAGER):
            work.runner._pools = dict.fromkeys(work.runner.kinds, pool)
        kind = next((kind for name, kind in SERVICES.items() if name in self.broken), Service)
        made: Any = kind(SETTINGS, store, ModelBus(self, f"{role}-{self.births}"), work, inbox)  # type: ignore[arg-type]
        made.world = self
        made.pool = pool
        made.frozen = False
        made.stopping = SimpleNamespace(wait=lambda _: False)
        return made

    def crash(self, one: Service) -> None:
        one.work.close()
        self.fault = ""
        self.services[self.services.index(one)] = self.start(one.work.role)

    @contextmanager
    def dying(self, one: Service, fault: str) -> Iterator[None]:
        """What a role does, with something that goes wrong on the way."""
        self.fault = fault
        try:
            yield
        except CrashError:
            self.crash(one)
        self.fault = ""

    # --- what roles do ---

    def deliver(self, one: Any, count: int) -> None:
        entries = self.redis.take(streams_of(one.work.role, CHART), one.bus.consumer, count)
        if entries:
            one._consume(entries)

    def claim_idle(self, one: Any) -> None:
        entries = self.redis.claim(streams_of(one.work.role, CHART), one.bus.consumer)
        if entries:
            one._consume(entries)

    def sweep(self, one: Any, number: int) -> None:
        sweeps = one._sweeps
        one._commit(sweeps[number % len(sweeps)].work)

    def settle(self, one: Any) -> None:
        outcomes = []
        while not one.inbox.empty():
            outcomes.append(one.inbox.get())
        if outcomes:
            one._settle(outcomes)

    def expire_leases(self) -> None:
        for i, t in self.db.tasks.items():
            self.db.tasks[i] = msgspec.structs.replace(t, expired=t.state == "leased")

    # --- what they look at ---

    def active(self, pair: Pair) -> RunRow | None:
        found = [r for r in self.db.runs.values() if (r.step, r.unit) == pair and r.state not in FINAL_STATES]
        return found[0] if found else None

    def inputs(self, pair: Pair) -> Pinned:
        step, unit = pair
        packages = {p: c for p, c in self.db.folded.items() if step == "map" or _scan(p) == unit}
        covered = {u: c.result for (s, u), c in self.db.coverage.items() if s in STEPS[step] and c.state == "covered"}
        version, _ = choose_version(VersionPolicy.LATEST, "", [SoftwareVersion(1, self.db.versions[step], "active")])
        assert version is not None
        return Pinned(packages, covered, version.version)

    def facts(self, pair: Pair) -> GapFacts:
        step, unit = pair
        inputs = self.inputs(pair)
        wanted = inputs.digest(step)
        units = {_scan(p) for p in self.db.folded}
        upstream = tuple(
            Upstream(
                name,
                total=len(units),
                covered=len(inputs.upstream),
                blocked=sum(self.db.coverage.get((name, u), Coverage()).state == "blocked" for u in units),
                digest=sum(inputs.upstream.values()) % DIGEST_MODULUS,
            )
            for name in STEPS[step]
        )
        active = self.active(pair)
        ended = [
            r
            for r in self.db.runs.values()
            if (r.step, r.unit, r.wanted) == (step, unit, wanted) and r.state in FINAL_STATES and r.failure != WITHDRAWN
        ]
        last = max(ended, key=lambda r: (r.state is RunState.COMPLETED, r.id), default=None)
        return GapFacts(
            members=len(inputs.packages),
            wanted=wanted,
            upstream=upstream,
            active=ActiveRun(active.id, active.state, active.wanted) if active else None,
            ended=EndedRun(last.id, last.state, last.message) if last else None,
        )


FAULTS = (
    "dies before the commit",
    "dies after the commit",
    "dies after publishing",
    "nobody knows of the commit",
    "Redis is away",
)
faults = st.sampled_from([""] * 2 * len(FAULTS) + list(FAULTS))  # most of the time nothing goes wrong
small = st.integers(0, 5)
packages = st.sampled_from(["s1-a", "s1-b", "s2-a"])


def _pick(some: Sequence[Any], number: int) -> Any:
    return some[number % len(some)]


def has_mail(one: Any) -> bool:
    return any(one.world.redis.unread[kind] for kind in streams_of(one.work.role, CHART))


def has_work(one: Any) -> bool:
    return bool(one.pool.work)


def has_outcomes(one: Any) -> bool:
    return not one.inbox.empty()


class Wfm(RuleBasedStateMachine):
    """What goes on by itself, what must always hold, and what must hold in the end."""

    broken: frozenset[str] = frozenset()

    @initialize(names=st.sets(packages, min_size=1), rounds=st.integers(0, 4))
    def begin(self, names: set[str], rounds: int) -> None:
        self.world = World(self.broken)
        self._register(dict.fromkeys(sorted(names), 0))
        self.all_goes_well_for_a_while(rounds, jobs=False)

    # --- people ---

    def _act(self, work: Callable[[Tx], Any]) -> Any:
        value, outbox = ModelStore(self.world).retrying(work)
        ModelBus(self.world, "").send(outbox)
        return value

    def _ask(self, what: Callable[[Tx, Sequence[int], Actor], Any], which: int) -> None:
        run = _pick(sorted(self.world.db.runs, reverse=True), which)
        self._act(lambda tx: what(tx, [run], PERSON))

    def _register(self, contents: Mapping[str, int]) -> None:
        def work(tx: ModelTx) -> None:
            tx.db.packages |= contents
            for name in contents:
                tx.emit(1, DataArrived(raw_data_package=name), ENTRANCES["data.arrived"], PERSON)

        self._act(work)

    # --- roles ---

    def _able(self, can: Callable[[Any], object]) -> list[Any]:
        return [one for one in self.world.services if not one.frozen and can(one)]

    def _turn(self, one: Any) -> None:
        if one.frozen:
            return
        self.world.deliver(one, 10)
        for number in range(len(one._sweeps)):
            self.world.sweep(one, number)
        while one.pool.work:
            one.pool.work.pop(0)()
        self.world.settle(one)

    def _jobs_go_on(self) -> None:
        target = self.world.target
        for name in list(target.launched):
            target.begin(name)
        for name, state in list(target.state.items()):
            if state is JobStatus.RUNNING:
                target.state[name] = JobStatus.CANCELLED if name in target.marks else JobStatus.COMPLETED

    @rule(rounds=st.integers(1, 3), jobs=st.booleans())
    def all_goes_well_for_a_while(self, rounds: int, jobs: bool) -> None:
        for _ in range(rounds):
            for one in list(self.world.services):
                self._turn(one)
            if jobs:
                self._jobs_go_on()

    @rule(which=small)
    def one_role_does_its_work(self, which: int) -> None:
        self._turn(_pick(self.world.services, which))

    # --- what always holds ---

    @invariant()
    def one_active_run_for_a_unit(self) -> None:
        active = Counter((r.step, r.unit) for r in self.world.db.runs.values() if r.state not in FINAL_STATES)
        assert all(n == 1 for n in active.values()), active

    @invariant()
    def history_is_whole_and_legal(self) -> None:
        state: dict[int, str] = {}
        version: Counter[int] = Counter()
        for row in self.world.db.history:
            i = row["id"]
            assert row["expected"] == version[i], f"run {i}: a gap in its history before {row}"
            assert row["source"] == state.get(i), f"run {i}: {row} does not begin where the last move ended"
            legal = {(t.trigger, t.source, t.dest) for t in CHART.transitions} | {("create", None, CHART.initial)}
            assert (row["trigger"], row["source"], row["state"]) in legal, f"run {i}: {row} is not in the chart"
            state[i] = row["state"]
            version[i] += 1
        assert state == {i: r.state for i, r in self.world.db.runs.items()}, "history ends where runs are"

    @invariant()
    def each_attempt_computed_once_and_accepted_once(self) -> None:
        twice = {name: n for name, n in self.world.target.computations.items() if n > 1}
        assert not twice, f"computed more than once: {twice}"
        again = {key: n for key, n in Counter(self.world.db.accepted).items() if n > 1}
        assert not again, f"accepted more than once: {again}"

    @invariant()
    def a_task_succeeds_once_and_is_open_while_its_run_waits_for_it(self) -> None:
        db = self.world.db
        twice = [db.tasks[i] for i, n in Counter(db.ended).items() if n > 1]
        assert not twice, f"succeeded more than once: {twice}"
        for t in db.tasks.values():
            if t.run is not None and t.state in ("ready", "leased"):
                run = db.runs[t.run]
                awaited = {"submit": RunState.STAGING_DATA, **{k: s for s, k in TASK_ON_ENTRY.items()}}[t.kind]
                assert (run.state, run.attempt) == (awaited, t.attempt), f"{t} is open, but its run is {run.state}"

    @invariant()
    def what_is_accepted_was_made_of_what_was_wanted(self) -> None:
        for i, attempt in self.world.db.accepted:
            run, name = self.world.db.runs[i], job_name(1, i, attempt)
            assert self.world.target.state.get(name) is JobStatus.COMPLETED, f"{name} has no exit record"
            assert self.world.target.read[name].digest(run.step) == run.wanted, f"{name} read something else"
        whole = {i for i, _ in self.world.db.accepted}
        for r in self.world.db.runs.values():
            assert r.state is not RunState.COMPLETED or r.id in whole, f"run {r.id} is COMPLETED without products"

    @invariant()
    def no_other_attempt_can_act(self) -> None:
        target = self.world.target
        for r in self.world.db.runs.values():
            over = range(1, r.attempt if r.state in HOLDS_SLOT else r.attempt + 1)
            loose = [n for n in over if target.can_act(job_name(1, r.id, n))]
            assert not loose, f"run {r.id} is {r.state}, attempt {r.attempt}; computing or about to: attempts {loose}"

    @invariant()
    def a_submitted_run_was_staged(self) -> None:
        for r in self.world.db.runs.values():
            if r.state in (RunState.SUBMITTED, RunState.RUNNING):
                name = job_name(1, r.id, r.attempt)
                assert name in self.world.target.staged, f"{name} is {r.state}, and nothing was staged"

    @invariant()
    def messages_follow_the_ledger(self) -> None:
        assert not self.world.early, f"acknowledged before they were handled: events {self.world.early}"
        for kind, entries in self.world.redis.unread.items():
            for e in entries:
                i = msgspec.json.decode(e.body).get("id")
                assert i is None or i <= len(self.world.db.ledger), f"published, but not committed: {kind} {i}"

    # --- the end ---

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self._heal()
            self._compare()
        finally:
            for one in self.world.services:
                one.work.close()

    def _heal(self) -> None:
        """Nothing breaks any more: look at everything until nothing changes."""
        world = self.world
        world.fault = ""
        world.target.away = world.target.reply_lost = False
        for one in world.services:
            one.frozen = False
            world.settle(one)  # goes on where it was
            self.no_other_attempt_can_act()
        before: Any = None
        for _ in range(40):
            world.db.now[0] += 10_000
            world.expire_leases()
            for one in list(world.services):
                if "no claim of idle entries" not in world.broken:
                    world.claim_idle(one)
                self._turn(one)
                while has_work(one) or has_outcomes(one):
                    self._turn(one)
                self.no_other_attempt_can_act()
                self.one_active_run_for_a_unit()
            self._jobs_go_on()
            ended = [i for i, r in world.db.runs.items() if r.state in FINAL_STATES - {RunState.COMPLETED}]
            blocked = {c.wanted for c in world.db.coverage.values() if c.state == "blocked"}
            for i in ended:
                if world.db.runs[i].wanted in blocked:
                    self._act(lambda tx, i=i: acts.retry_runs(tx, [i], PERSON))
            seen = (
                [(r.id, r.version) for r in world.db.runs.values()],
                dict(world.db.coverage),
                sum(not d for d in world.db.done.values()),
                sum(map(len, world.redis.unread.values())) + sum(map(len, world.redis.held.values())),
            )
            if seen == before:
                return
            before = seen
        raise AssertionError("it does not come to rest")

    def _compare(self) -> None:
        """Everything ends where a computation without faults ends."""
        db = self.world.db
        results: dict[str, int] = {}
        expected = {}
        for unit in sorted({_scan(p) for p in db.packages}):
            mine = {p: c for p, c in db.packages.items() if _scan(p) == unit}
            wanted = Pinned(mine, {}, db.versions["scan"]).digest("scan")
            results[unit] = result_hash("scan", unit, wanted)
            expected["scan", unit] = ("covered", wanted, results[unit])
        wanted = Pinned(db.packages, results, db.versions["map"]).digest("map")
        expected["map", "all"] = ("covered", wanted, result_hash("map", "all", wanted))
        assert {pair: (c.state, c.wanted, c.result) for pair, c in db.coverage.items()} == expected
        pending = [row for row in db.ledger if not db.done[row["id"]]]
        assert not pending, f"pending events: {pending}"
        leased = [t for t in db.tasks.values() if t.state == "leased"]
        assert not leased, f"leases: {leased}"
        open_ = [t for t in db.tasks.values() if t.state == "ready" and t.run is not None]
        assert not open_, f"open tasks of ended runs: {open_}"
        held = {name: entries for name, entries in self.world.redis.held.items() if entries}
        assert not held, f"messages in somebody's hands: {held}"


class Messages(Wfm):
    """Messages come, get lost, come twice, come late; who reads them dies on the way."""

    @precondition(lambda self: self._able(has_mail))
    @rule(which=small, count=st.integers(1, 4), fault=faults)
    def deliver(self, which: int, count: int, fault: str) -> None:
        one = _pick(self._able(has_mail), which)
        with self.world.dying(one, fault):
            self.world.deliver(one, count)

    @precondition(lambda self: any(self.world.redis.held.values()))
    @rule(which=small, fault=faults)
    def claim_what_lies_idle(self, which: int, fault: str) -> None:
        one = _pick(self._able(bool), which)
        with self.world.dying(one, fault):
            self.world.claim_idle(one)

    @rule(name=packages)
    def somebody_else_writes(self, name: str) -> None:
        self.world.redis.add("data.arrived", encode({"raw_data_package": name}).encode())

    @precondition(lambda self: any(self.world.redis.unread.values()))
    @rule(number=small, what=st.sampled_from(["doubled", "lost", "late"]))
    def message(self, number: int, what: str) -> None:
        entry = _pick([e for entries in self.world.redis.unread.values() for e in entries], number)
        if what != "doubled":
            self.world.redis.unread[entry.stream].remove(entry)
        if what != "lost":
            self.world.redis.add(entry.stream, entry.body)

    @rule()
    def redis_is_emptied(self) -> None:
        self.world.redis.clear()


class Tasks(Wfm):
    """Tasks are performed at any time; leases run out under living, dead and frozen workers."""

    @rule(which=small, number=small, fault=faults)
    def sweep(self, which: int, number: int, fault: str) -> None:
        one = _pick(self._able(bool), which)
        with self.world.dying(one, fault):
            self.world.sweep(one, number)

    @rule(which=small)
    def somebody_freezes_or_thaws(self, which: int) -> None:
        """Frozen with whatever it holds, it comes back much later and goes on as if nothing had been."""
        one = _pick(self.world.services[2:], which)
        one.frozen = not one.frozen

    @precondition(lambda self: self._able(has_work))
    @rule(which=small, number=small)
    def perform(self, which: int, number: int) -> None:
        work = _pick(self._able(has_work), which).pool.work
        work.pop(number % len(work))()

    @precondition(lambda self: self._able(has_outcomes))
    @rule(which=small, fault=faults)
    def settle(self, which: int, fault: str) -> None:
        one = _pick(self._able(has_outcomes), which)
        with self.world.dying(one, fault):
            self.world.settle(one)

    @rule(which=small)
    def crash(self, which: int) -> None:
        self.world.crash(_pick(self.world.services, which))

    @precondition(lambda self: any(t.state == "leased" for t in self.world.db.tasks.values()))
    @rule()
    def leases_run_out(self) -> None:
        self.world.expire_leases()


class Jobs(Wfm):
    """Jobs start late, end, vanish; their target is away; its answers get lost."""

    @rule()
    def time_passes(self) -> None:
        self.world.db.now[0] += 2 * SETTINGS.vanish_grace_seconds

    @precondition(lambda self: self.world.target.launched)
    @rule(number=small, starts=st.booleans())
    def a_supervisor_comes_or_is_lost(self, number: int, starts: bool) -> None:
        target = self.world.target
        name = _pick(target.launched, number)
        if starts:
            target.begin(name)
        else:
            target.launched.remove(name)

    @precondition(lambda self: self.world.target.running)
    @rule(number=small, how=st.sampled_from([JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.VANISHED]))
    def a_job_ends(self, number: int, how: JobStatus) -> None:
        target = self.world.target
        target.state[_pick(target.running, number)] = how

    @precondition(lambda self: self.world.target.launched)
    @rule(number=small)
    def a_supervisor_never_comes(self, number: int) -> None:
        """It is missed, fenced, and another attempt begins."""
        self.world.target.launched.remove(_pick(self.world.target.launched, number))
        for _ in range(2):
            self.world.db.now[0] += 2 * SETTINGS.vanish_grace_seconds
            self.all_goes_well_for_a_while(2, jobs=False)

    @precondition(lambda self: self.world.target.launched and not self.world.target.away)
    @rule(number=small, which=small)
    def who_saw_a_job_fail_freezes(self, number: int, which: int) -> None:
        one = _pick(self.world.services[4:], which)
        if not one.frozen:
            name = _pick(self.world.target.launched, number)
            self.world.target.begin(name)
            if self.world.target.state[name] is JobStatus.RUNNING:
                self.world.target.state[name] = JobStatus.FAILED
            for sweep in (2, 0):
                self.world.sweep(one, sweep)
            while one.pool.work:
                one.pool.work.pop(0)()
            one.frozen = True

    @rule()
    def the_target_goes_or_comes_back(self) -> None:
        self.world.target.away = not self.world.target.away

    @rule()
    def the_reply_to_a_submission_is_lost(self) -> None:
        self.world.target.reply_lost = True


class Data(Wfm):
    """Data come and change, software changes."""

    @rule(name=packages, content=st.integers(0, 1))
    def register(self, name: str, content: int) -> None:
        self._register({name: content})

    @rule(step=st.sampled_from(sorted(STEPS)), version=st.sampled_from(["1.0", "1.1"]))
    def choose_version(self, step: str, version: str) -> None:
        def work(tx: ModelTx) -> None:
            tx.db.versions[step] = version
            tx.emit(1, PipelineChanged(pipeline="p", pipeline_id=1), ENTRANCES["pipeline.changed"], PERSON)

        self._act(work)


class People(Wfm):
    """Runs are cancelled and retried."""

    @precondition(lambda self: self.world.db.runs)
    @rule(which=small)
    def cancel(self, which: int) -> None:
        self._ask(acts.cancel_runs, which)

    @precondition(lambda self: self.world.db.runs)
    @rule(which=small)
    def retry(self, which: int) -> None:
        self._ask(acts.retry_runs, which)

    @precondition(lambda self: self.world.db.runs)
    @rule(which=small)
    def somebody_changes_his_mind(self, which: int) -> None:
        self._ask(acts.cancel_runs, which)
        self.all_goes_well_for_a_while(2, jobs=True)
        self._ask(acts.retry_runs, which)
        self.all_goes_well_for_a_while(2, jobs=False)


class AnyOrder(Messages, Tasks, Jobs, Data, People):
    """All of it; Hypothesis chooses what happens next."""


EXAMPLES = int(os.environ.get("WFM_EXAMPLES", "0"))
"""How many to try beyond the usual, in a place of one's own."""

COMMON = {"deadline": None, "database": None, "report_multiple_bugs": False, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(autouse=True)
def _lean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A role is born thousands of times: nobody looks for installed kinds, or reads the log."""
    monkeypatch.setattr("wfm.roles.foreign_kinds", list)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_any_order_ends_where_no_fault_would_have_ended() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        AnyOrder, settings=settings(max_examples=EXAMPLES or 150, derandomize=not EXAMPLES, **COMMON)
    )


LEASES = (Tasks.somebody_freezes_or_thaws, Tasks.perform, Tasks.settle, Tasks.leases_run_out)
MESSAGES = (Messages.deliver, Messages.message, Messages.redis_is_emptied)

PLANTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no lease check": (LEASES, "succeeded more than once"),
    "no version check": (
        (
            Jobs.who_saw_a_job_fail_freezes,
            People.somebody_changes_his_mind,
        ),
        "computing or about to",
    ),
    "no closing of tasks": ((*LEASES, People.cancel), "is open, but its run is"),
    "no claim": ((*LEASES, Jobs.a_supervisor_comes_or_is_lost), "computed more than once"),
    "no mark": ((*LEASES, Jobs.a_supervisor_never_comes), "computing or about to"),
    "acknowledge before the commit": (MESSAGES, "acknowledged before they were handled"),
    "publish early": ((Messages.deliver, Tasks.sweep, Tasks.settle), "published, but not committed"),
    "no done mark": (MESSAGES, "."),
    "no relay": (MESSAGES, "pending events"),
    "no claim of idle entries": (MESSAGES, "messages in somebody's hands"),
}
"""By bug, what must happen for it to do harm (the less else happens, the sooner), and what its finding says."""


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str) -> None:
    """Each guard is taken away in turn: the property above can fail, and for the right reason."""
    rules, finding = PLANTED[bug]
    broken = type("Broken", (Wfm,), {"broken": frozenset({bug}), **{r.__name__: r for r in rules}})
    few = settings(max_examples=1000, stateful_step_count=30, derandomize=True, phases=[Phase.generate], **COMMON)
    with pytest.raises(AssertionError, match=finding):
        run_state_machine_as_test(broken, settings=few)  # type: ignore[no-untyped-call]
