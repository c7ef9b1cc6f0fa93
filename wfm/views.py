"""Every read that people make: set-based SQL in, frozen structs out.

A question costs a fixed number of statements, however many rows it touches. Answers become JSON through
`msgspec.to_builtins`; all times are aware and in UTC. Statements name tables without a schema, so the connection's
search path decides. A name that does not exist is a `NotFoundError` that gives the nearest one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby
from typing import Any, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Struct, structs
from sqlalchemy import Connection, exists, literal, select, text, union_all

from wfm import grouping
from wfm.charts import Chart
from wfm.errors import NotFoundError, UsageError
from wfm.events import TYPES
from wfm.model import ACTIVE_STATES, CoverageState, JobSpec, ProductType, RunState, TriggerType, VersionPolicy, Why
from wfm.store import WITHDRAWN

T = TypeVar("T", bound=Struct)


def _all(conn: Connection, sql: str, **params: Any) -> list[dict[str, Any]]:
    found = conn.execute(text(sql), params).mappings()
    return [{k: v.astimezone(UTC) if isinstance(v, datetime) else v for k, v in row.items()} for row in found]


def _rows(conn: Connection, kind: type[T], sql: str, **params: Any) -> list[T]:
    return msgspec.convert(_all(conn, sql, **params), list[kind])  # type: ignore[valid-type]


def _column(conn: Connection, sql: str, **params: Any) -> list[Any]:
    return list(conn.execute(text(sql), params).scalars())


def _asked(column: str, name: str, kind: str = "text", comparison: str = "=") -> str:
    """A condition that holds for all rows while its parameter is None."""
    return f"(CAST(:{name} AS {kind}) IS NULL OR {column} {comparison} :{name})"


def _listed(values: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{v}'" for v in sorted(values)) + ")"


_ACTIVE = _listed(ACTIVE_STATES)


# --- names ---

_PIPELINES = "SELECT name FROM pipeline"
_PIPELINES_HERE = "SELECT name FROM pipeline WHERE location_id = :loc AND deleted_at IS NULL"
_OF_PIPELINE = _asked("p.name", "pipeline")
_STEPS = f"SELECT s.name FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id WHERE {_OF_PIPELINE}"
_UNITS = f"SELECT u.key FROM unit u JOIN pipeline p ON p.id = u.pipeline_id WHERE {_OF_PIPELINE}"
_PACKAGES = "SELECT name FROM raw_data_package"
_PRODUCTS = "SELECT path FROM data_product"


def _require(conn: Connection, what: str, name: str | None, names: str, **params: Any) -> None:
    """Nothing if the statement `names` gives this name, or if none was asked for."""
    if name is None:
        return
    if not _column(conn, f"SELECT 1 FROM ({names}) n(name) WHERE name = :name LIMIT 1", name=name, **params):
        _not_found(conn, what, name, names, **params)


def _not_found(conn: Connection, what: str, name: str, names: str, **params: Any) -> NoReturn:
    # Names of about the same length are enough to look through: only such can be near.
    near = _column(
        conn,
        f"SELECT name FROM ({names}) n(name) GROUP BY name ORDER BY abs(length(name) - :length), name LIMIT 2000",
        length=len(name),
        **params,
    )
    raise NotFoundError(grouping.unknown(what, name, sorted(near)))


def _require_location(conn: Connection, location_id: int) -> None:
    known = {r["id"]: r["name"] for r in _all(conn, "SELECT id, name FROM data_location ORDER BY id")}
    if location_id not in known:
        listed = ", ".join(f"{i} ({name})" for i, name in known.items()) or "none yet"
        raise NotFoundError(f"unknown location {location_id}; known: {listed}")


def _no_run(conn: Connection, key: object) -> NoReturn:
    (newest,) = _column(conn, "SELECT max(id) FROM run")
    known = f"the newest run is {newest}" if newest else "there are no runs yet"
    raise NotFoundError(f"unknown run {key!r}; {known}")


# --- runs ---


class RunLine(Struct, frozen=True, kw_only=True):
    """A run in a list.

    Attributes:
        version: counts its transitions, from 1.
        waiting_for: why an active run does not move; empty if it does.
        failure: class of the last attempt's failure. message: the same for people.
        wall_seconds: of the last attempt that ended.
        superseded: a later run of the same step and unit is COMPLETED.
    """

    id: int
    pipeline: str
    step: str
    unit: str
    state: RunState
    attempt: int
    version: int
    waiting_for: str
    failure: str
    message: str
    created_at: datetime
    state_since: datetime
    started_at: datetime | None
    finished_at: datetime | None
    wall_seconds: float | None
    superseded: bool


class RunRef(Struct, frozen=True):
    """A run that is named beside another thing."""

    id: int
    step: str
    unit: str
    state: RunState


class ProductLine(Struct, frozen=True, kw_only=True):
    """A data product. `superseded_by` is the run with the newer result."""

    id: int
    type: ProductType
    path: str
    size: int
    checksum: str
    metrics: dict[str, Any]
    attempt: int
    superseded_by: int | None
    created_at: datetime


class TransitionLine(Struct, frozen=True, kw_only=True):
    """One applied transition of a run."""

    version: int
    attempt: int
    trigger: str
    source: str
    dest: str
    chart_version: int
    actor: str
    reason: str
    at: datetime


class TaskLine(Struct, frozen=True, kw_only=True):
    """A task of a run. `owner` holds it until `lease_until`; `epoch` counts its leases."""

    id: int
    kind: str
    attempt: int
    state: str
    tries: int
    owner: str
    epoch: int
    lease_until: datetime | None
    due_at: datetime
    error: str
    created_at: datetime
    finished_at: datetime | None


class EventLine(Struct, frozen=True, kw_only=True):
    """A row of the ledger: one event for one recipient.

    Attributes:
        recipient: a role; empty for the public stream only.
        done_at: when the recipient's own transaction marked it; None while it is pending.
        cursor: of this row, for `events(after=...)`.
    """

    id: int
    type: str
    recipient: str
    run: int | None
    run_version: int | None
    actor: str
    reason: str
    created_at: datetime
    done_at: datetime | None
    body: dict[str, Any]
    cursor: str


class RunDetail(RunLine, frozen=True, kw_only=True):
    """All about one run.

    Attributes:
        accepted: coverage of its unit rests on this run.
        generation: of the unit's members; with the unit it pins the raw inputs.
        packages: names of these members in order, the first `SHOWN` of `packages_total`.
        upstream: runs whose results it reads, the first `SHOWN` of `upstream_total`.
        wanted: digest of inputs, version and config.
        memory_gb, peak_memory_gb: in 10^9 bytes, asked for and used.
        job: what the current attempt's backend was given; None before the run was admitted.
        handle: the backend's own name of the job.
        evidence: what the verdict on the job rests on.
        products: of all its attempts.
    """

    location: str
    software: str
    software_version: str
    config: str | None
    config_revision: int | None
    parameters: dict[str, Any] | None
    accepted: bool
    generation: int
    wanted: str
    packages: list[str] = []
    packages_total: int = 0
    upstream: list[RunRef] = []
    upstream_total: int = 0
    priority: int
    cpu: float
    memory_gb: float
    failures: int
    max_retries: int
    due_at: datetime | None
    look_again_at: datetime | None
    submitted_at: datetime | None
    job: JobSpec | None
    backend: str
    handle: str
    exit_code: int | None
    cpu_hours: float | None
    peak_memory_gb: float | None
    node: str
    evidence: dict[str, Any]
    products: list[ProductLine] = []
    history: list[TransitionLine] = []
    tasks: list[TaskLine] = []
    events: list[EventLine] = []


SHOWN = 100
"""So many inputs of a run are named in its detail."""

# Ids of one unit's runs grow with the generation of their inputs; the time of completion says nothing.
_RUN_COLUMNS = """
r.id, p.name AS pipeline, s.name AS step, u.key AS unit, r.state, r.attempt, r.version, r.waiting_for, r.failure,
r.message, r.created_at, r.state_since, r.started_at, r.finished_at, r.wall_seconds,
EXISTS (SELECT 1 FROM run n WHERE (n.step_id, n.unit_id) = (r.step_id, r.unit_id) AND n.id > r.id
    AND n.state = 'COMPLETED') AS superseded
