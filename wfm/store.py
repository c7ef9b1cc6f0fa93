"""Postgres: the only truth. One unit of work, guarded moves, the ledger, leases.

`Store.begin()` opens a transaction (`Tx`). A `Tx` changes many runs at once: callers lock them, decide in memory, and
hand `Move`s to `Tx.move`, the only place where a run changes state. It applies the chart, and writes the runs, their
history, the events that the chart emits, the tasks that the new states need, and the coverage of the runs' own units,
each with one set-based statement. What has to be published after the commit is in `Tx.outbox`, which is bounded.

Lock order everywhere: location (the slots), backfill, coverage, run, task, event, each by id.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, CursorResult, Engine, create_engine, text
from sqlalchemy import event as sa_event
from sqlalchemy.exc import DBAPIError, OperationalError

from wfm.charts import Chart
from wfm.decide import ApprovalLimits, MoveFacts, item_hash
from wfm.errors import NotFoundError, RefusedError
from wfm.events import TYPES, Event, Message, SlotFreed
from wfm.model import FINAL_STATES, OF_DATA, Actor, FailureClass, JobRef, JobSpec, Role, RunState, TaskKind

log = logging.getLogger(__name__)

T = TypeVar("T")

_FINAL = "('" + "','".join(sorted(FINAL_STATES)) + "')"

TASK_ON_ENTRY: dict[RunState, TaskKind] = {
    RunState.STAGING_DATA: TaskKind.STAGE,
    RunState.COLLECTING_RESULTS: TaskKind.COLLECT,
    RunState.CANCELLING: TaskKind.CANCEL,
}
"""The task that a run in this state is waiting for."""

HOLDS_SLOT = frozenset({RunState.STAGING_DATA, RunState.SUBMITTED, RunState.RUNNING, RunState.CANCELLING})
"""States in which a run takes up cores and memory of its location."""

WITHDRAWN = "withdrawn"
"""`run.failure` of a CANCELLED run that gave way to newer input; it does not block its digest."""


class RunRow(Struct, frozen=True, kw_only=True):
    """A run as the roles see it: its row, and the names and rules of its step.

    `pipeline_name` and `step_name` are those of when it was made, of which its directories are called; `pipeline` and
    `step` are those of today.
    """

    id: int
    location_id: int
    pipeline_id: int
    pipeline: str
    step_id: int
    step: str
    pipeline_name: str
    step_name: str
    unit_id: int
    unit: str
    generation: int
    wanted: str
    result: int
    state: RunState
    version: int
    chart_version: int
    attempt: int
    failures: int
    max_retries: int
    priority: int
    backfill_id: int | None = None
    probe_of: int | None = None
    seconds_in_state: float
    waiting_for: str
    job: JobSpec | None
    backend: str
    handle: str
    failure: str
    message: str
    exit_code: int | None
    wall_seconds: float | None
    cpu_hours: float | None
    peak_memory_gb: float | None
    node: str
    evidence: dict[str, Any]

    @property
    def ref(self) -> JobRef:
        """The run's job as a backend knows it."""
        if self.job is None:
            raise NotFoundError(f"run {self.id} has no job: it is {self.state}")
        return JobRef(name=self.job.name, directory=self.job.directory, handle=self.handle)


class Move(Struct, frozen=True):
    """A wish to move one locked run.

    Attributes:
        run: as locked. trigger: of the chart. actor: who and why. facts: for the chart's guards.
        sets: new values of other columns of the run; with `chart_version`, the move is already one of that chart.
        due_in: seconds until it is due in its new state.
    """

    run: RunRow
    trigger: str
    actor: Actor
    facts: MoveFacts = MoveFacts()
    sets: Mapping[str, Any] = {}
    due_in: float | None = None


class TaskRow(Struct, frozen=True, kw_only=True):
    """A leased task. `epoch` is the fencing token: only its holder may write the outcome."""

    id: int
    kind: str
    run_id: int | None
    attempt: int
    epoch: int
    tries: int
    payload: dict[str, Any]

    @property
    def lease(self) -> tuple[int, int]:
        """What tells this lease from others of the same task, also in the same hands."""
        return self.id, self.epoch


class TaskEnd(Struct, frozen=True):
    """How a lease ends. `state` is done, failed or ready (again, in `due_in` seconds)."""

    task: TaskRow
    state: str
    error: str = ""
    due_in: float = 0.0
    tries: int | None = None


