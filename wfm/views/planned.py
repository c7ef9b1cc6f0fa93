"""The observing plan: what is expected, what came, what is absent."""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal

from msgspec import Struct
from sqlalchemy import Connection

from wfm.plan import CARRIED_OUT_BY, MISSING, of_night
from wfm.views.sql import _asked, _require_location, _rows


class PlanLine(Struct, frozen=True, kw_only=True):
    """A scheduled observation, and what became of it.

    Attributes:
        state: ``executed``: it has arrived; ``lost``: somebody said that it never will; ``late``: longer ago than its
            plan allows; ``planned``: it is expected.
        executed_by: the executed observations that carry it out. missing: modules of which nothing has come.
        lost_by, lost_reason: who declared it lost, and why.
    """

    name: str
    obs_unit: str
    planned_start: datetime
    planned_end: datetime
    state: Literal["planned", "late", "executed", "lost"]
    executed_by: list[str]
    missing: list[str]
    lost_by: str
    lost_reason: str


def planned(
    conn: Connection,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    night: date | None = None,
    limit: int = 1000,
) -> list[PlanLine]:
    """The scheduled observations that begin in some time, or in a night, in the order of their beginning."""
    return _rows(
        conn,
        PlanLine,
        f"""
        SELECT o.name, u.name AS obs_unit, o.planned_start, o.planned_end, o.lost_by, o.lost_reason,
            CASE WHEN z.missing = '{{}}' THEN 'executed' WHEN o.state = 'lost' THEN 'lost'
                WHEN o.planned_end < now() - o.late_after_hours * interval '1 h' THEN 'late'
                ELSE 'planned' END AS state,
            ARRAY(SELECT x.name FROM ({CARRIED_OUT_BY}) x ORDER BY x.name) AS executed_by,
            array_remove(z.missing, '') AS missing
        FROM scheduled_observation o JOIN obs_unit u ON u.id = o.obs_unit_id CROSS JOIN LATERAL ({MISSING}) z
        WHERE {_asked("o.planned_start", "start", "timestamptz", ">=")}
            AND {_asked("o.planned_start", "end", "timestamptz", "<")}
            AND (CAST(:ids AS bigint[]) IS NULL OR o.id = ANY(:ids))
        ORDER BY o.planned_start, o.name LIMIT :limit
        """,
        start=start,
        end=end,
        ids=None if night is None else of_night(conn, night),
        limit=limit,
    )


class AbsenceLine(Struct, frozen=True, kw_only=True):
    """Something that is expected and did not come, since the last package or the planned end."""

    reason: str
    since: datetime
    noticed_at: datetime


def absences(conn: Connection, location_id: int) -> list[AbsenceLine]:
    """What is absent, as the trigger-manager of a location noticed it; the oldest first."""
    _require_location(conn, location_id)
    return _rows(
        conn,
        AbsenceLine,
        "SELECT reason, since, noticed_at FROM absence WHERE location_id = :loc AND ended_at IS NULL ORDER BY id",
        loc=location_id,
    )