"""
_RUN_TABLES = """
run r JOIN reduction_step s ON s.id = r.step_id JOIN pipeline p ON p.id = r.pipeline_id JOIN unit u ON u.id = r.unit_id
"""
_RUN_SOFTWARE = """
JOIN software_version sv ON sv.id = r.software_version_id JOIN software sw ON sw.id = sv.software_id
LEFT JOIN config_revision cr ON cr.id = r.config_revision_id LEFT JOIN config cf ON cf.id = cr.config_id
"""
# The members m of its unit that run r pinned.
_PINNED = "m.unit_id = r.unit_id AND m.added <= r.generation AND (m.removed IS NULL OR m.removed > r.generation)"


def runs(
    conn: Connection,
    *,
    location_id: int,
    pipeline: str | None = None,
    step: str | None = None,
    unit: str | None = None,
    states: Collection[RunState] = (),
    limit: int = 50,
    since: datetime | None = None,
) -> list[RunLine]:
    """The newest runs of a location, the newest first.

    Args:
        pipeline, step, unit: names; None for all.
        states: keep only runs in one of these; empty for all.
        limit: how many at most.
        since: keep only runs that changed their state at or after this time.

    Raises:
        NotFoundError: no such location, pipeline, step or unit.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES)
    _require(conn, "step", step, _STEPS, pipeline=pipeline)
    _require(conn, "unit", unit, _UNITS, pipeline=pipeline)
    return _rows(
        conn,
        RunLine,
        f"""
        SELECT {_RUN_COLUMNS} FROM {_RUN_TABLES}
        WHERE r.location_id = :loc AND {_OF_PIPELINE} AND {_asked("s.name", "step")} AND {_asked("u.key", "unit")}
            AND (:any_state OR r.state = ANY(:states)) AND {_asked("r.state_since", "since", "timestamptz", ">=")}
        ORDER BY r.id DESC LIMIT :limit
        """,
        loc=location_id,
        pipeline=pipeline,
        step=step,
        unit=unit,
        any_state=not states,
        states=[str(s) for s in states],
        since=since,
        limit=limit,
    )


def run_detail(conn: Connection, run_id: int) -> RunDetail:
    """All about one run: inputs, job, products, history, tasks and events.

    Raises:
        NotFoundError: no such run.
    """
    found = _rows(
        conn,
        RunDetail,
        f"""
        SELECT {_RUN_COLUMNS}, l.name AS location, sw.name AS software, sv.version AS software_version,
            cf.name AS config, cr.revision AS config_revision, cr.parameters,
            EXISTS (SELECT 1 FROM coverage c WHERE (c.step_id, c.unit_id, c.run_id) = (r.step_id, r.unit_id, r.id))
                AS accepted,
            r.generation, r.wanted, r.priority, r.cpu, r.memory_gb, r.failures, s.max_retries, r.due_at,
            r.look_again_at, r.submitted_at, r.job, r.backend, r.handle, r.exit_code, r.cpu_hours, r.peak_memory_gb,
            r.node, r.evidence,
            (SELECT count(*) FROM unit_member m WHERE {_PINNED}) AS packages_total,
            (SELECT count(*) FROM run_input i WHERE i.run_id = r.id) AS upstream_total
        FROM {_RUN_TABLES} {_RUN_SOFTWARE} JOIN data_location l ON l.id = r.location_id WHERE r.id = :run
        """,
        run=run_id,
    )
    if not found:
        _no_run(conn, run_id)
    return structs.replace(
        found[0],
        packages=_column(
            conn,
            f"""
            SELECT k.name FROM run r JOIN unit_member m ON {_PINNED} JOIN raw_data_package k ON k.id = m.package_id
            WHERE r.id = :run ORDER BY k.name LIMIT :shown
            """,
            run=run_id,
            shown=SHOWN,
        ),
        upstream=_rows(
            conn,
            RunRef,
            f"""
            SELECT r.id, s.name AS step, u.key AS unit, r.state
            FROM {_RUN_TABLES} JOIN run_input i ON i.upstream_run_id = r.id
            WHERE i.run_id = :run ORDER BY s.position, u.key LIMIT :shown
            """,
            run=run_id,
            shown=SHOWN,
        ),
        products=_rows(
            conn,
            ProductLine,
            """
            SELECT id, type, path, size, checksum, metrics, attempt, superseded_by, created_at
            FROM data_product WHERE run_id = :run ORDER BY path
            """,
            run=run_id,
        ),
        history=_rows(
            conn,
            TransitionLine,
            """
            SELECT version, attempt, trigger, source, dest, chart_version, actor, reason, at
            FROM transition WHERE run_id = :run ORDER BY version
            """,
            run=run_id,
        ),
        tasks=_rows(
            conn,
            TaskLine,
            """
            SELECT id, kind, attempt, state, tries, owner, epoch, lease_until, due_at, error, created_at, finished_at
            FROM task WHERE run_id = :run ORDER BY id
            """,
            run=run_id,
        ),
        events=_rows(conn, EventLine, f"{_EVENT} WHERE e.run_id = :run ORDER BY e.txid, e.id", run=run_id),
    )


# --- why ---


class RunBrief(Struct, frozen=True, kw_only=True):
    """How a run stands."""

    id: int
    state: RunState
    attempt: int
    waiting_for: str
    failure: str
    exit_code: int | None
    message: str


class UpstreamUnit(Struct, frozen=True):
    """One unit of an upstream step, and the run that failed there."""

    step: str
    unit: str
    state: CoverageState
    why: Why
    run: int | None


class WhyLine(Struct, frozen=True, kw_only=True):
    """Why one (step, unit) is as it is, and what would change that.

    Attributes:
        accepted: the run that the present result rests on, also where newer input makes it stale.
        due_at: when the trigger-manager looks again by itself.
        active: the run on its way. failed: the last one that failed or was cancelled since the accepted one.
        upstream_total, upstream_open: units of the steps it depends on; of these, not covered.
        upstream: what holds it up, the first few: units not covered yet, or those where a failure began, which may
            lie several steps up.
        change: one sentence for people.
    """

    pipeline: str
    step: str
    unit: str
    state: CoverageState
    why: Why
    reason: str
    accepted: int | None
    due_at: datetime | None
    updated_at: datetime | None
    active: RunBrief | None
    failed: RunBrief | None
    upstream_total: int = 0
    upstream_open: int = 0
    upstream: list[UpstreamUnit] = []
    change: str = ""