_RUN_SELECT = """
SELECT r.id, r.location_id, r.pipeline_id, p.name AS pipeline, r.step_id, s.name AS step,
       r.unit_id, u.key AS unit, r.generation, r.wanted, r.result::text AS result, r.state, r.version, r.chart_version,
       r.pipeline_name, r.step_name, r.attempt, r.failures, s.max_retries, r.priority, r.backfill_id, r.probe_of,
       extract(epoch FROM now() - r.state_since)::float AS seconds_in_state, r.waiting_for, r.job, r.backend,
       r.handle, r.failure, r.message, r.exit_code, r.wall_seconds, r.cpu_hours, r.peak_memory_gb, r.node, r.evidence
FROM run r JOIN reduction_step s ON s.id = r.step_id JOIN pipeline p ON p.id = r.pipeline_id
     JOIN unit u ON u.id = r.unit_id
"""

# The columns a move may set, with their SQL types: written back whole, since the row is locked and loaded.
_RUN_SETS = {
    "chart_version": "int",
    "attempt": "int",
    "failures": "int",
    "priority": "int",
    "backfill_id": "bigint",
    "waiting_for": "text",
    "job": "jsonb",
    "backend": "text",
    "handle": "text",
    "failure": "text",
    "message": "text",
    "exit_code": "int",
    "wall_seconds": "float8",
    "cpu_hours": "float8",
    "peak_memory_gb": "float8",
    "node": "text",
    "evidence": "jsonb",
}


_sql = lru_cache(maxsize=512)(text)
"""Statements are constants: each is parsed once."""

_PARAMETER = re.compile(r"(?<![:\w]):(\w+)(?!:)")


class Prepared:
    """A statement that looks rows up by key; within `Tx.by_key`, Postgres plans it once for each connection.

    Args:
        name: of its own. sql: a constant, with ``:parameters`` whose types Postgres can tell.
    """

    def __init__(self, name: str, sql: str) -> None:
        self.name = name
        self.sql = sql
        self._parameters = list(dict.fromkeys(_PARAMETER.findall(sql)))
        self._execute = f"EXECUTE {name}({', '.join(f'%({p})s' for p in self._parameters)})"

    def __call__(self, conn: Connection, params: Mapping[str, Any]) -> CursorResult[Any]:
        """Have it executed, and planned if this connection does not know it yet."""
        known: set[str] = conn.info.setdefault("prepared", set())
        if self.name not in known:
            numbers = {p: f"${i}" for i, p in enumerate(self._parameters, 1)}
            numbered = _PARAMETER.sub(lambda found: numbers[found[1]], self.sql)
            conn.exec_driver_sql(f"PREPARE {self.name} AS {numbered}", execution_options={"no_parameters": True})
            known.add(self.name)
        return conn.exec_driver_sql(self._execute, dict(params))


def encode(value: object) -> str:
    """JSON text of rows for ``jsonb_to_recordset``."""
    return msgspec.json.encode(value).decode()


