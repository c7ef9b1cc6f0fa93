"""Why each unit has, or has not, been processed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from itertools import islice, product
from typing import Any

import msgspec
from msgspec import Struct, structs
from sqlalchemy import Connection, exists, literal, select, union_all

from wfm import grouping
from wfm.decide import due_text, due_times
from wfm.errors import NotFoundError
from wfm.model import OF_DATA, CoverageState, FanIn, Pair, RunState, Schedule, Why
from wfm.schema import MEMBER_NAME, UNITS_INSIDE, UPSTREAM_COUNTS
from wfm.store import WITHDRAWN
from wfm.views.quarantine import PACKAGES_LEFT_OUT
from wfm.views.sql import (
    _OF_PIPELINE,
    _PACKAGES,
    _PIPELINES_HERE,
    _STEPS,
    _UNITS,
    _all,
    _asked,
    _require,
    _require_location,
    _rows,
)


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


class FailureLine(Struct, frozen=True, kw_only=True):
    """An attempt that failed. `log` is the last line that its software wrote, where somebody looked."""

    run: int
    attempt: int
    failure: str
    exit_code: int | None
    message: str
    at: datetime
    log: str = ""


class InQuarantine(Struct, frozen=True):
    """A member that a unit is run without: since when, on what evidence, and how it failed."""

    member: str
    at: datetime
    run: int
    probe: int
    error: str


class WhyLine(Struct, frozen=True, kw_only=True):
    """Why one (step, unit) is as it is, and what would change that.

    Attributes:
        accepted: the run that the present result rests on, also where newer input makes it stale.
        due_at: when the trigger-manager looks again by itself.
        active: the run on its way. failed: the last one that failed or was cancelled since the accepted one.
        upstream_total, upstream_open: units of the steps it depends on; of these, not covered.
        upstream: what holds it up, the first few: units not covered yet, or those where a failure began, which may
            lie several steps up.
        failures: how many attempts failed with the inputs, version and config that are wanted now, by all runs, however
            often they were repeated. last_failures: the newest of them.
        quarantined: the members that it is run without since it fails on them.
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
    failures: int = 0
    last_failures: list[FailureLine] = []
    quarantined: list[InQuarantine] = []
    change: str = ""


CHANGE: dict[Why, str] = {
    Why.COVERED: "nothing needs to be done; new input, version or config makes it a gap again{aside}",
    Why.RUN: "{run} goes on by itself{waiting}; `wfm runs watch` follows it, `wfm runs cancel` stops it",
    Why.BISECTING: "{run} goes on by itself{waiting}; what is found follows from it",
    Why.NEWER_INPUT: "when {run} has ended, the newer input, version or config gets a run of its own",
    Why.UPSTREAM: "{needed}, {open} of {total} are not: {upstream}",
    Why.UPSTREAM_FAILED: "mend what stopped upstream: {upstream}",
    Why.ARRIVALS: "the trigger-manager looks at it next; if it stays so, see `wfm health trigger-manager`",
    Why.INCOMPLETE: "the named observations arrive, or `wfm data lost NAME` says that they never will; "
    "`wfm data plan` lists what is expected",
    Why.COOLDOWN: "a new run may start {due}",
    Why.SETTLING: "it runs {due}, if nothing it reads changes meanwhile",
    Why.NO_COPY: "bring the named packages to a location with disk storage",
    Why.NO_VERSION: "apply an active version that fits, or change the step's version policy",
    Why.MANUAL: "ask for it: `wfm trigger {pipeline}/{step} {unit}`",
    Why.NOT_DUE: "the next time of its schedule: {next}; at once: `wfm trigger {pipeline}/{step} {unit}`",
    Why.NO_CONFIG: "apply the config with other parameters, or undo a revocation (`wfm revoke config ... --restore`)",
    Why.APPROVAL: "`wfm approve {pipeline}/{step}`, or for this one alone `wfm trigger {pipeline}/{step} {unit}`;"
    " until then its older result counts",
    Why.REVOKED: "`wfm approve {pipeline}/{step}`; its older result does not count",
    Why.PAUSED: "`wfm {paused}`",
    Why.DISABLED: "{enable}",
    Why.FAILED: "fix the cause, then `wfm runs retry {failed}`{logs}; or new input, version or config{search}",
    Why.CANCELLED: "`wfm runs retry {failed}`; or new input, version or config",
    Why.ORPHANED: "nothing is to be done, its results stay; grouped as before, they count again",
    Why.QUARANTINED: "new content of it, another version or config, or {release}",
    Why.EMPTY: "a raw data package that belongs to this unit",
}
"""What would change each reason; `_change` fills in the particulars."""

