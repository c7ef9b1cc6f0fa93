"""Runs, in a list and one by one."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from msgspec import Struct, structs
from sqlalchemy import Connection

from wfm.model import JobSpec, LeftOut, Probe, ProductType, RunState, Subset, UpstreamRead
from wfm.schema import PINNED
from wfm.views.ledger import _EVENT, EventLine
from wfm.views.quarantine import left_out
from wfm.views.sql import (
    _OF_PIPELINE,
    _PIPELINES,
    _STEPS,
    _UNITS,
    _asked,
    _column,
    _no_run,
    _require,
    _require_location,
    _rows,
)


class RunLine(Struct, frozen=True, kw_only=True):
    """A run in a list.

    Attributes:
        version: counts its transitions, from 1.
        waiting_for: why an active run does not move; empty if it does.
        failure: class of the last attempt's failure. message: the same for people.
        wall_seconds: of the last attempt that ended.
        superseded: a later run of the same step and unit is COMPLETED.
        probe_of: the failed run that it examines; it covers nothing. None of other runs.
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
    probe_of: int | None


class RunRef(Struct, frozen=True):
    """A run that is named beside another thing."""

    id: int
    step: str
    unit: str
    state: RunState


class ProductLine(Struct, frozen=True, kw_only=True):
    """A data product. `superseded_by` is the run with the newer result; its own run, if a later attempt made it."""

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


class RunDetail(RunLine, frozen=True, kw_only=True):
    """All about one run.

    Attributes:
        accepted: coverage of its unit rests on this run.
        generation: of the unit's members; with the unit it pins the raw inputs.
        packages: names of those it reads in order, the first `SHOWN` of `packages_total`; of a step that depends on
            others, of all members.
        subset: what of its unit it reads, if not all. quarantined: members that it leaves out, and why.
        probe: which part of the failed unit it tries, if it is a probe.
        upstream: runs whose results it reads, the first `SHOWN` of `upstream_total`.
        partial: where it does not need all results of the steps it depends on, which ones it has.
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
    partial: list[UpstreamRead] = []
    subset: Subset | None
    quarantined: list[LeftOut] = []
    probe: Probe | None
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
r.message, r.created_at, r.state_since, r.started_at, r.finished_at, r.wall_seconds, r.probe_of,
EXISTS (SELECT 1 FROM run n WHERE (n.step_id, n.unit_id) = (r.step_id, r.unit_id) AND n.id > r.id
    AND n.state = 'COMPLETED' AND n.probe_of IS NULL) AS superseded
"""
_RUN_TABLES = """
run r JOIN reduction_step s ON s.id = r.step_id JOIN pipeline p ON p.id = r.pipeline_id JOIN unit u ON u.id = r.unit_id
"""
_RUN_SOFTWARE = """
JOIN software_version sv ON sv.id = r.software_version_id JOIN software sw ON sw.id = sv.software_id
LEFT JOIN config_revision cr ON cr.id = r.config_revision_id LEFT JOIN config cf ON cf.id = cr.config_id
"""


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
                AND r.state = 'COMPLETED' AS accepted,
            r.upstream AS partial, r.subset, r.probe,
            r.generation, r.wanted, r.priority, r.cpu, r.memory_gb, r.failures, s.max_retries, r.due_at,
            r.look_again_at, r.submitted_at, r.job, r.backend, r.handle, r.exit_code, r.cpu_hours, r.peak_memory_gb,
            r.node, r.evidence,
            (SELECT count(*) FROM unit_member m WHERE {PINNED}) AS packages_total,
            (SELECT count(*) FROM run_input i WHERE i.run_id = r.id) AS upstream_total
        FROM {_RUN_TABLES} {_RUN_SOFTWARE} JOIN data_location l ON l.id = r.location_id WHERE r.id = :run
        """,
        run=run_id,
    )
    if not found:
        _no_run(conn, run_id)
    return structs.replace(
        found[0],
        quarantined=list(left_out(conn, [run_id]).get(run_id, ())),
        packages=_column(
            conn,
            f"""
            SELECT k.name FROM run r JOIN unit_member m ON {PINNED} JOIN raw_data_package k ON k.id = m.package_id
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
            FROM data_product WHERE run_id = :run ORDER BY attempt, path
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