class Tx:
    """One transaction. Everything in it commits together or not at all."""

    def __init__(
        self,
        conn: Connection,
        charts: Mapping[int, Chart],
        republish_seconds: float,
        outbox_most: int = 10_000,
        approval: ApprovalLimits = ApprovalLimits(),  # noqa: B008 - immutable
    ) -> None:
        self.conn = conn
        self.charts = charts
        self.chart = charts[max(charts)]
        self.republish_seconds = republish_seconds
        self.outbox_most = outbox_most
        self.approval = approval
        self.outbox: list[Message] = []
        self._published: Counter[str] = Counter()
        self._by_key = False

    def chart_of(self, run: RunRow) -> Chart:
        """The chart that a run's present attempt began with; used versions stay loadable."""
        return self.charts[run.chart_version]

    def all(self, sql: str | Prepared, **params: Any) -> Sequence[Any]:
        """All rows of a statement."""
        return self._execute(sql, params).all()

    def run(self, sql: str | Prepared, **params: Any) -> int:
        """The number of rows a statement changed."""
        return self._execute(sql, params).rowcount

    def _execute(self, sql: str | Prepared, params: Mapping[str, Any]) -> CursorResult[Any]:
        if isinstance(sql, str):
            return self.conn.execute(_sql(sql), params)
        return sql(self.conn, params) if self._by_key else self.conn.execute(_sql(sql.sql), params)

    @contextmanager
    def by_key(self, by_key: bool = True) -> Iterator[None]:
        """Within it, joins are made in the order written, row by row from their indexes, and plans are kept.

        For statements of which each join is a look-up by key. Whatever the planner knows of the tables, it is not
        asked: in the transaction of a flood it knows nothing, and what it planned for empty tables would be kept.

        Args:
            by_key: False for a part in which the planner is asked after all.
        """
        before = self._by_key
        self._plan(by_key)
        try:
            yield
        except BaseException:
            self._by_key = before  # whatever it rolls back, the transaction or to a savepoint, takes the settings along
            raise
        self._plan(before)

    def _plan(self, by_key: bool) -> None:
        if by_key == self._by_key:
            return
        value = "off" if by_key else "DEFAULT"
        self.run(
            f"SET LOCAL join_collapse_limit TO {1 if by_key else 'DEFAULT'}; SET LOCAL enable_seqscan TO {value};"
            f" SET LOCAL enable_hashjoin TO {value}; SET LOCAL enable_mergejoin TO {value}"
        )
        self._by_key = by_key

    # --- runs ---

    def lock_runs(self, ids: Sequence[int], *, coverage: bool = True) -> dict[int, RunRow]:
        """Lock runs (and the coverage of their units first, unless no move will end a run) and load them."""
        if not ids:
            return {}
        ids = sorted(set(ids))
        if coverage:
            self.run(
                "SELECT 1 FROM coverage c JOIN run r ON (r.step_id, r.unit_id) = (c.step_id, c.unit_id)"
                " WHERE r.id = ANY(:ids) ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c",
                ids=ids,
            )
        return self._load_runs("WHERE r.id = ANY(:ids) ORDER BY r.id FOR NO KEY UPDATE OF r", ids=ids)

    def find_runs(self, where: str, *, limit: int = 1000, **params: Any) -> dict[int, RunRow]:
        """Load runs without a lock, in the order of their ids."""
        return self._load_runs(f"WHERE {where} ORDER BY r.id LIMIT {limit:d}", **params)

    def _load_runs(self, clause: str, **params: Any) -> dict[int, RunRow]:
        rows = self.conn.execute(_sql(_RUN_SELECT + clause), params).mappings()
        return {row["id"]: msgspec.convert(dict(row), RunRow, strict=False) for row in rows}

    def move(self, moves: Sequence[Move]) -> tuple[dict[int, RunRow], dict[int, RefusedError]]:
        """Move runs through the chart.

        A move that the chart refuses (a late or doubled message, say) is left out and reported; the others go on.

        Returns:
            the runs as they are now, and the refusals, both by id.
        """
        moved: dict[int, RunRow] = {}
        refused: dict[int, RefusedError] = {}
        rows: list[dict[str, Any]] = []
        freed: set[int] = set()
        for m in moves:
            before = m.run
            try:
                chart = self.charts[m.sets.get("chart_version", before.chart_version)]
                dest = RunState(chart.advance(before.state, m.trigger, m.facts))
            except RefusedError as e:
                refused[before.id] = e
                continue
            sets = {"waiting_for": "", **m.sets}
            if dest in FINAL_STATES:
                sets["waiting_for"] = ""
            after = msgspec.structs.replace(before, state=dest, version=before.version + 1, **sets)
            moved[before.id] = after
            if before.state in HOLDS_SLOT and dest not in HOLDS_SLOT:
                freed.add(before.location_id)
            rows.append(
                {
                    **{name: getattr(after, name) for name in _RUN_SETS},
                    "id": after.id,
                    "expected": before.version,
                    "state": dest,
                    "due_in": m.due_in,
                    "look_in": chart.states[dest].look_again_after,
                    "trigger": m.trigger,
                    "source": before.state,
                    "actor": m.actor.name,
                    "reason": m.actor.reason,
                }
            )
        if rows:
            self._write_moves(rows, moved)
        for _ in freed:
            self.hint(SlotFreed(), Role.WORKFLOW_MANAGER)
        return moved, refused

    def _write_moves(self, rows: list[dict[str, Any]], moved: Mapping[int, RunRow]) -> None:
        assignments = ", ".join(f"{name} = m.{name}" for name in _RUN_SETS)
        columns = ", ".join(f"{name} {kind}" for name, kind in _RUN_SETS.items())
        text_rows = encode(rows)
        written = self.run(
            f"""
            UPDATE run r SET state = m.state, version = m.expected + 1, {assignments},
                due_at = CASE WHEN m.state NOT IN {_FINAL} THEN now() + m.due_in * interval '1 s' END,
                look_again_at = now() + m.look_in * interval '1 s',
                state_since = now(),
                submitted_at = CASE m.state WHEN 'PENDING' THEN NULL WHEN 'SUBMITTED' THEN now() ELSE submitted_at END,
                started_at = CASE WHEN m.state = 'PENDING' THEN NULL WHEN m.state = 'RUNNING' THEN now()
                    WHEN m.state = 'COLLECTING_RESULTS' THEN coalesce(r.started_at, r.submitted_at)
                    ELSE started_at END,
                finished_at = CASE WHEN m.state IN {_FINAL} THEN now() END
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS m(id bigint, expected int, state text, due_in float8, look_in float8, {columns})
            WHERE r.id = m.id AND r.version = m.expected
            """,
            rows=text_rows,
        )
        if written != len(rows):
            raise RefusedError(f"{len(rows) - written} of {len(rows)} runs moved under a lock that should hold them")
        self._write_history(text_rows)
        self._write_tasks(moved)
        turns = {r["id"] for r in rows if FINAL_STATES & {r["source"], r["state"]} or r["state"] == RunState.PENDING}
        self._write_coverage([r for i, r in moved.items() if i in turns])
        self.emit_entries(moved.values(), {r["id"]: Actor(r["actor"], r["reason"]) for r in rows})

    def _write_history(self, rows: str) -> None:
        self.run(
            """
            INSERT INTO transition (run_id, version, attempt, trigger, source, dest, chart_version, actor, reason,
                failure, exit_code)
            SELECT id, expected + 1, attempt, trigger, source, state, chart_version, actor, reason,
                CASE trigger WHEN 'fail' THEN failure ELSE '' END, CASE trigger WHEN 'fail' THEN exit_code END
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS m(id bigint, expected int, attempt int, trigger text,
                source text, state text, chart_version int, actor text, reason text, failure text, exit_code int)
            """,
            rows=rows,
        )

    def _write_tasks(self, moved: Mapping[int, RunRow]) -> None:
        """Close what the runs no longer wait for, open what they wait for now. A closed lease is fenced off."""
        self.run(
            """
            UPDATE task SET state = 'closed', lease_until = NULL, finished_at = now()
            WHERE run_id = ANY(:ids) AND state IN ('ready', 'leased') AND kind <> 'purge'
            """,
            ids=[r.id for r in moved.values() if r.state not in (RunState.SUBMITTED, RunState.RUNNING)],
        )
        self.open_tasks({r.id: kind for r in moved.values() if (kind := TASK_ON_ENTRY.get(r.state))}, moved)

    def open_tasks(self, kinds: Mapping[int, str], runs: Mapping[int, RunRow]) -> None:
        """Make one task per run ready, unless the same task of the same attempt exists and is open or done."""
        if not kinds:
            return
        rows = [
            {"run": i, "kind": k, "attempt": runs[i].attempt, "loc": runs[i].location_id, "priority": runs[i].priority}
            for i, k in kinds.items()
        ]
        self.run(
            """
            INSERT INTO task (location_id, kind, run_id, attempt, priority)
            SELECT loc, kind, run, attempt, priority FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS t(loc bigint, kind text, run bigint, attempt int, priority int)
            ON CONFLICT (kind, run_id, attempt) WHERE run_id IS NOT NULL DO UPDATE
            SET state = 'ready', tries = 0, due_at = now(), finished_at = NULL, epoch = task.epoch + 1
            WHERE task.state IN ('closed', 'failed')
            """,
            rows=encode(rows),
        )

    def _write_coverage(self, runs: Sequence[RunRow]) -> None:
        """What the end (or the new beginning) of a run means for its unit. Gaps are decided elsewhere."""
        rows = []
        for r in runs:
            if r.probe_of is not None:
                going = r.state not in FINAL_STATES
                said = f"run {r.id}" if going else f"run {r.id} is {r.state}: what follows is decided next"
                state, why, reason = (
                    "active" if going else "waiting",
                    "bisecting",
                    f"{said}; it examines run {r.probe_of}",
                )
            elif r.state is RunState.COMPLETED:
                state, why, reason = "covered", "covered", f"run {r.id}"
            elif r.state not in FINAL_STATES:
                state, why, reason = "active", "run", f"run {r.id}"
            elif r.state is RunState.FAILED:
                state, why, reason = "blocked", "failed", f"run {r.id}: {r.message}"
            elif r.failure == WITHDRAWN:
                state, why, reason = "waiting", "newer_input", f"run {r.id} was withdrawn: {r.message}"
            else:
                state, why, reason = "blocked", "cancelled", f"run {r.id}: {r.message}"
            # Who asked for it asks for the next one; nobody asked for a probe.
            again = r.failure == WITHDRAWN and r.state is RunState.CANCELLED and r.probe_of is None
            rows.append({"id": r.id, "state": state, "why": why, "reason": reason, "again": again})
        if not rows:
            return
        self.run(
            """
            UPDATE coverage c SET updated_at = now(), due_at = NULL,
                state = CASE WHEN m.state = 'covered' AND c.wanted <> r.wanted THEN 'waiting' ELSE m.state END,
                why = CASE WHEN m.state = 'covered' AND c.wanted <> r.wanted THEN 'newer_input' ELSE m.why END,
                reason = m.reason, requested = c.requested OR m.again,
                run_id = CASE WHEN m.state = 'covered' THEN r.id ELSE c.run_id END,
                result = CASE WHEN m.state = 'covered' THEN r.result ELSE c.result END,
                -- What it was made for is what covers it. Any other end is for the gap engine to look at.
                basis = CASE WHEN m.state = 'covered' AND c.wanted = r.wanted THEN c.basis END
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS m(id bigint, state text, why text, reason text, again boolean) JOIN run r ON r.id = m.id
            WHERE (c.step_id, c.unit_id) = (r.step_id, r.unit_id)
            """,
            rows=encode(rows),
        )

    def create_runs(self, rows: Sequence[Mapping[str, Any]], actor: Actor) -> dict[tuple[int, int], int]:
        """Turn gaps into runs; where a (step, unit) has an active run already, nothing happens.

        One that takes up the digest of a withdrawn run goes on counting its failures: inputs that go back and forth
        make no endless retries.

        Args:
            rows: step_id, unit_id, pipeline_id, location_id, generation, wanted, result, software_version_id,
                config_revision_id, priority, cpu, memory_gb; backfill_id where it is of one;
                missing: scheduled observations that it does not wait for; subset, where it does not read all;
                probe_of and probe, where it examines the failure of another.

        Returns:
            by (step, unit), the ids of the runs made.
        """
        if not rows:
            return {}
        made = self.all(
            """
            INSERT INTO run (location_id, pipeline_id, step_id, unit_id, generation, wanted, result,
                software_version_id, config_revision_id, priority, backfill_id, cpu, memory_gb, missing, subset,
                probe_of, probe, state, chart_version, look_again_at, failures, pipeline_name, step_name)
            SELECT location_id, pipeline_id, step_id, unit_id, generation, wanted, result, software_version_id,
                config_revision_id, priority, backfill_id, cpu, memory_gb, coalesce(missing, '[]'), subset,
                probe_of, probe, :initial, :chart,
                now() + :look * interval '1 s',
                coalesce((SELECT CASE o.failure WHEN :withdrawn THEN o.failures END FROM run o
                    WHERE (o.step_id, o.unit_id, o.wanted) = (g.step_id, g.unit_id, g.wanted) AND o.probe_of IS NULL
                        AND g.probe_of IS NULL
                    ORDER BY o.id DESC LIMIT 1), 0), pipeline_name, step_name
            FROM (SELECT g.*, p.name AS pipeline_name, s.name AS step_name
                FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS g(location_id bigint, pipeline_id bigint,
                step_id bigint, unit_id bigint, generation bigint, wanted text, result numeric,
                software_version_id bigint, config_revision_id bigint, priority int, backfill_id bigint, cpu float8,
                memory_gb float8, missing jsonb, subset jsonb, probe_of bigint, probe jsonb)
                JOIN pipeline p ON p.id = g.pipeline_id AND p.deleted_at IS NULL
                JOIN reduction_step s ON s.id = g.step_id FOR SHARE OF p) g
            ON CONFLICT DO NOTHING RETURNING id, step_id, unit_id
            """,
            rows=encode(rows),
            initial=self.chart.initial,
            withdrawn=WITHDRAWN,
            chart=self.chart.version,
            look=self.chart.states[self.chart.initial].look_again_after,
        )
        ids = [m.id for m in made]
        if ids:
            self.run(
                """
                INSERT INTO transition (run_id, version, attempt, trigger, dest, chart_version, actor, reason)
                SELECT unnest(CAST(:ids AS bigint[])), 1, 1, 'create', :initial, :chart, :actor, :reason
                """,
                ids=ids,
                initial=self.chart.initial,
                chart=self.chart.version,
                actor=actor.name,
                reason=actor.reason,
            )
            runs = self.find_runs("r.id = ANY(:ids)", limit=len(ids), ids=ids)
            self.emit_entries(runs.values(), dict.fromkeys(ids, actor))
        return {(m.step_id, m.unit_id): m.id for m in made}

    # --- the ledger ---

    def emit_entries(self, runs: Iterable[RunRow], actors: Mapping[int, Actor]) -> None:
        """Write the events that the chart emits on entering the runs' states, one row for each recipient."""
        self._write_events(
            [
                {
                    "loc": r.location_id,
                    "type": emit.event,
                    "recipient": emit.to or "",
                    "body": {"type": emit.event, **_body(r)},
                    "run": r.id,
                    "version": r.version,
                    "actor": actors[r.id].name,
                    "reason": actors[r.id].reason,
                }
                for r in runs
                for emit in self.chart_of(r).states[r.state].emits
            ]
        )

    def emit(self, location_id: int, event: Event, recipient: str, actor: Actor) -> None:
        """Write one event that no chart emits."""
        body = msgspec.to_builtins(event)
        self._write_events(
            [
                {
                    "loc": location_id,
                    "type": body["type"],
                    "recipient": recipient,
                    "body": body,
                    "actor": actor.name,
                    "reason": actor.reason,
                }
            ]
        )

    def _write_events(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._publish(insert_events(self.conn, rows, self.republish_seconds))

    def _publish(self, rows: Iterable[Any]) -> None:
        """Put ledger rows into the outbox: of each type no more than a stream holds. The relay publishes the rest."""
        for row in rows:
            self._published[row.type] += 1
            if self._published[row.type] <= self.outbox_most:
                self.outbox.append(message(row))

    def load_events(self, ids: Sequence[int]) -> None:
        """Put ledger rows that other statements wrote in this transaction into the outbox."""
        if ids:
            self._publish(
                self.all(
                    """
                    SELECT id, type, recipient, body, created_at, actor, reason
                    FROM (SELECT *, row_number() OVER (PARTITION BY type ORDER BY id) AS n FROM event
                        WHERE id = ANY(:ids)) e
                    WHERE n <= :most ORDER BY id
                    """,
                    ids=list(ids),
                    most=self.outbox_most,
                )
            )

    def hint(self, event: Event, recipient: str) -> None:
        """Wake a role after the commit. There is no ledger row: a lost hint costs one sweep interval."""
        body = msgspec.json.encode(event)
        self.outbox.append(Message(str(event.__struct_config__.tag), recipient, body))

    def mark_done(self, event_ids: Sequence[int]) -> set[int]:
        """Mark events as handled by this transaction; returns those that were not handled before."""
        if not event_ids:
            return set()
        rows = self.all(
            "UPDATE event SET done_at = now() WHERE id = ANY(:ids) AND done_at IS NULL RETURNING id",
            ids=sorted(event_ids),
        )
        return {r.id for r in rows}

    def due_events(self, location_id: int, room: Mapping[str, int]) -> None:
        """Put events that were pending too long into the outbox, and back off their next turn.

        Args:
            room: by type, how many; the others wait.
        """
        room = {kind: n for kind, n in room.items() if n > 0}
        rows = self.all(
            """
            WITH due AS MATERIALIZED (
                SELECT e.id FROM unnest(CAST(:types AS text[]), CAST(:counts AS int[])) AS k(type, n)
                CROSS JOIN LATERAL (
                    SELECT id FROM event WHERE location_id = :loc AND type = k.type AND done_at IS NULL
                        AND publish_at <= now()
                    ORDER BY publish_at LIMIT k.n FOR UPDATE SKIP LOCKED) e)
            UPDATE event e SET publishes = publishes + 1,
                publish_at = now() + :later * least(2 ^ publishes, 32) * interval '1 s'
            FROM due WHERE e.id = due.id
            RETURNING e.id, e.type, e.recipient, e.body, e.created_at, e.actor, e.reason
            """,
            loc=location_id,
            types=list(room),
            counts=list(room.values()),
            later=self.republish_seconds,
        )
        self._publish(sorted(rows, key=lambda r: r.id))

    def republish_all(self, location_id: int) -> int:
        """Redis was emptied: everything pending is due now."""
        return self.run(
            "UPDATE event SET publish_at = now() WHERE location_id = :loc AND done_at IS NULL AND publish_at > now()",
            loc=location_id,
        )

    # --- tasks ---

    def claim_tasks(self, location_id: int, free: Mapping[str, int], owner: str, lease: float) -> list[TaskRow]:
        """Lease ready tasks and tasks whose lease ran out, by kind, most important first."""
        wanted = {kind: n for kind, n in free.items() if n > 0}
        if not wanted:
            return []
        rows = self.conn.execute(
            _sql(
                """
                WITH picked AS MATERIALIZED (
                    SELECT t.id FROM unnest(CAST(:kinds AS text[]), CAST(:counts AS int[])) AS k(kind, n)
                    CROSS JOIN LATERAL (
                        SELECT id FROM task WHERE location_id = :loc AND kind = k.kind AND state IN ('ready', 'leased')
                            AND CASE state WHEN 'ready' THEN due_at <= now() ELSE lease_until < now() END
                        ORDER BY priority DESC, id LIMIT k.n FOR UPDATE SKIP LOCKED) t)
                UPDATE task SET tries = tries + (state = 'leased')::int, state = 'leased', owner = :owner,
                    epoch = epoch + 1, lease_until = now() + :lease * interval '1 s'
                FROM picked WHERE task.id = picked.id
                RETURNING task.id, kind, run_id, attempt, epoch, tries, payload
                """
            ),
            {
                "kinds": list(wanted),
                "counts": list(wanted.values()),
                "loc": location_id,
                "owner": owner,
                "lease": lease,
            },
        ).mappings()
        return sorted((msgspec.convert(dict(r), TaskRow) for r in rows), key=lambda t: t.id)

    def end_tasks(self, ends: Sequence[TaskEnd]) -> set[tuple[int, int]]:
        """Write how leases ended. Only the holder of the current epoch is heard.

        Returns:
            (id, epoch) of the leases whose word counts; the others were fenced off.
        """
        if not ends:
            return set()
        rows = self.all(
            """
            UPDATE task t SET state = e.state, error = e.error, lease_until = NULL,
                tries = coalesce(e.tries, t.tries),
                due_at = CASE e.state WHEN 'ready' THEN now() + e.due_in * interval '1 s' ELSE t.due_at END,
                finished_at = CASE e.state WHEN 'ready' THEN NULL ELSE now() END
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS e(id bigint, epoch int, state text, error text, due_in float8, tries int)
            WHERE t.id = e.id AND t.epoch = e.epoch AND t.state = 'leased'
            RETURNING t.id, t.epoch
            """,
            rows=encode(
                [
                    {
                        "id": e.task.id,
                        "epoch": e.task.epoch,
                        "state": e.state,
                        "error": e.error,
                        "due_in": e.due_in,
                        "tries": e.tries,
                    }
                    for e in sorted(ends, key=lambda e: e.task.id)
                ]
            ),
        )
        return {(r.id, r.epoch) for r in rows}

    def renew_leases(self, tasks: Sequence[TaskRow], lease: float) -> set[int]:
        """Prolong leases; returns the ids that are still ours."""
        rows = self.all(
            """
            UPDATE task t SET lease_until = now() + :lease * interval '1 s'
            FROM unnest(CAST(:ids AS bigint[]), CAST(:epochs AS int[])) AS h(id, epoch)
            WHERE t.id = h.id AND t.epoch = h.epoch AND t.state = 'leased' RETURNING t.id
            """,
            ids=[t.id for t in tasks],
            epochs=[t.epoch for t in tasks],
            lease=lease,
        )
        return {r.id for r in rows}

    # --- poison ---

    def bury(
        self, location_id: int, stream: str, entry_id: str, body: bytes, reason: str, event_id: int | None
    ) -> None:
        """Keep a message that cannot be handled, with its bytes and its reason."""
        self.run(
            """
            INSERT INTO dead_letter (location_id, stream, entry_id, body, reason, event_id)
            VALUES (:loc, :stream, :entry, :body, :reason, :event) ON CONFLICT (stream, entry_id) DO NOTHING
            """,
            loc=location_id,
            stream=stream,
            entry=entry_id,
            body=body,
            reason=reason,
            event=event_id,
        )

    def count_failure(self, event_id: int, backoff: float) -> int:
        """Note that handling an event failed; it comes again after the back-off. Returns how often it has failed."""
        rows = self.all(
            """
            UPDATE event SET failures = failures + 1, publish_at = now() + :wait * interval '1 s'
            WHERE id = :id AND done_at IS NULL RETURNING failures
            """,
            id=event_id,
            wait=backoff,
        )
        return int(rows[0].failures) if rows else 0


def insert_events(conn: Connection, rows: Sequence[Mapping[str, Any]], republish_seconds: float) -> Sequence[Any]:
    """Write ledger rows (loc, type, recipient, body, actor, reason; of runs also run, version); returns them whole.

    They are not due for the relay at once: whoever writes them publishes them after the commit.
    """
    if not rows:
        return []
    return conn.execute(
        _sql(
            """
            INSERT INTO event
                (location_id, type, recipient, body, run_id, run_version, actor, reason, created_at,
                publish_at, done_at)
            SELECT loc, type, recipient, body, run, version, actor, reason, clock_timestamp(),
                now() + :later * interval '1 s',
                CASE WHEN recipient = '' THEN now() END
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS e(loc bigint, type text, recipient text, body jsonb,
                run bigint, version int, actor text, reason text)
            RETURNING id, type, recipient, body, created_at, actor, reason
            """
        ),
        {"rows": encode(rows), "later": republish_seconds},
    ).all()


def _body(r: RunRow) -> dict[str, Any]:
    names = {"pipeline": r.pipeline, "step": r.step, "unit": r.unit, "state": r.state}
    probe = {} if r.probe_of is None else {"probe_of": r.probe_of}
    return {"run": r.id, "version": r.version, "attempt": r.attempt, **names, **probe}


def message(row: Any) -> Message:
    """A row of the ledger as it travels."""
    at: datetime = row.created_at
    body = {**row.body, "id": row.id, "at": at.isoformat(), "actor": row.actor, "reason": row.reason}
    event = msgspec.convert(body, TYPES[row.type])
    return Message(row.type, row.recipient, msgspec.json.encode(event), row.id)


def result_hash(step: str, unit: str, wanted: str) -> int:
    """A run's term in the digest of the units that depend on it; `step` is the identity of its step."""
    return item_hash("result", step, unit, wanted)


def failed(run: RunRow, failure: FailureClass, message: str, actor: Actor, due_in: float, **sets: Any) -> Move:
    """The move of a run whose attempt failed; the chart decides between another attempt and the end.

    A probe is to say whether its members fail: what may lie in them is not repeated.
    """
    most = 0 if run.probe_of is not None and failure in OF_DATA else run.max_retries
    facts = MoveFacts(failure=failure, failures=run.failures, max_retries=most)
    sets |= {"failure": failure, "message": message, "failures": run.failures + 1}
    sets["waiting_for"] = f"another attempt, {due_in:.3g} s after the last one: {message}"
    return Move(run, "fail", Actor(actor.name, message), facts, sets, due_in)


_RETRIED = {"40001", "40P01"}


class Store:
    """The database of one deployment."""

    def __init__(
        self,
        url: str,
        schema: str,
        charts: Mapping[int, Chart],
        *,
        republish_seconds: float = 60.0,
        outbox_most: int = 10_000,
        approval: ApprovalLimits = ApprovalLimits(),  # noqa: B008 - immutable
    ) -> None:
        self.charts = charts
        self.republish_seconds = republish_seconds
        self.outbox_most = outbox_most
        self.approval = approval
        self.schema = schema
        self.engine = connect(url, schema)

    @contextmanager
    def begin(self) -> Iterator[Tx]:
        """A transaction: commits at the end of the block, rolls back when it raises."""
        with self.engine.begin() as conn:
            yield Tx(conn, self.charts, self.republish_seconds, self.outbox_most, self.approval)

    def retrying(self, work: Callable[[Tx], T], attempts: int = 8) -> tuple[T, list[Message]]:
        """Run ``work(tx)`` in a transaction, again when it lost a deadlock; returns (value, outbox)."""
        for left in reversed(range(attempts)):
            try:
                with self.begin() as tx:
                    value = work(tx)
                return value, tx.outbox
            except OperationalError as e:
                if getattr(e.orig, "pgcode", None) not in _RETRIED or not left:
                    raise
                time.sleep(0.01 * (attempts - left))
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


_NOTICE_SILENCE = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""s, s, times, ms: until a Postgres whose host is gone without a word is given up; the kernel alone waits for hours."""

FROZEN_SECONDS = 120
"""Who freezes in the middle of a transaction loses it, and the locks that others wait for, after this time."""


def connect(url: str, schema: str) -> Engine:
    """An engine whose connections have `schema` on their search path and run in UTC."""
    engine = create_engine(
        url,
        pool_size=4,
        max_overflow=8,
        isolation_level="READ COMMITTED",
        json_serializer=lambda v: msgspec.json.encode(v).decode(),
        json_deserializer=msgspec.json.decode,
        connect_args={"connect_timeout": 10, "application_name": "wfm", **_NOTICE_SILENCE},
    )

    @sa_event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                f"SET search_path TO \"{schema}\", pg_catalog; SET timezone TO 'UTC';"
                f"SET lock_timeout TO '30s'; SET idle_in_transaction_session_timeout TO '{FROZEN_SECONDS}s';"
                # Nearly all we ask is looked up by key, and lies in memory. In one large transaction tables grow before
                # they are analysed; with the default, each chunk would then read them whole.
                "SET random_page_cost TO 1.1;"
                # A plan that is kept (`Prepared`) is the same for all parameters; to compile one takes longer than it.
                "SET plan_cache_mode TO force_generic_plan; SET jit TO off"
            )
        connection.commit()

    return engine


def is_connection_error(error: BaseException) -> bool:
    """Whether the database is away (try again later), rather than the statement wrong."""
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "pgcode", None)
    if error.connection_invalidated or isinstance(error, OperationalError):
        return code is None or code[:2] in {"08", "53", "57", "55", "40", "25"}
    return code is not None and code[:2] in {"08", "53", "57"}