CHANGE: dict[Why, str] = {
    Why.COVERED: "nothing needs to be done; new input, version or config makes it a gap again",
    Why.RUN: "{run} goes on by itself{waiting}; `wfm runs watch` follows it, `wfm runs cancel` stops it",
    Why.NEWER_INPUT: "when {run} has ended, the newer input, version or config gets a run of its own",
    Why.UPSTREAM: "all upstream units must be covered, {open} of {total} are not: {upstream}",
    Why.UPSTREAM_FAILED: "mend what stopped upstream: {upstream}",
    Why.ARRIVALS: "the trigger-manager looks at it next; if it stays so, see `wfm health trigger-manager`",
    Why.COOLDOWN: "a new run may start {due}",
    Why.NO_COPY: "bring the named packages to a location with disk storage",
    Why.NO_VERSION: "apply an active version that fits, or change the step's version policy",
    Why.MANUAL: "ask for it: `wfm trigger {pipeline}/{step} {unit}`{cron}",
    Why.PAUSED: "`wfm resume {paused}`",
    Why.DISABLED: "{enable}",
    Why.FAILED: "fix the cause, then `wfm runs retry {failed}`; or new input, version or config",
    Why.CANCELLED: "`wfm runs retry {failed}`; or new input, version or config",
    Why.EMPTY: "a raw data package that belongs to this unit",
}
"""What would change each reason; `_change` fills in the particulars."""

_FIRST = 3

# For a step s and its unit u: each step us it depends on, with the units l of us that lie in u.
_BELOW = """
JOIN step_dependency d ON d.step_id = s.id JOIN reduction_step us ON us.id = d.upstream_id
JOIN LATERAL (
    SELECT u.id, u.key WHERE us.dims = s.dims
    UNION ALL SELECT lu.id, lu.key FROM unit_edge e JOIN unit lu ON lu.id = e.lower_id
    WHERE e.upper_id = u.id AND us.dims <> s.dims AND lu.dims = us.dims AND lu.members > 0) l ON true
"""
_BRIEF = "r.id, r.state, r.attempt, r.waiting_for, r.failure, r.exit_code, r.message"
# For a row of coverage c: the run that failed or was cancelled, of the wanted digest before others.
_FAILED = f"""
SELECT {_BRIEF} FROM run r
WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.state IN ('FAILED', 'CANCELLED')
    AND r.failure <> '{WITHDRAWN}' AND (r.wanted = c.wanted OR r.id > coalesce(c.run_id, 0))
ORDER BY r.wanted = c.wanted DESC, r.id DESC LIMIT 1
"""
_PAIRS = "unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)"
_UPSTREAM_UNIT = "jsonb_build_object('step', step, 'unit', unit, 'state', state, 'why', why, 'run', run)"
_NEEDS_SOMEBODY_FIRST = [
    CoverageState.BLOCKED,
    CoverageState.HELD,
    CoverageState.WAITING,
    CoverageState.ACTIVE,
    CoverageState.COVERED,
    CoverageState.EMPTY,
]


class _Situation(WhyLine, frozen=True, kw_only=True):
    step_id: int
    unit_id: int
    step_active: bool
    pipeline_paused: bool
    step_paused: bool
    trigger: TriggerType


