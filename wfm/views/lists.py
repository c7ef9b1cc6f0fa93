"""Packages, and how it stands."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import datetime
from itertools import islice
from zoneinfo import ZoneInfo

import msgspec
from msgspec import Struct
from sqlalchemy import Connection

from wfm.decide import due_times
from wfm.model import RunState, Schedule, TriggerType
from wfm.views.sql import (
    _OF_PIPELINE,
    _PACKAGES,
    _PIPELINES_HERE,
    _all,
    _asked,
    _column,
    _require,
    _require_location,
    _rows,
)


class PackageLine(Struct, frozen=True, kw_only=True):
    """A raw data package. `size` in bytes, `files` counted; `copies` by location: the status of what lies there.

    `state` is that of its registration, or revoked.
    """

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
        SELECT k.id, k.name, CASE k.revoked_by WHEN '' THEN k.state ELSE 'revoked' END AS state, k.size,
            k.registered_at,
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


class DueTime(Struct, frozen=True):
    """A time of a schedule: in UTC, and as the clocks of its zone show it, with their offset."""

    utc: datetime
    local: str


class PipelineLine(Struct, frozen=True, kw_only=True):
    """A pipeline, and when it works.

    Attributes:
        cron, timezone: of trigger CRON; None for others.
        next: its next times, none while it is disabled. fired_for: the last time that it was fired for.
        paused_by: empty if nobody did.
    """

    name: str
    trigger: TriggerType
    enabled: bool
    paused_by: str
    priority: int
    cron: str | None
    timezone: str | None
    next: list[DueTime]
    fired_for: datetime | None


def pipelines(conn: Connection, location_id: int, *, pipeline: str | None = None, times: int = 3) -> list[PipelineLine]:
    """The pipelines of a location, with their next times.

    Raises:
        NotFoundError: no such location, or no such pipeline there.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    rows = _all(
        conn,
        f"""
        SELECT p.name, p.trigger_type AS trigger, p.trigger_config AS config, p.enabled, p.paused_by, p.priority,
            d.fired_for, now() AS now
        FROM pipeline p LEFT JOIN schedule d ON d.pipeline_id = p.id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND {_OF_PIPELINE} ORDER BY p.name
        """,
        loc=location_id,
        pipeline=pipeline,
    )
    lines = []
    for r in rows:
        schedule = msgspec.convert(r.pop("config"), Schedule)
        cron, now, zone = r["trigger"] == TriggerType.CRON, r.pop("now"), ZoneInfo(schedule.timezone)
        due = islice(due_times(schedule, now), times) if cron and r["enabled"] else ()
        r["cron"], r["timezone"] = (schedule.cron, schedule.timezone) if cron else (None, None)
        r["next"] = [DueTime(t, t.astimezone(zone).isoformat()) for t in due]
        lines.append(msgspec.convert(r, PipelineLine))
    return lines


class PendingLine(Struct, frozen=True):
    """Events that a role has not handled yet, and the age of the oldest in seconds."""

    recipient: str
    events: int
    oldest_seconds: float


class PausedLine(Struct, frozen=True):
    """A pipeline, step or backfill that is paused, or so many units of a step; by whom, and why, where it is one."""

    what: str
    units: int | None
    by: str
    reason: str


class Counts(Struct, frozen=True, kw_only=True):
    """How a location stands: runs by state (each state is there), tasks by kind and state, what waits or is paused."""

    runs: dict[RunState, int]
    tasks: dict[str, dict[str, int]]
    pending: list[PendingLine]
    dead_letters: int
    paused: list[PausedLine] = []


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
        paused=_rows(conn, PausedLine, _PAUSED, loc=location_id),
    )


_PAUSED = """
SELECT 'pipeline ' || p.name AS what, CAST(NULL AS bigint) AS units, p.paused_by AS by, p.paused_reason AS reason
FROM pipeline p WHERE p.location_id = :loc AND p.deleted_at IS NULL AND p.paused_by <> ''
UNION ALL
SELECT 'step ' || p.name || '/' || s.name, NULL, s.paused_by, s.paused_reason
FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active AND s.paused_by <> ''
UNION ALL
SELECT 'units of ' || p.name || '/' || s.name, count(*), min(c.paused_by), min(c.paused_reason)
FROM coverage c JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id
WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active AND c.paused_by <> '' GROUP BY p.name, s.name
UNION ALL
SELECT 'backfill ' || b.name, NULL, b.paused_by, b.paused_reason
FROM backfill b WHERE b.location_id = :loc AND b.state = 'paused'
ORDER BY what
"""