_FIRST = 3

_FEW_UNITS = 2000
"""So many units inside one are looked through, if fewer than its step has open; else these are looked up."""

# For a step s and its unit u: each step us it depends on, counted, with the first few units o of us in u that are not
# covered, blocked ones first.
_OPEN_BELOW = f"""
JOIN step_dependency d ON d.step_id = s.id JOIN reduction_step us ON us.id = d.upstream_id
JOIN LATERAL ({UPSTREAM_COUNTS}) n ON true
CROSS JOIN LATERAL (
    SELECT n.total <= {_FEW_UNITS} AND (n.total <= z.units - z.done OR z.units > z.looked_at) AS through FROM (
        SELECT sum(units) FILTER (WHERE step_id IS NULL) AS units,
            sum(units) FILTER (WHERE step_id = us.id) AS looked_at,
            coalesce(sum(units) FILTER (WHERE step_id = us.id AND state IN ('covered', 'empty')), 0) AS done
        FROM coverage_tally t WHERE t.pipeline_id = us.pipeline_id AND t.dims = us.dims) z) look
LEFT JOIN LATERAL (
    SELECT * FROM (
        SELECT l.id, l.key, coalesce(c.state, 'waiting') AS state, coalesce(c.why, 'arrivals_not_sorted_yet') AS why
        FROM ({UNITS_INSIDE}) l LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id)
        WHERE look.through IS NOT FALSE AND c.counts IS NOT TRUE
        {
    "".join(
        f'''
        UNION ALL (SELECT l.id, l.key, c.state, c.why FROM coverage c JOIN unit l ON l.id = c.unit_id
            WHERE NOT look.through AND c.step_id = us.id AND c.state {which} AND NOT c.counts AND l.dims = us.dims
                AND EXISTS (SELECT 1 FROM unit_edge e WHERE (e.upper_id, e.lower_id) = (u.id, l.id)) LIMIT :first)
        '''
        for which in ("= 'blocked'", "IN ('held', 'waiting', 'active')")
    )
}) z
    ORDER BY state = 'blocked' DESC, key LIMIT :first) o ON n.covered < n.total
"""
_UTC = """to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
_BRIEF = "r.id, r.state, r.attempt, r.waiting_for, r.failure, r.exit_code, r.message"
# For a row of coverage c: the run that failed or was cancelled, of the wanted digest before others.
_FAILED = f"""
SELECT {_BRIEF} FROM run r
WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.state IN ('FAILED', 'CANCELLED')
    AND r.failure <> '{WITHDRAWN}' AND r.probe_of IS NULL AND (r.wanted = c.wanted OR r.id > coalesce(c.run_id, 0))
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
    trigger_config: Schedule
    fan_in: FanIn
    now: datetime
    unit_paused: bool
    paused_backfill: str
    quarantine_at_most: int
    members: int
    inside: int


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
    try:
        _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    except NotFoundError:
        if _all(conn, "SELECT 1 FROM raw_data_package WHERE name = :name", name=pipeline):
            raise NotFoundError(f"{pipeline!r} is a package, not a pipeline: `wfm why --package {pipeline}`") from None
        raise
    _require(conn, "step", step, _STEPS, pipeline=pipeline)
    _require(conn, "unit", unit, _UNITS, pipeline=pipeline)
    steps = _all(
        conn,
        f"""
        SELECT s.id, s.dims, s.pipeline_id FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
        WHERE p.name = :pipeline AND (s.active OR s.name = :step) AND {_asked("s.name", "step")} ORDER BY s.position
        """,
        pipeline=pipeline,
        step=step,
    )
    if not steps:
        return []
    return explain(conn, _first(conn, steps, limit) if unit is None else _named(conn, steps, unit)[:limit])