def why(
    conn: Connection,
    *,
    pipeline: str,
    step: str | None = None,
    unit: str | None = None,
    location_id: int,
    limit: int = 1000,
) -> list[WhyLine]:
    """The reason for the state of each (step, unit) of a pipeline, and what would change it.

    Those that need somebody come first: blocked, held, waiting, active, covered, empty; then by step and unit. Units
    that nobody has looked at yet are there too. A step that is no longer in the pipeline is shown when it is named.

    Args:
        step, unit: names; None for all.
        limit: how many at most; `coverage_summary` counts all of them.

    Raises:
        NotFoundError: no such pipeline at this location, no such step or unit in it.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    _require(conn, "step", step, _STEPS, pipeline=pipeline)
    _require(conn, "unit", unit, _UNITS, pipeline=pipeline)
    return _why(
        conn,
        f"""
        p.name = :pipeline AND (s.active OR s.name = :step)
        AND {_asked("s.name", "step")} AND {_asked("u.key", "unit")}
        """,
        limit,
        loc=location_id,
        pipeline=pipeline,
        step=step,
        unit=unit,
    )


def _why(conn: Connection, where: str, limit: int, **params: Any) -> list[WhyLine]:
    found = _rows(
        conn,
        _Situation,
        f"""
        SELECT p.name AS pipeline, s.name AS step, u.key AS unit, coalesce(c.state, 'waiting') AS state,
            coalesce(c.why, 'arrivals_not_sorted_yet') AS why,
            coalesce(c.reason, 'the unit is known, but was not looked at yet') AS reason,
            c.run_id AS accepted, c.due_at, c.updated_at,
            (SELECT to_jsonb(a) FROM (SELECT {_BRIEF} FROM run r WHERE (r.step_id, r.unit_id) = (s.id, u.id)
                AND r.state IN {_ACTIVE}) a) AS active,
            (SELECT to_jsonb(f) FROM ({_FAILED}) f) AS failed,
            s.id AS step_id, u.id AS unit_id, s.active AS step_active,
            p.paused_by <> '' AS pipeline_paused, s.paused_by <> '' AS step_paused, p.trigger_type AS trigger
        FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id
        JOIN unit u ON u.pipeline_id = p.id AND u.dims = s.dims
        LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND (u.members > 0 OR c.step_id IS NOT NULL) AND {where}
        ORDER BY array_position(CAST(:severity AS text[]), coalesce(c.state, 'waiting')), p.name, s.position, u.key
        LIMIT :limit
        """,
        severity=[str(s) for s in _NEEDS_SOMEBODY_FIRST],
        limit=limit,
        **params,
    )
    waiting = [s for s in found if s.why in (Why.UPSTREAM, Why.UPSTREAM_FAILED)]
    upstream = _upstream(conn, waiting)
    origins = _origins(conn, [s for s in waiting if s.why is Why.UPSTREAM_FAILED])
    lines = []
    for s in found:
        total, uncovered, first = upstream.get((s.step_id, s.unit_id), (0, 0, []))
        first = origins.get((s.step_id, s.unit_id), first)
        known = structs.replace(s, upstream_total=total, upstream_open=uncovered, upstream=first)
        fields = {name: getattr(known, name) for name in WhyLine.__struct_fields__}
        lines.append(WhyLine(**fields | {"change": _change(known)}))
    return lines


def _upstream(
    conn: Connection, pairs: Sequence[_Situation]
) -> dict[tuple[int, int], tuple[int, int, list[UpstreamUnit]]]:
    """By pair: units it depends on, those not covered, and the first few of these, blocked ones before others."""
    rows = _all(
        conn,
        f"""
        SELECT step_id, unit_id, count(*) AS total, count(*) FILTER (WHERE state <> 'covered') AS uncovered,
            jsonb_agg({_UPSTREAM_UNIT} ORDER BY rank) FILTER (WHERE state <> 'covered' AND rank <= :first) AS first
        FROM (
            SELECT s.id AS step_id, u.id AS unit_id, us.name AS step, l.key AS unit, f.id AS run,
                coalesce(c.state, 'waiting') AS state, coalesce(c.why, 'arrivals_not_sorted_yet') AS why,
                row_number() OVER (PARTITION BY s.id, u.id ORDER BY c.state IS NOT DISTINCT FROM 'covered',
                    c.state IS NOT DISTINCT FROM 'blocked' DESC, us.position, l.key) AS rank
            FROM {_PAIRS} JOIN reduction_step s ON s.id = q.step_id JOIN unit u ON u.id = q.unit_id {_BELOW}
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id)
            LEFT JOIN LATERAL ({_FAILED}) f ON c.state = 'blocked') z
        GROUP BY step_id, unit_id
        """,
        steps=[p.step_id for p in pairs],
        units=[p.unit_id for p in pairs],
        first=_FIRST,
    )
    return {
        (r["step_id"], r["unit_id"]): (
            r["total"],
            r["uncovered"],
            msgspec.convert(r["first"] or [], list[UpstreamUnit]),
        )
        for r in rows
    }


def _origins(conn: Connection, pairs: Sequence[_Situation]) -> dict[tuple[int, int], list[UpstreamUnit]]:
    """By pair that waits for something that failed: the first few units where that began, however far up."""
    rows = _all(
        conn,
        f"""
        WITH RECURSIVE walk(for_step, for_unit, step_id, unit_id, why) AS (
            SELECT q.step_id, q.unit_id, q.step_id, q.unit_id, 'upstream_failed' FROM {_PAIRS}
            UNION
            SELECT w.for_step, w.for_unit, us.id, l.id, c.why
            FROM walk w JOIN reduction_step s ON s.id = w.step_id JOIN unit u ON u.id = w.unit_id {_BELOW}
            JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id) AND c.state = 'blocked'
            WHERE w.why = 'upstream_failed')
        SELECT for_step, for_unit, jsonb_agg({_UPSTREAM_UNIT} ORDER BY rank) AS first
        FROM (
            SELECT w.for_step, w.for_unit, s.name AS step, u.key AS unit, c.state, c.why, f.id AS run,
                row_number() OVER (PARTITION BY w.for_step, w.for_unit ORDER BY s.position, u.key) AS rank
            FROM walk w JOIN reduction_step s ON s.id = w.step_id JOIN unit u ON u.id = w.unit_id
            JOIN coverage c ON (c.step_id, c.unit_id) = (w.step_id, w.unit_id)
            LEFT JOIN LATERAL ({_FAILED}) f ON true
            WHERE w.why <> 'upstream_failed') z
        WHERE rank <= :first GROUP BY for_step, for_unit
        """,
        steps=[p.step_id for p in pairs],
        units=[p.unit_id for p in pairs],
        first=_FIRST,
    )
    return {(r["for_step"], r["for_unit"]): msgspec.convert(r["first"], list[UpstreamUnit]) for r in rows}


def _change(s: _Situation) -> str:
    """The sentence of `CHANGE` for this situation."""
    paused = [s.pipeline] * s.pipeline_paused + [f"{s.pipeline}/{s.step}"] * s.step_paused
    upstream = [f"run {u.run} ({u.step} {u.unit})" if u.run else f"{u.step} {u.unit} ({u.why})" for u in s.upstream]
    return CHANGE[s.why].format(
        pipeline=s.pipeline,
        step=s.step,
        unit=s.unit,
        run=f"run {s.active.id}" if s.active else "its run",
        waiting=f"; it waits: {s.active.waiting_for}" if s.active and s.active.waiting_for else "",
        failed=s.failed.id if s.failed else "RUN",
        open=s.upstream_open,
        total=s.upstream_total,
        upstream=", ".join(upstream) + (", ..." if len(upstream) < s.upstream_open else "") or "none known yet",
        due=f"at {s.due_at:%Y-%m-%d %H:%M:%S} UTC" if s.due_at else "soon",
        paused="` and `wfm resume ".join(paused) or s.pipeline,
        enable=f"`wfm enable {s.pipeline}`" if s.step_active else f"apply {s.pipeline} with the step {s.step} in it",
        cron=", or wait for the next time of its cron expression" if s.trigger is TriggerType.CRON else "",
    )


class NotSelected(Struct, frozen=True):
    """A pipeline that does not work on a package, and why."""

    pipeline: str
    reason: str


class PackageWhy(Struct, frozen=True, kw_only=True):
    """What becomes of one raw data package.

    Attributes:
        state: of its registration.
        units: the (step, unit) pairs that contain it now.
        not_selected: pipelines of the location without it, each with the first rule that rejects it.
        summary: one sentence for people.
    """

    package: str
    state: str
    units: list[WhyLine]
    not_selected: list[NotSelected]
    summary: str


def why_package(conn: Connection, name: str, *, location_id: int) -> PackageWhy:
    """Which pipelines of a location work on a raw data package, how far they are, and which reject it, and why.

    Raises:
        NotFoundError: no such package or location.
    """
    _require_location(conn, location_id)
    _require(conn, "raw data package", name, _PACKAGES)
    (package,) = _all(conn, "SELECT id, state FROM raw_data_package WHERE name = :name", name=name)
    member = "SELECT unit_id FROM unit_member WHERE package_id = :package AND removed IS NULL"
    units = _why(conn, f"s.active AND u.id IN ({member})", limit=10_000, loc=location_id, package=package["id"])
    others = _all(
        conn,
        f"""
        SELECT p.name, p.enabled, g.name AS "grouping", g.rules
        FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL
            AND p.id NOT IN (SELECT pipeline_id FROM unit WHERE id IN ({member}))
        ORDER BY p.name
        """,
        loc=location_id,
        package=package["id"],
    )
    rejecting = _rejecting_rules(conn, package["id"], {p["name"]: p["rules"] for p in others})
    not_selected = []
    for p in others:
        if p["name"] in rejecting:
            reason = f"grouping {p['grouping']} rejects it: {rejecting[p['name']]}"
        else:
            reason = f"grouping {p['grouping']} selects it, but its arrival is not sorted yet"
        not_selected.append(NotSelected(p["name"], reason if p["enabled"] else f"{reason}; the pipeline is disabled"))
    containing = sorted({u.pipeline for u in units})
    if containing:
        summary = f"{len(units)} (step, unit) pairs of {', '.join(containing)} contain it"
    elif any(p["enabled"] and p["name"] not in rejecting for p in others):
        summary = "its arrival is not sorted yet"
    else:
        summary = "no enabled pipeline of this location selects it"
    return PackageWhy(package=name, state=package["state"], units=units, not_selected=not_selected, summary=summary)


def _rejecting_rules(conn: Connection, package: int, rules: Mapping[str, list[Any]]) -> dict[str, str]:
    """By pipeline, the first rule that does not hold for the package; nothing where all of them hold."""
    asked = [(pipeline, n, r) for pipeline, given in rules.items() for n, r in enumerate(grouping.rules_from(given), 1)]
    if not asked:
        return {}
    each = (
        select(literal(i)).where(~exists(grouping.select_packages([rule], [], package_ids=[package])))
        for i, (_, _, rule) in enumerate(asked)
    )
    rejecting: dict[str, str] = {}
    for i in sorted(conn.execute(union_all(*each)).scalars()):
        pipeline, n, rule = asked[i]
        where = f"{rule.table}.{rule.column}" + (f" at {rule.json_path}" if rule.json_path else "")
        value = msgspec.json.encode(rule.value).decode()
        rejecting.setdefault(pipeline, f"rule {n}, {where} {rule.operator} {value}")
    return rejecting


class CoverageLine(Struct, frozen=True, kw_only=True):
    """How much of a step is covered: units in all, and by coverage state (each state is there)."""

    pipeline: str
    step: str
    units: int
    states: dict[CoverageState, int]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do for any unit."""
        return self.units == self.states[CoverageState.COVERED] + self.states[CoverageState.EMPTY]


