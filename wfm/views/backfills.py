"""How far backfills are."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection

from wfm.model import BackfillKind, BackfillState
from wfm.store import HOLDS_SLOT
from wfm.views.sql import _ACTIVE, _asked, _listed, _require, _require_location, _rows


class BackfillNote(Struct, frozen=True):
    """Why units were left out or failed: how many, and one of them."""

    state: str
    note: str
    units: int
    example: str


class BackfillLine(Struct, frozen=True, kw_only=True):
    """A backfill: what it is about, and how many (step, unit) pairs of it are how far.

    Attributes:
        selection: as it was asked for. waiting: units whose turn has not come. begun: those under way; of these,
            `pending` have a run without a slot, `in_flight` one with a job, the others wait for something else.
        notes: the most frequent; only where one backfill was asked for.
    """

    name: str
    pipeline: str
    step: str | None
    kind: BackfillKind
    selection: dict[str, Any]
    priority: int
    max_in_flight: int | None
    state: BackfillState
    actor: str
    reason: str
    paused_by: str
    paused_reason: str
    created_at: datetime
    finished_at: datetime | None
    units: int
    waiting: int
    begun: int
    pending: int
    in_flight: int
    done: int
    failed: int
    skipped: int
    notes: list[BackfillNote] = []

    @property
    def ended(self) -> bool:
        """Whether nothing more will be begun."""
        return self.state in (BackfillState.DONE, BackfillState.CANCELLED)


def backfills(conn: Connection, location_id: int, name: str | None = None, limit: int = 20) -> list[BackfillLine]:
    """The backfills of a location, those that go on first, then the newest; or the one of a name.

    Raises:
        NotFoundError: no such backfill or location.
    """
    _require_location(conn, location_id)
    _require(conn, "backfill", name, "SELECT name FROM backfill WHERE location_id = :loc", loc=location_id)
    return _rows(
        conn,
        BackfillLine,
        f"""
        SELECT b.name, p.name AS pipeline, s.name AS step, b.kind, b.selection, b.priority, b.max_in_flight, b.state,
            b.actor, b.reason, b.paused_by, b.paused_reason, b.created_at, b.finished_at,
            n.units, n.waiting, n.begun, n.done, n.failed, n.skipped, a.pending, a.in_flight,
            CASE WHEN CAST(:name AS text) IS NULL THEN '[]' ELSE coalesce((
                SELECT jsonb_agg(to_jsonb(z)) FROM (
                    SELECT x.state, x.note, count(*) AS units, min(xs.name || ' ' || xu.key) AS example
                    FROM backfill_unit x JOIN reduction_step xs ON xs.id = x.step_id JOIN unit xu ON xu.id = x.unit_id
                    WHERE x.backfill_id = b.id AND x.note <> '' GROUP BY 1, 2 ORDER BY 3 DESC, 2 LIMIT 10) z), '[]')
            END AS notes
        FROM backfill b JOIN pipeline p ON p.id = b.pipeline_id LEFT JOIN reduction_step s ON s.id = b.step_id
        CROSS JOIN LATERAL (
            SELECT count(*) AS units, count(*) FILTER (WHERE state = 'waiting') AS waiting,
                count(*) FILTER (WHERE state = 'begun') AS begun, count(*) FILTER (WHERE state = 'done') AS done,
                count(*) FILTER (WHERE state = 'failed') AS failed, count(*) FILTER (WHERE state = 'skipped') AS skipped
            FROM backfill_unit x WHERE x.backfill_id = b.id) n
        CROSS JOIN LATERAL (
            SELECT count(*) FILTER (WHERE r.state = 'PENDING') AS pending,
                count(*) FILTER (WHERE r.state IN {_listed(HOLDS_SLOT)}) AS in_flight
            FROM backfill_unit x JOIN run r ON (r.step_id, r.unit_id) = (x.step_id, x.unit_id) AND r.state IN {_ACTIVE}
            WHERE x.backfill_id = b.id AND x.state = 'begun') a
        WHERE b.location_id = :loc AND {_asked("b.name", "name")}
        ORDER BY b.state IN ('running', 'paused') DESC, b.id DESC LIMIT :limit
        """,
        loc=location_id,
        name=name,
        limit=limit,
    )