def _named(conn: Connection, steps: Sequence[Mapping[str, Any]], unit: str) -> list[Pair]:
    """The units of this key that concern these steps of a pipeline."""
    rows = _all(
        conn,
        """
        SELECT s.id AS step_id, u.id AS unit_id FROM reduction_step s JOIN unit u ON u.pipeline_id = :pipeline
            AND u.key = :unit AND u.dims = ANY(ARRAY(SELECT dims FROM coverage_tally WHERE pipeline_id = :pipeline
                UNION SELECT dims FROM reduction_step WHERE pipeline_id = :pipeline))
        LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
        WHERE s.id = ANY(:steps) AND (u.dims = s.dims AND u.members > 0 OR c.step_id IS NOT NULL)
        """,
        pipeline=steps[0]["pipeline_id"],
        unit=unit,
        steps=[s["id"] for s in steps],
    )
    return [(r["step_id"], r["unit_id"]) for r in rows]


def _first(conn: Connection, steps: Sequence[Mapping[str, Any]], limit: int) -> list[Pair]:
    """Of all units that concern these steps of a pipeline, the first few: by state, step and key.

    The tallies tell where there are any: what is not shown is not sorted either.
    """
    counts = _all(
        conn,
        """
        SELECT step_id, dims, state, sum(units)::bigint AS units FROM coverage_tally WHERE pipeline_id = :pipeline
        GROUP BY step_id, dims, state HAVING sum(units) > 0
        """,
        pipeline=steps[0]["pipeline_id"],
    )
    units = {(c["step_id"], c["dims"], c["state"]): c["units"] for c in counts}
    pairs: list[Pair] = []
    for state, s in product(_NEEDS_SOMEBODY_FIRST, steps):
        here = {dims: n for (step, dims, in_state), n in units.items() if (step, in_state) == (s["id"], state)}
        few = sum(here.values()) <= _FEW_UNITS
        if state is CoverageState.WAITING:
            seen = sum(n for (step, dims, _), n in units.items() if (step, dims) == (s["id"], s["dims"]))
            if seen < units.get((None, s["dims"], None), 0):  # nobody has looked at the others yet: no row says so
                here, few = {**here, s["dims"]: 0}, False
        if here and len(pairs) < limit:
            pairs += _in_state(conn, s, state, () if few else sorted(here), limit - len(pairs))
    return pairs


def _in_state(
    conn: Connection, step: Mapping[str, Any], state: CoverageState, dims: Collection[str], limit: int
) -> list[Pair]:
    """The first few units of a step in a state, by key: among the units of these dims; without any, of its coverage."""
    rows = _all(
        conn,
        """
        SELECT u.id FROM coverage c JOIN unit u ON u.id = c.unit_id WHERE c.step_id = :step AND c.state = :state
        ORDER BY u.key LIMIT :limit
        """
        if not dims
        else """
        SELECT id FROM unnest(CAST(:dims AS text[])) AS d(dims) CROSS JOIN LATERAL (
            -- Units in the order of their keys, each looked up, until there are enough: not all of them, sorted.
            SELECT u.id, u.key FROM unit u LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (:step, u.id)
            WHERE u.pipeline_id = :pipeline AND u.dims = d.dims AND coalesce(c.state, 'waiting') = :state
                AND (u.dims = :own AND u.members > 0 OR c.step_id IS NOT NULL)
            ORDER BY u.key LIMIT :limit) z
        ORDER BY key LIMIT :limit
        """,
        step=step["id"],
        pipeline=step["pipeline_id"],
        own=step["dims"],
        state=state,
        dims=list(dims),
        limit=limit,
    )
    return [(step["id"], r["id"]) for r in rows]