def coverage_summary(conn: Connection, location_id: int, pipeline: str | None = None) -> list[CoverageLine]:
    """Units by coverage state for each step at a location, in the order of the steps.

    A unit that was not looked at yet counts as waiting. Packages whose arrival is not sorted yet belong to no unit:
    as long as `counts` shows pending events of the trigger-manager, more units may come.

    Raises:
        NotFoundError: no such location, or no such pipeline there.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    rows = _all(
        conn,
        f"""
        SELECT p.name AS pipeline, s.name AS step, coalesce(z.states, '{{}}') AS states
        FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id
        CROSS JOIN LATERAL (
            SELECT jsonb_object_agg(state, n) AS states FROM (
                SELECT coalesce(c.state, 'waiting') AS state, count(*) AS n
                FROM unit u LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
                WHERE u.pipeline_id = p.id AND u.dims = s.dims AND (u.members > 0 OR c.step_id IS NOT NULL)
                GROUP BY 1) y) z
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active AND {_OF_PIPELINE}
        ORDER BY p.name, s.position
        """,
        loc=location_id,
        pipeline=pipeline,
    )
    lines = []
    for r in rows:
        states = dict.fromkeys(CoverageState, 0) | {CoverageState(s): n for s, n in r["states"].items()}
        lines.append(CoverageLine(pipeline=r["pipeline"], step=r["step"], units=sum(states.values()), states=states))
    return lines


# --- events ---


class EventPage(Struct, frozen=True):
    """Some events, the oldest first, and the cursor to go on from."""

    events: list[EventLine]
    cursor: str


class EventDetail(EventLine, frozen=True, kw_only=True):
    """All about one ledger row.

    Attributes:
        publish_at: when it goes out (again) if it is still pending. publishes: how often it went out again.
        failures: how often its handling failed. dead_letters: ids of messages of this event that were given up.
    """

    location: str
    publish_at: datetime
    publishes: int
    failures: int
    dead_letters: list[int]


START = "0-0"
"""The cursor before the first event."""

_EVENT_COLUMNS = """
e.id, e.type, e.recipient, e.run_id AS run, e.run_version, e.actor, e.reason, e.created_at, e.done_at, e.body,
e.txid::text || '-' || e.id AS cursor
"""
_EVENT = f"SELECT {_EVENT_COLUMNS} FROM event e"


def events(
    conn: Connection,
    *,
    location_id: int | None = None,
    run: int | None = None,
    pipeline: str | None = None,
    unit: str | None = None,
    type: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    after: str | None = None,
    newest: bool = False,
    limit: int = 100,
) -> EventPage:
    """A page of the ledger that never skips an event that is committed late.

    Rows come in the order of their transactions' ids, and only up to the oldest transaction that is still open
    anywhere on the server: a row of that one may still appear, and would lie before its successors. An open
    transaction therefore delays the page, and loses nothing.

    Args:
        run, pipeline, unit, type, location_id: what the event is about; None for all.
        since, until: bounds of the event's time, the first included, the second not.
        after: cursor of an earlier page; None for the beginning.
        newest: the last `limit` of these events instead of the first.

    Returns:
        the events, and a cursor after which the next page begins, also if this one is empty.

    Raises:
        NotFoundError: no such location, pipeline, unit or event type.
        UsageError: the cursor is none.
    """
    if location_id is not None:
        _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES)
    _require(conn, "unit", unit, _UNITS, pipeline=pipeline)
    if type is not None and type not in TYPES:
        raise NotFoundError(grouping.unknown("event type", type, TYPES))
    txid, last = _cursor(after or START)
    # Taken before the page is read, so everything below it is settled when the page is read.
    (horizon,) = _column(conn, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text")
    order = "DESC" if newest else "ASC"
    found = _rows(
        conn,
        EventLine,
        f"""
        SELECT * FROM (
            SELECT {_EVENT_COLUMNS}, e.txid FROM event e
            WHERE (e.txid, e.id) > (CAST(:txid AS xid8), :last) AND e.txid < CAST(:horizon AS xid8)
                AND {_asked("e.location_id", "loc", "bigint")} AND {_asked("e.run_id", "run", "bigint")}
                AND {_asked("e.body ->> 'pipeline'", "pipeline")} AND {_asked("e.body ->> 'unit'", "unit")}
                AND {_asked("e.type", "type")} AND {_asked("e.created_at", "since", "timestamptz", ">=")}
                AND {_asked("e.created_at", "until", "timestamptz", "<")}
            ORDER BY e.txid {order}, e.id {order} LIMIT :limit) page
        ORDER BY txid, id
        """,
        txid=txid,
        last=last,
        horizon=horizon,
        loc=location_id,
        run=run,
        pipeline=pipeline,
        unit=unit,
        type=type,
        since=since,
        until=until,
        limit=limit,
    )
    return EventPage(found, found[-1].cursor if len(found) == limit else f"{horizon}-0")


def _cursor(cursor: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\d{1,20})-(\d{1,18})", cursor, re.ASCII)
    if match is None:
        raise UsageError(f"{cursor!r} is not a cursor: expected two numbers such as 1234-56, or {START} for the start")
    return match[1], int(match[2])


def event_detail(conn: Connection, event_id: int) -> EventDetail:
    """All about one row of the ledger.

    Raises:
        NotFoundError: no such event.
    """
    found = _rows(
        conn,
        EventDetail,
        f"""
        SELECT {_EVENT_COLUMNS}, l.name AS location, e.publish_at, e.publishes, e.failures,
            ARRAY(SELECT d.id FROM dead_letter d WHERE d.event_id = e.id ORDER BY d.id) AS dead_letters
        FROM event e JOIN data_location l ON l.id = e.location_id WHERE e.id = :id
        """,
        id=event_id,
    )
    if not found:
        raise NotFoundError(f"unknown event {event_id}")
    return found[0]


DeadLetterState = Literal["open", "resent", "dropped"]


class DeadLetterLine(Struct, frozen=True, kw_only=True):
    """A message that could not be handled. `size` of its body in bytes; `event_id` of its ledger row, if known."""

    id: int
    location: str
    stream: str
    entry_id: str
    reason: str
    event_id: int | None
    state: DeadLetterState
    actor: str
    created_at: datetime
    size: int


class DeadLetter(DeadLetterLine, frozen=True, kw_only=True):
    """The same with its body: the bytes as they came, and for people as text with the undecodable escaped."""

    body: bytes
    text: str


_DEAD_LETTER = """
SELECT d.id, l.name AS location, d.stream, d.entry_id, d.reason, d.event_id, d.state, d.actor, d.created_at,
    octet_length(d.body) AS size, d.body
