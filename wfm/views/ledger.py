"""The log: events and dead letters."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from typing import Any, Literal

from msgspec import Struct
from sqlalchemy import Connection

from wfm import grouping
from wfm.errors import NotFoundError, UsageError
from wfm.events import TYPES
from wfm.views.sql import (
    _PIPELINES,
    _UNITS,
    _all,
    _asked,
    _column,
    _no_run,
    _require,
    _require_all,
    _require_location,
    _rows,
)

_PIPELINE_NOW = """coalesce(
    (SELECT p.name FROM run r JOIN pipeline p ON p.id = r.pipeline_id WHERE r.id = e.run_id),
    (SELECT p.name FROM pipeline p WHERE p.id::text = e.body ->> 'pipeline_id'),
    e.body ->> 'pipeline')"""
"""What the pipeline of event ``e`` is called now; its body has the name of then."""


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
    types: Collection[str] = (),
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
        run, pipeline, unit, location_id: what the event is about; None for all.
        types: only events of these types; all if empty.
        since, until: bounds of the event's time, the first included, the second not.
        after: cursor of an earlier page; None for the beginning.
        newest: the last `limit` of these events instead of the first.

    Returns:
        the events, and a cursor after which the next page begins, also if this one is empty.

    Raises:
        NotFoundError: no such location, run, pipeline, unit or event type; with every fault.
        UsageError: the cursor is none.
    """
    if location_id is not None:
        _require_location(conn, location_id)
    _require_all(
        lambda: None if run is None else _require_run(conn, run),
        lambda: _require(conn, "pipeline", pipeline, _PIPELINES),
        lambda: _require(conn, "unit", unit, _UNITS, pipeline=pipeline),
        *(lambda name=name: _require_type(name) for name in types),
    )
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
                AND {_asked(_PIPELINE_NOW, "pipeline")}
                AND {_asked("e.body ->> 'unit'", "unit")}
                AND (CAST(:types AS text[]) = '{{}}' OR e.type = ANY(:types))
                AND {_asked("e.created_at", "since", "timestamptz", ">=")}
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
        types=sorted(types),
        since=since,
        until=until,
        limit=limit,
    )
    return EventPage(found, found[-1].cursor if len(found) == limit else f"{horizon}-0")


def _require_run(conn: Connection, run: int) -> None:
    if not _column(conn, "SELECT 1 FROM run WHERE id = :id", id=run):
        _no_run(conn, run)


def _require_type(name: str) -> None:
    if name not in TYPES:
        raise NotFoundError(grouping.unknown("event type", name, TYPES))


def _cursor(cursor: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\d{1,20})-(\d{1,18})", cursor, re.ASCII)
    if match is None:
        raise UsageError(f"{cursor!r} is not a cursor: expected two numbers such as 1234-56, or {START} for the start")
    return match[1], int(match[2])


def log_end(conn: Connection) -> tuple[datetime, str]:
    """The time now, and a cursor behind everything that transactions write that have written something until now."""
    # A number of our own is larger than all that were given out. A snapshot's xmax is not: it counts ended ones.
    (row,) = _all(conn, "SELECT clock_timestamp() AS now, pg_current_xact_id()::text AS txid")
    return row["now"], f"{row['txid']}-0"


def is_before(cursor: str, other: str) -> bool:
    """Whether a cursor lies before another.

    Raises:
        UsageError: one of them is none.
    """
    (txid, last), (other_txid, other_last) = _cursor(cursor), _cursor(other)
    return (int(txid), last) < (int(other_txid), other_last)


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
        raise NotFoundError(f"unknown event {event_id}; see `wfm events list`")
    return found[0]


DeadLetterState = Literal["open", "resent", "dropped"]


class DeadLetterLine(Struct, frozen=True, kw_only=True):
    """A message that could not be handled.

    Attributes:
        reason: why it could not be handled. size: of its body in bytes. event_id: of its ledger row, if known.
        actor, actor_reason, settled_at: who sent it again or dropped it, why and when.
    """

    id: int
    location: str
    stream: str
    entry_id: str
    reason: str
    event_id: int | None
    state: DeadLetterState
    actor: str
    actor_reason: str
    settled_at: datetime | None
    created_at: datetime
    size: int


class DeadLetter(DeadLetterLine, frozen=True, kw_only=True):
    """The same with its body: the bytes as they came, and for people as text with the undecodable escaped."""

    body: bytes
    text: str


_DEAD_LETTER = """
SELECT d.id, l.name AS location, d.stream, d.entry_id, d.reason, d.event_id, d.state, d.actor, d.actor_reason,
    d.settled_at, d.created_at,
    octet_length(d.body) AS size, d.body
FROM dead_letter d JOIN data_location l ON l.id = d.location_id
"""


def dead_letters(
    conn: Connection, state: DeadLetterState | None = "open", *, location_id: int | None = None
) -> list[DeadLetterLine]:
    """Messages that could not be handled, the newest first; None for those of every state, or of every location."""
    return _rows(
        conn,
        DeadLetterLine,
        f"""
        {_DEAD_LETTER} WHERE {_asked("d.state", "state")} AND {_asked("d.location_id", "loc", "bigint")}
        ORDER BY d.id DESC
        """,
        state=state,
        loc=location_id,
    )


def dead_letter(conn: Connection, dead_letter_id: int) -> DeadLetter:
    """One message that could not be handled, with its bytes.

    Raises:
        NotFoundError: no such dead letter.
    """
    found = _all(conn, f"{_DEAD_LETTER} WHERE d.id = :id", id=dead_letter_id)
    if not found:
        raise NotFoundError(f"unknown dead letter {dead_letter_id}; see `wfm events dead list --state all`")
    body = bytes(found[0]["body"])
    return DeadLetter(**found[0] | {"body": body, "text": body.decode("utf-8", "backslashreplace")})
