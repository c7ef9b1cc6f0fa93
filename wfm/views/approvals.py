"""What waits for somebody's approval."""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct
from sqlalchemy import Connection

from wfm.model import Why
from wfm.views.cost import estimate, step_costs
from wfm.views.sql import _OF_PIPELINE, _PIPELINES_HERE, _STEPS, _all, _asked, _listed, _require, _require_location

HELD = _listed((Why.APPROVAL, Why.REVOKED))
"""The reasons of coverage from which approval releases, as a list in SQL."""


class ApprovalLine(Struct, frozen=True, kw_only=True):
    """Units of a step that are stale and held.

    Attributes:
        wish: what is to be approved, by its key. wanted: in words.
        units: held now. revoked: of these, the ones whose older result does not count.
        core_hours: that they take, from past runs; None if nothing is known.
        since: when the step began to want this.
    """

    pipeline: str
    step: str
    step_id: int
    wish: int
    wanted: str
    units: int
    revoked: int
    core_hours: float | None
    since: datetime


def approvals(
    conn: Connection, location_id: int, pipeline: str | None = None, step: str | None = None
) -> list[ApprovalLine]:
    """What is held for approval at a location, in the order of the steps.

    Raises:
        NotFoundError: no such location, pipeline or step.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    _require(conn, "step", step, _STEPS, pipeline=pipeline)
    rows = _all(
        conn,
        f"""
        SELECT p.name AS pipeline, s.name AS step, s.id AS step_id, w.id AS wish, h.units, h.revoked,
            w.created_at AS since, sw.name || ' ' || sv.version
                || coalesce(' with config ' || cf.name || ' revision ' || cr.revision, '') AS wanted
        FROM (SELECT step_id, count(*) AS units, count(*) FILTER (WHERE why = '{Why.REVOKED}') AS revoked
            FROM coverage WHERE why IN {HELD} GROUP BY step_id) h
        JOIN reduction_step s ON s.id = h.step_id JOIN pipeline p ON p.id = s.pipeline_id
        CROSS JOIN LATERAL (SELECT * FROM step_wish WHERE step_id = s.id ORDER BY id DESC LIMIT 1) w
        JOIN software_version sv ON sv.id = w.software_version_id JOIN software sw ON sw.id = sv.software_id
        LEFT JOIN config_revision cr ON cr.id = w.config_revision_id LEFT JOIN config cf ON cf.id = cr.config_id
        WHERE p.location_id = :loc AND {_OF_PIPELINE} AND {_asked("s.name", "step")}
        ORDER BY p.name, s.position
        """,
        loc=location_id,
        pipeline=pipeline,
        step=step,
    )
    costs = step_costs(conn, [r["step_id"] for r in rows])
    return [ApprovalLine(**r, core_hours=estimate(costs, {r["step_id"]: r["units"]}).core_hours) for r in rows]