FROM dead_letter d JOIN data_location l ON l.id = d.location_id
"""


def dead_letters(conn: Connection, state: DeadLetterState | None = "open") -> list[DeadLetterLine]:
    """Messages that could not be handled, the newest first; None for those of every state."""
    return _rows(
        conn,
        DeadLetterLine,
        f"{_DEAD_LETTER} WHERE {_asked('d.state', 'state')} ORDER BY d.id DESC",
        state=state,
    )


def dead_letter(conn: Connection, dead_letter_id: int) -> DeadLetter:
    """One message that could not be handled, with its bytes.

    Raises:
        NotFoundError: no such dead letter.
    """
    found = _all(conn, f"{_DEAD_LETTER} WHERE d.id = :id", id=dead_letter_id)
    if not found:
        raise NotFoundError(f"unknown dead letter {dead_letter_id}")
    body = bytes(found[0]["body"])
    return DeadLetter(**found[0] | {"body": body, "text": body.decode("utf-8", "backslashreplace")})


# --- verify ---


class VerifyReport(Struct, frozen=True):
    """What replaying history gave.

    Attributes:
        runs, transitions: how many were looked at.
        faults: one line each, at most `MOST_FAULTS` of `faults_total`.
    """

    runs: int
    transitions: int
    faults: list[str]
    faults_total: int


MOST_FAULTS = 1000
"""So many faults are listed; the others are counted."""


def verify(
    conn: Connection, charts: Mapping[int, Chart], run_ids: Collection[int] | None = None, batch: int = 10_000
) -> VerifyReport:
    """Replay the history of runs through their charts and compare it with the runs as they are stored.

    Holds for every run: versions go from 1 to the run's without a gap; the first row enters the chart's initial state
    from nowhere; each next one starts where the last ended and is a move of its chart; the last one ends in the run's
    state; the attempt never decreases and ends as the run's. Runs without history and history without a run are faults.

    Everything is read in one statement, hence in one snapshot, by a server-side cursor: memory does not grow with the
    number of runs. The connection must be in a transaction.

    Args:
        charts: by version, all that history may name.
        run_ids: look at these runs only.
        batch: rows per fetch.

    Raises:
        NotFoundError: neither a run nor history has one of `run_ids`.
    """
    rows = conn.execute(
        text(
            """
            SELECT coalesce(r.id, t.run_id) AS run, r.state, r.version AS run_version, r.attempt AS run_attempt,
                t.version, t.attempt, t.trigger, t.source, t.dest, t.chart_version
            FROM (SELECT id, state, version, attempt FROM run WHERE :every OR id = ANY(:ids)) r
            FULL JOIN (SELECT * FROM transition WHERE :every OR run_id = ANY(:ids)) t ON t.run_id = r.id
            ORDER BY 1, t.version
            """
        ),
        {"every": run_ids is None, "ids": sorted(run_ids or ())},
        execution_options={"yield_per": batch},
    )
    moves = {version: {(t.trigger, t.source, t.dest) for t in chart.transitions} for version, chart in charts.items()}
    initial = {version: chart.initial for version, chart in charts.items()}
    seen = transitions = total = 0
    faults: list[str] = []
    missing = set(run_ids or ())
    for run_id, group in groupby(rows, key=lambda row: row.run):
        history = list(group)
        missing.discard(run_id)
        seen += history[0].state is not None
        transitions += sum(row.version is not None for row in history)
        for fault in _replay(history, moves, initial):
            total += 1
            if total <= MOST_FAULTS:
                faults.append(f"run {run_id}: {fault}")
    if missing:
        _no_run(conn, min(missing))
    return VerifyReport(seen, transitions, faults, total)


def _replay(
    history: Sequence[Any], moves: Mapping[int, Collection[tuple[str, str, str]]], initial: Mapping[int, str]
) -> Iterator[str]:
    """The faults of one run. Its rows carry the run's own columns too; these, or those of history, may be None."""
    run = history[0]
    if run.version is None:
        yield f"has no history, but is {run.state} at version {run.run_version}"
        return
    version, state, attempt = 0, "", 1
    for row in history:
        where = f"version {row.version}"
        if row.version != version + 1:
            yield f"{where} follows version {version}"
        elif row.source != state:
            yield f"{where} leaves {row.source or 'nowhere'}, but version {version} entered {state or 'nothing'}"
        if row.chart_version not in moves:
            yield f"{where} names chart version {row.chart_version}, which is not known"
        elif row.version == 1:
            if row.dest != initial[row.chart_version]:
                yield f"{where} enters {row.dest}, but the chart begins with {initial[row.chart_version]}"
        elif (row.trigger, row.source, row.dest) not in moves[row.chart_version]:
            yield f"{where}: chart {row.chart_version} has no move {row.source} --{row.trigger}--> {row.dest}"
        if row.attempt < attempt:
            yield f"{where} is of attempt {row.attempt}, after attempt {attempt}"
        version, state, attempt = row.version, row.dest, row.attempt
    if run.state is None:
        yield f"has {len(history)} transitions, but does not exist"
        return
    if version != run.run_version:
        yield f"is at version {run.run_version}, but its history ends with version {version}"
    if state != run.state:
        yield f"is {run.state}, but its history ends in {state}"
    if attempt != run.run_attempt:
        yield f"is in attempt {run.run_attempt}, but its history ends in attempt {attempt}"


# --- lineage ---


class LineageKind(StrEnum):
    """What lineage connects."""

    PACKAGE = "package"
    RUN = "run"
    PRODUCT = "product"


class LineageNode(Struct, frozen=True, kw_only=True):
    """A thing with what it was made from and what was made from it.

    A node that was met before in the same direction is `repeated`: it is named, but neither described nor expanded
    again. So the tree is never larger than the number of links.

    Attributes:
        id: of the package, run or product.
        label: its name. note: the most important of `details` for people.
        upstream: what it was made from. downstream: what was made from it; of the root, and below there.
    """

    kind: LineageKind
    id: int
    label: str
    note: str = ""
    details: dict[str, Any] = {}
    repeated: bool = False
    upstream: list[LineageNode] = []
    downstream: list[LineageNode] = []


_READS_RAW = "NOT EXISTS (SELECT 1 FROM run_input i WHERE i.run_id = r.id)"
_Key = tuple[LineageKind, int]


_Arrow = tuple[_Key, _Key]
"""From a thing to what was made from it."""


def lineage(conn: Connection, kind: LineageKind, key: int | str) -> LineageNode:
    """What a product, package or run was made from, and what was made from it.

    A run that read upstream runs read their INTERMEDIATE products; any other run read the raw data packages that its
    unit had in the run's generation.

    Args:
        key: the id of a run or product, the name of a package, or the path of a product: absolute, relative to its
            attempt's directory, or its last parts. Of several products the one that is not superseded is meant.

    Raises:
        NotFoundError: no such thing.
        UsageError: a path that several products have.
    """
    if kind is LineageKind.PACKAGE:
        root, seeds = _package_seeds(conn, str(key))
        up: list[int] = []
    elif kind is LineageKind.PRODUCT:
        product, run = _find_product(conn, str(key))
        root, seeds = (kind, product), [run]
        up = _closure(conn, seeds, "run_id", "upstream_run_id")
    else:
        run_id = _number(str(key))
        if run_id is None:
            _no_run(conn, key)
        root, seeds = (kind, run_id), [run_id]
        up = _closure(conn, seeds, "run_id", "upstream_run_id")
    down = _closure(conn, seeds, "upstream_run_id", "run_id")
    nodes, arrows = _load(conn, root, up, down)
    if root not in nodes:
        _no_run(conn, key)
    if kind is LineageKind.PACKAGE:
        arrows += [(root, (LineageKind.RUN, run)) for run in seeds]
    before: defaultdict[_Key, list[_Key]] = defaultdict(list)
    after: defaultdict[_Key, list[_Key]] = defaultdict(list)
    for source, target in arrows:
        before[target].append(source)
        after[source].append(target)
    upstream = _grow(root, nodes, before, "upstream").upstream
    return structs.replace(_grow(root, nodes, after, "downstream"), upstream=upstream)