def explain(conn: Connection, pairs: Sequence[Pair]) -> list[WhyLine]:
    """Why these (step, unit) are as they are; those that need somebody first, as in `why`."""
    found = _rows(
        conn,
        _Situation,
        f"""
        SELECT p.name AS pipeline, s.name AS step, u.key AS unit, coalesce(c.state, 'waiting') AS state,
            coalesce(c.why, 'arrivals_not_sorted_yet') AS why,
            coalesce(c.reason, 'the unit is known, but was not looked at yet') AS reason,
            c.run_id AS accepted, c.due_at, c.updated_at,
            CASE WHEN a.id IS NOT NULL THEN (SELECT to_jsonb(r) FROM (SELECT {_BRIEF} FROM run r WHERE r.id = a.id) r)
                END AS active,
            (SELECT to_jsonb(f) FROM ({_FAILED}) f) AS failed,
            s.id AS step_id, u.id AS unit_id, s.active AS step_active,
            p.paused_by <> '' AS pipeline_paused, s.paused_by <> '' AS step_paused,
            coalesce(c.paused_by, '') <> '' AS unit_paused, coalesce((SELECT b.name FROM backfill b
                WHERE b.state = 'paused' AND b.id = coalesce(c.backfill_id, a.backfill_id)), '') AS paused_backfill,
            p.trigger_config, s.fan_in, now() AS now, s.quarantine_at_most, u.members,
            CASE WHEN c.why = 'failed' THEN (SELECT count(*) FROM unit_edge e WHERE e.upper_id = u.id) ELSE 0 END
                AS inside,
            CASE WHEN c.quarantined IS NULL THEN '[]' ELSE (
                SELECT jsonb_agg(jsonb_build_object('member', {MEMBER_NAME}, 'at', {_UTC.format("w.created_at")},
                    'run', w.run_id, 'probe', w.probe_id, 'error', r.message) ORDER BY w.id)
                FROM quarantine w JOIN run r ON r.id = w.probe_id WHERE w.id = ANY(c.quarantined)) END AS quarantined
        FROM {_PAIRS} JOIN reduction_step s ON s.id = q.step_id JOIN pipeline p ON p.id = s.pipeline_id
        JOIN unit u ON u.id = q.unit_id
        LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
        LEFT JOIN LATERAL (SELECT r.id, r.backfill_id FROM run r
            WHERE (r.step_id, r.unit_id) = (s.id, u.id) AND r.finished_at IS NULL) a ON true
        ORDER BY array_position(CAST(:severity AS text[]), coalesce(c.state, 'waiting')), p.name, s.position, u.key
        """,
        severity=[str(s) for s in _NEEDS_SOMEBODY_FIRST],
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    waiting = [s for s in found if s.why in (Why.UPSTREAM, Why.UPSTREAM_FAILED)]
    upstream = _upstream(conn, waiting)
    origins = _origins(conn, [s for s in waiting if s.why is Why.UPSTREAM_FAILED])
    failures = _failures(conn, [s for s in found if s.why in (Why.FAILED, Why.RUN)])
    lines = []
    for s in found:
        total, uncovered, first = upstream.get((s.step_id, s.unit_id), (0, 0, []))
        first = origins.get((s.step_id, s.unit_id), first)
        known = structs.replace(s, upstream_total=total, upstream_open=uncovered, upstream=first)
        times, last = failures.get((s.step_id, s.unit_id), (0, []))
        known = structs.replace(known, failures=times, last_failures=last)
        fields = {name: getattr(known, name) for name in WhyLine.__struct_fields__}
        lines.append(WhyLine(**fields | {"change": _change(known)}))
    return lines


def _upstream(
    conn: Connection, pairs: Sequence[_Situation]
) -> dict[tuple[int, int], tuple[int, int, list[UpstreamUnit]]]:
    """By pair: units it depends on, those not covered, and the first few of these, blocked ones before others."""
    if not pairs:
        return {}
    rows = _all(
        conn,
        f"""
        SELECT step_id, unit_id, sum(total) FILTER (WHERE nth = 1)::bigint AS total,
            sum(total - covered) FILTER (WHERE nth = 1)::bigint AS uncovered,
            jsonb_agg({_UPSTREAM_UNIT} ORDER BY rank) FILTER (WHERE unit IS NOT NULL AND rank <= :first) AS first
        FROM (
            SELECT s.id AS step_id, u.id AS unit_id, us.name AS step, n.total, n.covered,
                o.key AS unit, o.state, o.why, f.id AS run,
                row_number() OVER (PARTITION BY s.id, u.id, us.id) AS nth,
                row_number() OVER (PARTITION BY s.id, u.id
                    ORDER BY (o.state = 'blocked') DESC NULLS LAST, us.position, o.key) AS rank
            FROM {_PAIRS} JOIN reduction_step s ON s.id = q.step_id JOIN unit u ON u.id = q.unit_id {_OPEN_BELOW}
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, o.id)
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


def _failures(conn: Connection, pairs: Sequence[_Situation]) -> dict[tuple[int, int], tuple[int, list[FailureLine]]]:
    """By pair: how many attempts failed with the digest that is wanted now, and the last few."""
    if not pairs:
        return {}
    rows = _all(
        conn,
        f"""
        SELECT q.step_id, q.unit_id, f.times, f.last
        FROM {_PAIRS} JOIN coverage c ON (c.step_id, c.unit_id) = (q.step_id, q.unit_id)
        CROSS JOIN LATERAL (
            SELECT count(*) AS times, jsonb_agg(to_jsonb(z) - 'n' ORDER BY n) FILTER (WHERE n <= :first) AS last
            FROM (
                SELECT r.id AS run, t.attempt, t.failure, t.exit_code, t.reason AS message,
                    {_UTC.format("t.at")} AS at,
                    row_number() OVER (ORDER BY t.at DESC, r.id DESC, t.version DESC) AS n
                FROM run r JOIN transition t ON t.run_id = r.id AND t.trigger = 'fail'
                WHERE (r.step_id, r.unit_id, r.wanted) = (c.step_id, c.unit_id, c.wanted)
                    AND r.probe_of IS NULL) z) f
        WHERE f.times > 0
        """,
        steps=[p.step_id for p in pairs],
        units=[p.unit_id for p in pairs],
        first=_FIRST,
    )
    return {(r["step_id"], r["unit_id"]): (r["times"], msgspec.convert(r["last"], list[FailureLine])) for r in rows}


def _origins(conn: Connection, pairs: Sequence[_Situation]) -> dict[tuple[int, int], list[UpstreamUnit]]:
    """By pair that waits for something that failed: the first few units where that began, however far up."""
    if not pairs:
        return {}
    rows = _all(
        conn,
        f"""
        WITH RECURSIVE walk(for_step, for_unit, step_id, unit_id, why) AS (
            SELECT q.step_id, q.unit_id, q.step_id, q.unit_id, 'upstream_failed' FROM {_PAIRS}
            UNION
            SELECT w.for_step, w.for_unit, us.id, o.id, o.why
            FROM walk w JOIN reduction_step s ON s.id = w.step_id JOIN unit u ON u.id = w.unit_id {_OPEN_BELOW}
            WHERE w.why = 'upstream_failed' AND o.state = 'blocked')
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
    paused = [f"resume {s.pipeline}"] * s.pipeline_paused + [f"resume {s.pipeline}/{s.step}"] * s.step_paused
    paused += [f"resume {s.pipeline}/{s.step} {s.unit}"] * s.unit_paused
    paused += [f"backfill resume {s.paused_backfill}"] * bool(s.paused_backfill)
    why = Why.PAUSED if paused and s.active and s.active.state is RunState.PENDING else s.why
    upstream = [f"run {u.run} ({u.step} {u.unit})" if u.run else f"{u.step} {u.unit} ({u.why})" for u in s.upstream]
    return CHANGE[why].format(
        pipeline=s.pipeline,
        step=s.step,
        unit=s.unit,
        run=f"run {s.active.id}" if s.active else "its run",
        waiting=f"; it waits: {s.active.waiting_for}" if s.active and s.active.waiting_for else "",
        failed=s.failed.id if s.failed else "RUN",
        logs=f" (`wfm runs logs {s.failed.id}` shows what it said)"
        if s.failed and s.failed.exit_code is not None
        else "",
        needed="all upstream units must be covered"
        if s.fan_in is not FanIn.ANY
        else "some of each upstream step must be covered, and as many as before",
        open=s.upstream_open,
        total=s.upstream_total,
        upstream=", ".join(upstream) + (", ..." if len(upstream) < s.upstream_open else "") or "none known yet",
        due=f"at {s.due_at:%Y-%m-%d %H:%M:%S} UTC" if s.due_at else "soon",
        paused="` and `wfm ".join(paused) or f"resume {s.pipeline}",
        enable=f"`wfm enable {s.pipeline}`" if s.step_active else f"apply {s.pipeline} with the step {s.step} in it",
        next=next_times(s.trigger_config, s.now) if s.why is Why.NOT_DUE else "",
        aside=f"; what it leaves out is used again with {_release(s)}" if s.quarantined else "",
        search=_would_search(s),
        release=_release(s),
    )


def _release(s: WhyLine, member: str = "") -> str:
    return (
        f"`wfm quarantine release {' '.join(filter(None, (f'{s.pipeline}/{s.step}', s.unit, member)))} --reason TEXT`"
    )


def _would_search(s: _Situation) -> str:
    """That the step may say that the guilty member is to be looked for, where there is one to be found."""
    coarse = s.members > 1 if not s.inside else s.inside > 1
    if s.quarantine_at_most or not coarse or not s.failed or s.failed.failure not in OF_DATA:
        return ""
    return f"; with `quarantine_at_most: 1`, {s.step} looks for the member that it fails on, and runs without it"


def of_members(line: WhyLine, members: Collection[str]) -> WhyLine:
    """What is to be said of members that a unit leaves out, in place of what is said of the unit."""
    aside = [q for q in line.quarantined if q.member in members]
    said = (f"{q.member}: run {q.run} failed, and so did run {q.probe} with it alone: {q.error}" for q in aside)
    return structs.replace(
        line,
        state=CoverageState.BLOCKED,
        why=Why.QUARANTINED,
        reason=f"in quarantine, {line.step} is run without it: {'; '.join(said)}",
        change=CHANGE[Why.QUARANTINED].format(release=_release(line, aside[0].member if len(aside) == 1 else "")),
    )


def next_times(schedule: Schedule, now: datetime) -> str:
    """The first few times of a schedule after now; empty if it has none, as it was perhaps changed just now."""
    return ", ".join(due_text(schedule, t) for t in islice(due_times(schedule, now), _FIRST)) if schedule.cron else ""


class NotSelected(Struct, frozen=True):
    """A pipeline that does not work on a package, and why."""

    pipeline: str
    reason: str


class PackageWhy(Struct, frozen=True, kw_only=True):
    """What becomes of one raw data package.

    Attributes:
        state: of its registration; or revoked.
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
    (package,) = _all(
        conn, "SELECT id, state, revoked_by, revoked_reason FROM raw_data_package WHERE name = :name", name=name
    )
    revoked = package["revoked_by"] and f"revoked by {package['revoked_by']}: {package['revoked_reason']}"
    member = "SELECT unit_id FROM unit_member WHERE package_id = :package AND removed IS NULL"
    pairs = _all(
        conn,
        f"""
        SELECT s.id AS step_id, u.id AS unit_id FROM unit u JOIN pipeline p ON p.id = u.pipeline_id
        JOIN reduction_step s ON s.pipeline_id = p.id AND s.dims = u.dims
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active AND u.id IN ({member})
        """,
        loc=location_id,
        package=package["id"],
    )
    units = explain(conn, [(p["step_id"], p["unit_id"]) for p in pairs])
    aside = {
        (r["pipeline"], r["step"], r["unit"]): r["member"]
        for r in _all(
            conn,
            f"""
            SELECT p.name AS pipeline, s.name AS step, u.key AS unit, x.member FROM ({PACKAGES_LEFT_OUT}) x
            JOIN reduction_step s ON s.id = x.step_id JOIN pipeline p ON p.id = s.pipeline_id
            JOIN unit u ON u.id = x.unit_id WHERE x.package_id = :package
            """,
            package=package["id"],
        )
    }
    units = [of_members(u, {aside[key]}) if (key := (u.pipeline, u.step, u.unit)) in aside else u for u in units]
    others = _all(
        conn,
        f"""
        SELECT p.name, p.enabled, p.frozen_at IS NOT NULL AS campaign, g.name AS "grouping", g.rules
        FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL
            AND p.id NOT IN (SELECT pipeline_id FROM unit WHERE id IN ({member}))
        ORDER BY p.name
        """,
        loc=location_id,
        package=package["id"],
    )
    rejecting = {} if revoked else _rejecting_rules(conn, package["id"], {p["name"]: p["rules"] for p in others})
    not_selected = []
    for p in others:
        if revoked:
            reason = f"the package is {revoked}"
        elif p["name"] in rejecting:
            reason = f"grouping {p['grouping']} rejects it: {rejecting[p['name']]}"
        elif p["campaign"]:
            reason = "this campaign was frozen without it"
        else:
            reason = f"grouping {p['grouping']} selects it, but its arrival is not sorted yet"
        not_selected.append(NotSelected(p["name"], reason if p["enabled"] else f"{reason}; the pipeline is disabled"))
    containing = sorted({u.pipeline for u in units})
    if revoked:
        summary = f"{revoked}; no unit may use it (`wfm revoke package {name} --restore` undoes that)"
        if containing:
            summary += f"; it is still in {', '.join(containing)}: campaigns keep it, others let it go next"
    elif containing:
        summary = f"{len(units)} (step, unit) pairs of {', '.join(containing)} contain it"
    elif any(p["enabled"] and not p["campaign"] and p["name"] not in rejecting for p in others):
        summary = "its arrival is not sorted yet"
    else:
        summary = "no enabled pipeline of this location selects it"
    state = "revoked" if revoked else package["state"]
    return PackageWhy(package=name, state=state, units=units, not_selected=not_selected, summary=summary)


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
        rejecting.setdefault(pipeline, f"rule {n}, {rule}")
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
        SELECT p.name AS pipeline, s.name AS step, coalesce(z.states, '{{}}') AS states, coalesce(z.units, 0) AS units
        FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id
        CROSS JOIN LATERAL (
            SELECT jsonb_object_agg(state, n) FILTER (WHERE state IS NOT NULL) AS states,
                sum(n) FILTER (WHERE state IS NULL)::bigint AS units
            FROM (SELECT state, sum(units)::bigint AS n FROM coverage_tally t
                WHERE t.pipeline_id = p.id AND t.dims = s.dims AND (t.step_id IS NULL OR t.step_id = s.id)
                GROUP BY state) y) z
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active AND {_OF_PIPELINE}
        ORDER BY p.name, s.position
        """,
        loc=location_id,
        pipeline=pipeline,
    )
    lines = []
    for r in rows:
        states = dict.fromkeys(CoverageState, 0) | {CoverageState(s): n for s, n in r["states"].items()}
        states[CoverageState.WAITING] += max(0, r["units"] - sum(states.values()))
        lines.append(CoverageLine(pipeline=r["pipeline"], step=r["step"], units=sum(states.values()), states=states))
    return lines
