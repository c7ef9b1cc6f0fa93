"""What is in quarantine: members on which a unit of a step fails, and which runs were made without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Literal

from msgspec import Struct
from sqlalchemy import Connection

from wfm.model import LeftOut
from wfm.schema import MEMBER_NAME
from wfm.views.sql import (
    _OF_PIPELINE,
    _PIPELINES_HERE,
    _STEPS,
    _UNITS,
    _all,
    _asked,
    _require,
    _require_location,
    _rows,
)

PACKAGES_LEFT_OUT = f"""
SELECT c.step_id, c.unit_id, {MEMBER_NAME} AS member, coalesce(w.package_id, m.package_id) AS package_id
FROM quarantine w JOIN coverage c ON (c.step_id, c.unit_id) = (w.step_id, w.unit_id) AND w.id = ANY(c.quarantined)
LEFT JOIN unit_member m ON m.unit_id = w.member_id AND m.removed IS NULL
"""
"""The packages that units of steps are run without: those in quarantine, and those in finer units that are."""


class QuarantineLine(Struct, frozen=True, kw_only=True):
    """A member of a unit on which a step failed.

    Attributes:
        member: name of a package, or key of a finer unit; `kind` says which.
        in_force: the unit is run without it. Otherwise it was released, or the member, the version or the config is
            another one by now, or the unit has no such member any more.
        run: that failed first. probe: the run that failed with the member alone. error: how.
        software, version, config_hash: what failed.
        released_at, released_by, released_reason: empty where nobody released it.
    """

    id: int
    pipeline: str
    step: str
    unit: str
    member: str
    kind: Literal["package", "unit"]
    in_force: bool
    created_at: datetime
    run: int
    probe: int
    error: str
    software: str
    version: str
    config_hash: str
    reason: str
    released_at: datetime | None
    released_by: str
    released_reason: str


def quarantine(
    conn: Connection,
    *,
    location_id: int,
    pipeline: str | None = None,
    step: str | None = None,
    unit: str | None = None,
    every: bool = False,
    limit: int = 1000,
) -> list[QuarantineLine]:
    """What is in quarantine at a location, the newest first.

    Args:
        pipeline, step, unit: names; None for all.
        every: also what is not in force any more.

    Raises:
        NotFoundError: no such location, pipeline, step or unit.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    _require(conn, "step", step, _STEPS, pipeline=pipeline)
    _require(conn, "unit", unit, _UNITS, pipeline=pipeline)
    return _rows(
        conn,
        QuarantineLine,
        f"""
        SELECT w.id, p.name AS pipeline, s.name AS step, u.key AS unit, {MEMBER_NAME} AS member,
            CASE WHEN w.package_id IS NULL THEN 'unit' ELSE 'package' END AS kind,
            w.id = ANY(c.quarantined) IS TRUE AS in_force, w.created_at, w.run_id AS run, w.probe_id AS probe,
            r.message AS error, sw.name AS software, sv.version, w.config AS config_hash, w.reason, w.released_at,
            w.released_by, w.released_reason
        FROM quarantine w JOIN reduction_step s ON s.id = w.step_id JOIN pipeline p ON p.id = s.pipeline_id
        JOIN unit u ON u.id = w.unit_id JOIN run r ON r.id = w.probe_id
        JOIN software_version sv ON sv.id = w.software_version_id JOIN software sw ON sw.id = sv.software_id
        LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (w.step_id, w.unit_id)
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND {_OF_PIPELINE} AND {_asked("s.name", "step")}
            AND {_asked("u.key", "unit")} AND (:every OR w.id = ANY(c.quarantined))
        ORDER BY w.id DESC LIMIT :limit
        """,
        loc=location_id,
        pipeline=pipeline,
        step=step,
        unit=unit,
        every=every,
        limit=limit,
    )


def left_out(conn: Connection, run_ids: Collection[int]) -> Mapping[int, list[LeftOut]]:
    """By run, the members that it does not read since they are in quarantine, by name."""
    found: dict[int, list[LeftOut]] = defaultdict(list)
    if not run_ids:
        return found
    for r in _all(
        conn,
        f"""
        SELECT DISTINCT ON (run, member) * FROM (
            SELECT r.id AS run, {MEMBER_NAME} AS member, w.id, w.reason
            FROM run r CROSS JOIN LATERAL jsonb_array_elements_text(r.subset -> 'without') x(member)
            JOIN quarantine w ON (w.step_id, w.unit_id) = (r.step_id, r.unit_id) AND w.created_at <= r.created_at
                AND CASE r.subset ->> 'of' WHEN 'units' THEN w.member_id ELSE w.package_id END = x.member::bigint
            WHERE r.id = ANY(:ids)) z
        ORDER BY run, member, id DESC
        """,
        ids=list(run_ids),
    ):
        found[r["run"]].append(LeftOut(r["member"], r["reason"]))
    return found