def _package_seeds(conn: Connection, name: str) -> tuple[_Key, list[int]]:
    """A package, and the runs that read it themselves."""
    _require(conn, "raw data package", name, _PACKAGES)
    (package,) = _column(conn, "SELECT id FROM raw_data_package WHERE name = :name", name=name)
    runs = _column(
        conn,
        f"""
        SELECT r.id FROM unit_member m JOIN unit u ON u.id = m.unit_id
        JOIN reduction_step s ON s.pipeline_id = u.pipeline_id JOIN run r ON r.step_id = s.id AND {_PINNED}
        WHERE m.package_id = :package AND {_READS_RAW} ORDER BY r.id
        """,
        package=package,
    )
    return (LineageKind.PACKAGE, package), runs


def _find_product(conn: Connection, key: str) -> tuple[int, int]:
    """Ids of a product and its run."""
    found = _all(
        conn,
        """
        SELECT DISTINCT d.id, d.run_id, d.path, d.superseded_by IS NOT NULL AS superseded
        FROM data_product d LEFT JOIN physical_copy c ON c.product_id = d.id
        LEFT JOIN data_location l ON l.id = c.location_id
        WHERE CASE WHEN CAST(:id AS bigint) IS NOT NULL THEN d.id = :id ELSE d.path = :path
            OR right(d.path, length(:path) + 1) = '/' || :path OR c.path = :path
            OR rtrim(l.root, '/') || '/' || c.path = :path END
        ORDER BY d.id DESC
        """,
        id=_number(key),
        path=key,
    )
    if not found:
        _not_found(conn, "product", key, _PRODUCTS)
    current = [d for d in found if not d["superseded"]] or found
    if len(current) > 1:
        listed = ", ".join(f"{d['id']} ({d['path']} of run {d['run_id']})" for d in current[:5])
        more = ", ..." if len(current) > 5 else ""
        raise UsageError(f"{len(current)} products are named {key!r}; name one by its id: {listed}{more}")
    return current[0]["id"], current[0]["run_id"]


def _number(key: str) -> int | None:
    return int(key) if re.fullmatch(r"\d{1,18}", key, re.ASCII) else None


def _closure(conn: Connection, seeds: Sequence[int], along: str, to: str) -> list[int]:
    """All runs that are reached from these along run_input, themselves included; each once."""
    return _column(
        conn,
        f"""
        WITH RECURSIVE reached(id) AS (
            SELECT unnest(CAST(:seeds AS bigint[]))
            UNION SELECT i.{to} FROM reached JOIN run_input i ON i.{along} = reached.id)
        SELECT id FROM reached
        """,
        seeds=list(seeds),
    )


def _load(
    conn: Connection, root: _Key, up: Sequence[int], down: Sequence[int]
) -> tuple[dict[_Key, LineageNode], list[_Arrow]]:
    """These runs with what they read and made, in four statements.

    Arrows may come from runs that are not among these; nothing leads to such from the root.
    """
    runs = sorted({*up, *down})
    nodes: dict[_Key, LineageNode] = {}
    arrows: list[_Arrow] = []
    for r in _all(
        conn,
        f"""
        SELECT r.id, p.name AS pipeline, s.name AS step, u.key AS unit, r.state, r.attempt, r.finished_at,
            sw.name AS software, sv.version, cf.name AS config, cr.revision, cr.parameters
        FROM {_RUN_TABLES} {_RUN_SOFTWARE} WHERE r.id = ANY(:runs)
        """,
        runs=runs,
    ):
        run = (LineageKind.RUN, r.pop("id"))
        config = f", config {r['config']} revision {r['revision']}" if r["config"] else ""
        nodes[run] = LineageNode(
            kind=LineageKind.RUN,
            id=run[1],
            label=f"{r['pipeline']}/{r['step']} {r['unit']}",
            note=f"{r['state']}, {r['software']} {r['version']}{config}",
            details=r,
        )
    read: defaultdict[int, list[_Key]] = defaultdict(list)
    for d in _all(
        conn,
        """
        SELECT id, run_id AS run, type, path, size, checksum, metrics, superseded_by, created_at
        FROM data_product JOIN unnest(CAST(:runs AS bigint[])) AS w(run) ON run_id = w.run
        WHERE type = 'INTERMEDIATE' OR run_id = ANY(:down) OR id = :root ORDER BY path, id
        """,
        runs=runs,
        down=down,
        root=root[1] if root[0] is LineageKind.PRODUCT else None,
    ):
        product, run = (LineageKind.PRODUCT, d.pop("id")), (LineageKind.RUN, d["run"])
        superseded = f", superseded by run {d['superseded_by']}" if d["superseded_by"] else ""
        nodes[product] = LineageNode(
            kind=LineageKind.PRODUCT,
            id=product[1],
            label=d.pop("path"),
            note=f"{d['type']}, {d['size']} bytes{superseded}",
            details=d,
        )
        arrows.append((run, product))
        if d["type"] == ProductType.INTERMEDIATE:
            read[d["run"]].append(product)
    for i in _all(
        conn,
        """
        SELECT run_id, upstream_run_id FROM run_input WHERE run_id = ANY(:runs) ORDER BY run_id, upstream_run_id
        """,
        runs=runs,
    ):
        upstream = (LineageKind.RUN, i["upstream_run_id"])
        arrows += [(source, (LineageKind.RUN, i["run_id"])) for source in read[upstream[1]] or [upstream]]
    for k in _all(
        conn,
        f"""
        WITH needed AS (
            SELECT r.id AS run, m.package_id FROM run r JOIN unit_member m ON {_PINNED}
            WHERE r.id = ANY(:up) AND {_READS_RAW}
            UNION ALL SELECT NULL, CAST(:root AS bigint))
        SELECT n.run, k.id, k.name, k.state, k.size, e.name AS executed_obs_unit, k.registered_at
        FROM needed n JOIN raw_data_package k ON k.id = n.package_id
        JOIN executed_obs_unit e ON e.id = k.executed_obs_unit_id ORDER BY n.run, k.name
        """,
        up=up,
        root=root[1] if root[0] is LineageKind.PACKAGE else None,
    ):
        package, reader = (LineageKind.PACKAGE, k.pop("id")), k.pop("run")
        nodes[package] = LineageNode(
            kind=LineageKind.PACKAGE,
            id=package[1],
            label=k.pop("name"),
            note=f"{k['state']}, {k['size']} bytes",
            details=k,
        )
        if reader is not None:
            arrows.append((package, (LineageKind.RUN, reader)))
    return nodes, arrows


def _grow(
    root: _Key,
    nodes: Mapping[_Key, LineageNode],
    arrows: Mapping[_Key, Sequence[_Key]],
    side: Literal["upstream", "downstream"],
) -> LineageNode:
    """The tree that the arrows span from a node; as deep as the pipeline, so recursion is safe."""
    seen: set[_Key] = set()

    def grow(key: _Key) -> LineageNode:
        if key in seen:
            return structs.replace(nodes[key], repeated=True, note="", details={})
        seen.add(key)
        return structs.replace(nodes[key], **{side: [grow(k) for k in arrows.get(key, ())]})

    return grow(root)


def tree(node: LineageNode) -> str:
    """Lineage as text with lines: first what the node was made from, then what was made from it."""
    lines = [_describe(node)]
    for title, children, side in (
        ("made from", node.upstream, "upstream"),
        ("used for", node.downstream, "downstream"),
    ):
        if children:
            lines.append(title)
            lines += _branches(children, side, "")
    return "\n".join(lines) + "\n"


def _branches(nodes: Sequence[LineageNode], side: str, indent: str) -> Iterator[str]:
    for n, node in enumerate(nodes, 1):
        last = n == len(nodes)
        yield f"{indent}{'└─' if last else '├─'} {_describe(node)}"
        yield from _branches(getattr(node, side), side, indent + ("   " if last else "│  "))


def _describe(node: LineageNode) -> str:
    note = "see above" if node.repeated else node.note
    return _name(node) + (f" ({note})" if note else "")


def _name(node: LineageNode) -> str:
    return f"run {node.id} {node.label}" if node.kind is LineageKind.RUN else f"{node.kind} {node.label}"


_MERMAID_SHAPES = {
    LineageKind.PACKAGE: '[("{}")]',
    LineageKind.RUN: '["{}"]',
    LineageKind.PRODUCT: '(["{}"])',
}


def mermaid(node: LineageNode) -> str:
    """Lineage as a Mermaid flowchart in the direction of the data; each node and each arrow once."""
    shapes: dict[str, str] = {}
    arrows: dict[tuple[str, str], None] = {}

    def draw(n: LineageNode) -> str:
        name = f"{n.kind}{n.id}"
        label = re.sub(r"[^\w ,.()/@:-]", lambda match: f"#{ord(match[0])};", _name(n))
        shapes.setdefault(name, name + _MERMAID_SHAPES[n.kind].format(label))
        for source in n.upstream:
            arrows[draw(source), name] = None
        for target in n.downstream:
            arrows[name, draw(target)] = None
        return name

    root = draw(node)
    links = (f"{source} --> {target}" for source, target in arrows)
    return "\n    ".join(["flowchart LR", *shapes.values(), *links, f"style {root} stroke-width:3px"]) + "\n"


# --- lists ---


class StepLine(Struct, frozen=True, kw_only=True):
    """A step of a pipeline. `version` is the one that `version_policy` speaks of; `config` None for none."""

    name: str
    description: str
    depends_on: list[str]
    group_by: list[str]
    software: str
    version_policy: VersionPolicy
    version: str
    config: str | None
    final: bool
    paused_by: str
    paused_reason: str


class PipelineLine(Struct, frozen=True, kw_only=True):
    """A pipeline with its steps in topological order. `paused_by` is empty if it is not paused."""

    name: str
    description: str
    grouping: str
    trigger_type: TriggerType
    trigger_config: dict[str, Any]
    enabled: bool
    paused_by: str
    paused_reason: str
    priority: int
    steps: list[StepLine]


def pipelines(conn: Connection, location_id: int) -> list[PipelineLine]:
    """The pipelines of a location by name.

    Raises:
        NotFoundError: no such location.
    """
    _require_location(conn, location_id)
    return _rows(
        conn,
        PipelineLine,
        """
        SELECT p.name, p.description, g.name AS "grouping", p.trigger_type, p.trigger_config, p.enabled, p.paused_by,
            p.paused_reason, p.priority, coalesce(z.steps, '[]') AS steps
        FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id
        CROSS JOIN LATERAL (
            SELECT jsonb_agg(to_jsonb(y) ORDER BY y.position) AS steps FROM (
                SELECT s.position, s.name, s.description, s.group_by, sw.name AS software, s.version_policy, s.version,
                    cf.name AS config, s.final, s.paused_by, s.paused_reason,
                    ARRAY(SELECT us.name FROM step_dependency d JOIN reduction_step us ON us.id = d.upstream_id
                        WHERE d.step_id = s.id ORDER BY us.position) AS depends_on
                FROM reduction_step s JOIN software sw ON sw.id = s.software_id
                LEFT JOIN config cf ON cf.id = s.config_id
                WHERE s.pipeline_id = p.id AND s.active) y) z
        WHERE p.location_id = :loc AND p.deleted_at IS NULL ORDER BY p.name
        """,
        loc=location_id,
    )


class PackageLine(Struct, frozen=True, kw_only=True):
    """A raw data package. `size` in bytes, `files` counted; `copies` by location: the status of what lies there."""

    id: int
    name: str
    state: str
    size: int
    files: int
    executed_obs_unit: str
    instrument_module: str
    registered_at: datetime
    copies: dict[str, str]


def packages(
    conn: Connection, *, pattern: str | None = None, state: str | None = None, limit: int = 100
) -> list[PackageLine]:
    """The raw data packages registered last, the newest first.

    Args:
        pattern: a name, in which ``*`` stands for any text and ``?`` for one character; None for all.
        state: keep only packages in this state.
        limit: how many at most.

    Raises:
        NotFoundError: a name without wildcards that no package has.
    """
    if pattern is not None and not set("*?") & set(pattern):
        _require(conn, "raw data package", pattern, _PACKAGES)
    return _rows(
        conn,
        PackageLine,
        f"""
        WITH page AS MATERIALIZED (
            SELECT * FROM raw_data_package k
            WHERE {_asked("k.name", "name", "text", "LIKE")} AND {_asked("k.state", "state")}
            ORDER BY k.id DESC LIMIT :limit)
        SELECT k.id, k.name, k.state, k.size, k.registered_at,
            e.name AS executed_obs_unit, im.name AS instrument_module,
            (SELECT count(*) FROM raw_data_file f WHERE f.package_id = k.id) AS files,
            (SELECT coalesce(jsonb_object_agg(l.name, c.status), '{{}}') FROM physical_copy c
                JOIN data_location l ON l.id = c.location_id
                WHERE c.package_id = k.id AND c.status <> 'deleted') AS copies
        FROM page k JOIN executed_obs_unit e ON e.id = k.executed_obs_unit_id
        JOIN instrument_module im ON im.id = k.instrument_module_id ORDER BY k.id DESC
        """,
        name=None if pattern is None else _like(pattern),
        state=state,
        limit=limit,
    )


def _like(pattern: str) -> str:
    escaped = re.sub(r"([\\%_])", r"\\\1", pattern)
    return escaped.replace("*", "%").replace("?", "_")


class PendingLine(Struct, frozen=True):
    """Events that a role has not handled yet, and the age of the oldest in seconds."""

    recipient: str
    events: int
    oldest_seconds: float


class Counts(Struct, frozen=True, kw_only=True):
    """How a location stands: runs by state (each state is there), tasks by kind and state, what waits to be handled."""

    runs: dict[RunState, int]
    tasks: dict[str, dict[str, int]]
    pending: list[PendingLine]
    dead_letters: int


def counts(conn: Connection, location_id: int) -> Counts:
    """How much of what is there at a location. Ages are by the clock of the database.

    Raises:
        NotFoundError: no such location.
    """
    _require_location(conn, location_id)
    by_state = _all(
        conn, "SELECT state, count(*) AS n FROM run WHERE location_id = :loc GROUP BY state", loc=location_id
    )
    tasks: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for t in _all(
        conn,
        "SELECT kind, state, count(*) AS n FROM task WHERE location_id = :loc GROUP BY 1, 2 ORDER BY 1, 2",
        loc=location_id,
    ):
        tasks[t["kind"]][t["state"]] = t["n"]
    pending = _rows(
        conn,
        PendingLine,
        """
        SELECT recipient, count(*) AS events,
            extract(epoch FROM clock_timestamp() - min(created_at))::float8 AS oldest_seconds
        FROM event WHERE location_id = :loc AND done_at IS NULL GROUP BY recipient ORDER BY recipient
        """,
        loc=location_id,
    )
    (dead,) = _column(
        conn, "SELECT count(*) FROM dead_letter WHERE location_id = :loc AND state = 'open'", loc=location_id
    )
    return Counts(
        runs=dict.fromkeys(RunState, 0) | {RunState(r["state"]): r["n"] for r in by_state},
        tasks=dict(tasks),
        pending=pending,
        dead_letters=dead,
    )
