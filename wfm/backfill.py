"""Backfills: a named piece of work over what there is now, with an order, a priority and a limit of its own.

What belongs to a backfill is fixed when it begins: one row for each (step, unit), in the order in which they are begun.
The trigger-manager begins them a few at a time (`Feeder`), so that the order holds, and that pausing or cancelling is
quick. What is to be done with a unit is decided when its turn comes, on the facts of then (`decide.refill`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Any, Literal

from msgspec import Struct

from wfm import gaps
from wfm.acts import _pipeline, redrive_runs, retry_runs
from wfm.decide import Refill, refill
from wfm.errors import NotFoundError, RefusedError
from wfm.grouping import unknown
from wfm.model import FINAL_STATES, Actor, BackfillKind, BackfillState, CoverageState, Role, RunState, Why
from wfm.schema import UNITS_INSIDE
from wfm.store import WITHDRAWN, Move, Tx, encode
from wfm.views import Estimate, estimate, step_costs
from wfm.views.lists import _like

AHEAD = 200
"""Runs that a backfill has waiting for a slot, at most; fewer where its limit is lower."""

_FINAL = "('" + "','".join(sorted(FINAL_STATES)) + "')"


class Selection(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a backfill is about.

    Attributes:
        pipeline, step: names; None for all steps.
        since, until: units with an observation that began then; the end is excluded.
        units: a unit's key, or its key without the digest at its end; there ``*`` is any text and ``?`` one character.
        order: by the time of observation. A unit of several observations has its turn when all of them had theirs.
    """

    pipeline: str
    step: str | None = None
    kind: BackfillKind
    since: datetime | None = None
    until: datetime | None = None
    units: str | None = None
    order: Literal["oldest", "newest"] = "oldest"


class WorkLine(Struct, frozen=True):
    """Units of a step, and the core-hours that they will take; None where no run of the step has completed yet."""

    step: str
    units: int
    core_hours: float | None


class Preview(Struct, frozen=True, kw_only=True):
    """What a backfill would begin, by step, and what that will cost."""

    steps: list[WorkLine]
    cost: Estimate

    @property
    def units(self) -> int:
        """How many (step, unit) pairs it has."""
        return sum(line.units for line in self.steps)


# --- begin ---

_KINDS = {
    # In a step that reads others, what they have not made yet is missing as well.
    BackfillKind.MISSING: "c.run_id IS NULL AND (c.state IN ('waiting', 'held') OR c.why = 'upstream_failed')",
    BackfillKind.FAILED: "c.state = 'blocked' AND c.why = 'failed'",
    BackfillKind.STALE: "r.wanted <> c.wanted AND (c.state IN ('waiting', 'held') OR c.why = 'upstream_failed')",
    BackfillKind.ALL: "c.state NOT IN ('active', 'empty')",
}


def _pairs(selection: Selection) -> str:
    """The pairs of a selection, with the time of the unit."""
    times = "max" if selection.order == "oldest" else "min"
    return f"""
        SELECT c.step_id, c.unit_id, s.position, u.key, o.at
        FROM coverage c JOIN reduction_step s ON s.id = c.step_id JOIN unit u ON u.id = c.unit_id
        LEFT JOIN run r ON r.id = c.run_id
        CROSS JOIN LATERAL (
            SELECT {times}(e.started_at) AS at, coalesce(bool_or(
                e.started_at >= coalesce(CAST(:since AS timestamptz), '-infinity')
                AND e.started_at < coalesce(CAST(:until AS timestamptz), 'infinity')), false) AS inside
            FROM unit_member m JOIN raw_data_package k ON k.id = m.package_id
            JOIN executed_obs_unit e ON e.id = k.executed_obs_unit_id
            WHERE m.unit_id = c.unit_id AND m.removed IS NULL) o
        WHERE s.pipeline_id = :pipeline AND s.active AND (CAST(:step AS bigint) IS NULL OR s.id = :step)
            AND u.members > 0 AND {_KINDS[selection.kind]}
            AND (CAST(:units AS text) IS NULL OR u.key = :units
                OR regexp_replace(u.key, '-[0-9a-f]{{16}}$', '') ILIKE :like)
            AND (o.inside OR :always)
    """


def _params(selection: Selection, pipeline: Any) -> dict[str, Any]:
    return {
        "pipeline": pipeline.id,
        "step": pipeline.step_id,
        "since": selection.since,
        "until": selection.until,
        "always": selection.since is None and selection.until is None,
        "units": selection.units,
        "like": None if selection.units is None else _like(selection.units),
    }


def preview(tx: Tx, selection: Selection) -> Preview:
    """What a backfill would do.

    Raises:
        NotFoundError: no such pipeline or step.
    """
    pipeline = _pipeline(tx, selection.pipeline, selection.step)
    rows = tx.all(
        f"""
        SELECT s.id, s.name, count(*) AS units FROM ({_pairs(selection)}) q JOIN reduction_step s ON s.id = q.step_id
        GROUP BY s.id, s.name, s.position ORDER BY s.position
        """,
        **_params(selection, pipeline),
    )
    costs = step_costs(tx.conn, [r.id for r in rows])
    each = {r.id: estimate(costs, {r.id: r.units}) for r in rows}
    total = estimate(costs, {r.id: r.units for r in rows})
    return Preview(steps=[WorkLine(r.name, r.units, each[r.id].core_hours) for r in rows], cost=total)


def begin(
    tx: Tx, selection: Selection, *, name: str | None, priority: int | None, limit: int | None, actor: Actor
) -> str | None:
    """Begin a backfill.

    Args:
        name: None for the pipeline's name and a number. priority: None for one below that of the pipeline, so that new
            data goes first. limit: of its runs in flight.

    Returns:
        its name; None if there is nothing to do.

    Raises:
        NotFoundError: no such pipeline or step. RefusedError: the name is taken.
    """
    pipeline = _pipeline(tx, selection.pipeline, selection.step)
    if name is not None and tx.all("SELECT 1 FROM backfill WHERE name = :name", name=name):
        raise RefusedError(f"there is a backfill {name!r} already; see `wfm backfill status {name}`")
    (row,) = tx.all(
        """
        WITH new AS (SELECT nextval(pg_get_serial_sequence('backfill', 'id')) AS id)
        INSERT INTO backfill (id, location_id, name, pipeline_id, step_id, kind, selection, priority, max_in_flight,
            actor, reason)
        SELECT new.id, p.location_id, coalesce(:name, p.name || '-' || new.id), p.id, CAST(:step AS bigint), :kind,
            CAST(:selection AS jsonb), coalesce(CAST(:priority AS int), p.priority - 1), CAST(:most AS int), :actor,
            :reason
        FROM pipeline p, new WHERE p.id = :pipeline RETURNING id, name
        """,
        name=name,
        pipeline=pipeline.id,
        step=pipeline.step_id,
        kind=selection.kind,
        selection=encode(selection),
        priority=priority,
        most=limit,
        actor=actor.name,
        reason=actor.reason,
    )
    # What a unit is made of comes before it in either order, at the latest by the position of its step.
    direction = "ASC" if selection.order == "oldest" else "DESC"
    units = tx.run(
        f"""
        INSERT INTO backfill_unit (backfill_id, step_id, unit_id, place)
        SELECT :backfill, q.step_id, q.unit_id,
            row_number() OVER (ORDER BY q.at {direction} NULLS LAST, q.position, q.key, q.step_id)
        FROM ({_pairs(selection)}) q
        """,
        backfill=row.id,
        **_params(selection, pipeline),
    )
    if not units:
        tx.run("DELETE FROM backfill WHERE id = :id", id=row.id)
        return None
    return str(row.name)


# --- pause, resume, cancel ---


def _locked(tx: Tx, name: str) -> Any:
    rows = tx.all("SELECT * FROM backfill WHERE name = :name FOR NO KEY UPDATE", name=name)
    if not rows:
        known = tx.all("SELECT name FROM backfill ORDER BY id DESC LIMIT 2000")
        raise NotFoundError(unknown("backfill", name, sorted(b.name for b in known)))
    return rows[0]


def pause(tx: Tx, name: str, actor: Actor) -> None:
    """Begin nothing more of a backfill, and give its runs no slot; what has one goes on."""
    _set(tx, name, BackfillState.PAUSED, {BackfillState.RUNNING, BackfillState.PAUSED}, actor)


def resume(tx: Tx, name: str, actor: Actor) -> None:
    """Undo `pause`."""
    _set(tx, name, BackfillState.RUNNING, {BackfillState.PAUSED}, actor)


def cancel(tx: Tx, name: str, actor: Actor) -> None:
    """Begin nothing more of a backfill for good. Runs that it made and that have no slot yet are withdrawn."""
    _set(tx, name, BackfillState.CANCELLED, {BackfillState.RUNNING, BackfillState.PAUSED}, actor)


def _set(tx: Tx, name: str, state: BackfillState, allowed: Collection[str], actor: Actor) -> None:
    b = _locked(tx, name)
    if b.state not in allowed:
        raise RefusedError(f"backfill {name!r} is {b.state}; see `wfm backfill status {name}`")
    paused = state is BackfillState.PAUSED
    tx.run(
        "UPDATE backfill SET state = :state, paused_by = :by, paused_reason = :reason,"
        " finished_at = CASE WHEN :state = 'cancelled' THEN now() END WHERE id = :id",
        state=state,
        by=actor.name if paused else "",
        reason=actor.reason if paused else "",
        id=b.id,
    )
    pairs = _begun(tx, b.id)
    if state is BackfillState.CANCELLED:
        _let_go(tx, b, pairs, actor)
    gaps.evaluate(tx, pairs, actor)


def _begun(tx: Tx, backfill: int) -> list[gaps.Pair]:
    rows = tx.all(
        "SELECT step_id, unit_id FROM backfill_unit WHERE backfill_id = :id AND state = 'begun' ORDER BY 1, 2",
        id=backfill,
    )
    return [(r.step_id, r.unit_id) for r in rows]


def _lock_coverage(tx: Tx, pairs: Sequence[gaps.Pair]) -> None:
    tx.run(
        """
        SELECT 1 FROM coverage c JOIN unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
            ON (c.step_id, c.unit_id) = (q.s, q.u)
        ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )


def _let_go(tx: Tx, b: Any, pairs: Sequence[gaps.Pair], actor: Actor) -> None:
    """Withdraw what was made for this backfill and waits for its first slot, and ask for no unit any more."""
    _lock_coverage(tx, pairs)
    steps, units = [p[0] for p in pairs], [p[1] for p in pairs]
    waiting = tx.all(
        f"""
        SELECT r.id FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
        JOIN run r ON (r.step_id, r.unit_id) = (q.s, q.u) AND r.state NOT IN {_FINAL}
        WHERE r.state = 'PENDING' AND r.attempt = 1 AND r.backfill_id = :id
        """,
        steps=steps,
        units=units,
        id=b.id,
    )
    runs = tx.lock_runs([r.id for r in waiting], coverage=False)
    reason = f"backfill {b.name} was cancelled by {actor.name}" + (f": {actor.reason}" if actor.reason else "")
    sets = {"failure": WITHDRAWN, "message": reason}
    by = Actor(actor.name, reason)
    gone, _ = tx.move([Move(r, "withdraw", by, sets=sets) for r in runs.values() if r.state is RunState.PENDING])
    # A run that is withdrawn asks for another one in its place: not here.
    tx.run(
        """
        UPDATE coverage c SET requested = false, backfill_id = NULL
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
        WHERE (c.step_id, c.unit_id) = (q.s, q.u) AND (c.backfill_id = :id OR EXISTS (
            SELECT 1 FROM run r WHERE r.id = ANY(:gone) AND (r.step_id, r.unit_id) = (c.step_id, c.unit_id)))
        """,
        steps=steps,
        units=units,
        id=b.id,
        gone=list(gone),
    )
    tx.run(
        f"""
        UPDATE backfill_unit b SET state = 'skipped', note = 'the backfill was cancelled'
        WHERE b.backfill_id = :id AND b.state = 'begun' AND NOT EXISTS (SELECT 1 FROM run r
            WHERE (r.step_id, r.unit_id) = (b.step_id, b.unit_id) AND r.state NOT IN {_FINAL})
        """,
        id=b.id,
    )


# --- feed ---


def feeder(location_id: int) -> Callable[[Tx], None]:
    """A sweep of the trigger-manager: settles what backfills have begun, and begins more."""

    def work(tx: Tx) -> None:
        # A copy of this role that has one of them in hand does all that there is to do.
        for b in tx.all(
            "SELECT * FROM backfill WHERE location_id = :loc AND state IN ('running', 'paused')"
            " ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
            loc=location_id,
        ):
            _settle(tx, b)
            if b.state == BackfillState.RUNNING:
                _begin_more(tx, b)
                _end(tx, b)

    return work


def _settle(tx: Tx, b: Any, *, last: bool = False) -> None:
    """Note what became of begun units. One whose request was lost with its run has another turn.

    What stops upstream may be mended by the same backfill: only when nothing else of it is left (`last`) has it failed.
    """
    became = f"""
        SELECT b.step_id, b.unit_id, z.state, CASE WHEN z.state = 'failed' THEN c.reason ELSE '' END AS note
        FROM backfill_unit b JOIN coverage c ON (c.step_id, c.unit_id) = (b.step_id, b.unit_id)
        CROSS JOIN LATERAL (SELECT CASE
            WHEN c.state = 'covered' THEN 'done'
            WHEN c.state = 'empty' THEN 'skipped'
            WHEN c.state = 'blocked' AND (:last OR c.why <> 'upstream_failed') THEN 'failed'
            WHEN c.state = 'active' OR c.backfill_id IS NOT NULL THEN 'begun'
            WHEN EXISTS (SELECT 1 FROM run r WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id)
                AND r.state NOT IN {_FINAL}) THEN 'begun'
            ELSE 'waiting' END AS state) z
        WHERE b.backfill_id = :id AND b.state = 'begun' AND z.state <> 'begun'
    """
    _lock_coverage(tx, [(r.step_id, r.unit_id) for r in tx.all(became, id=b.id, last=last)])
    tx.run(
        f"""
        WITH settled AS (
            UPDATE backfill_unit b SET state = z.state, note = z.note FROM ({became}) z
            WHERE (b.backfill_id, b.step_id, b.unit_id) = (:id, z.step_id, z.unit_id)
            RETURNING b.step_id, b.unit_id, b.state)
        UPDATE coverage c SET requested = false, backfill_id = NULL FROM settled z
        WHERE (c.step_id, c.unit_id) = (z.step_id, z.unit_id) AND z.state = 'failed' AND c.backfill_id = :id
        """,
        id=b.id,
        last=last,
    )


def _begin_more(tx: Tx, b: Any) -> None:
    (pending,) = tx.all(
        f"""
        SELECT count(*) AS runs FROM backfill_unit b
        JOIN run r ON (r.step_id, r.unit_id) = (b.step_id, b.unit_id) AND r.state NOT IN {_FINAL}
        WHERE b.backfill_id = :id AND b.state = 'begun' AND r.state = 'PENDING'
        """,
        id=b.id,
    )
    room = min(b.max_in_flight or AHEAD, AHEAD) - pending.runs
    if room <= 0:
        return
    # What is done again reads the newest results: those that this backfill makes again have ended first. For all
    # others the gap engine waits by itself.
    after_upstream = f"""
        AND NOT EXISTS (
            SELECT 1 FROM reduction_step s JOIN unit u ON u.id = b.unit_id
            JOIN step_dependency d ON d.step_id = s.id JOIN reduction_step us ON us.id = d.upstream_id
            CROSS JOIN LATERAL ({UNITS_INSIDE}) l
            JOIN backfill_unit o ON (o.backfill_id, o.step_id, o.unit_id) = (b.backfill_id, us.id, l.id)
                AND o.state IN ('waiting', 'begun')
            WHERE s.id = b.step_id)
    """
    pairs = [
        (r.step_id, r.unit_id)
        for r in tx.all(
            f"""
            SELECT b.step_id, b.unit_id FROM backfill_unit b WHERE b.backfill_id = :id AND b.state = 'waiting'
                {after_upstream if b.kind == BackfillKind.ALL else ""}
            ORDER BY b.place LIMIT :room
            """,
            id=b.id,
            room=room,
        )
    ]
    if pairs:
        _turn(tx, b, pairs)


def _turn(tx: Tx, b: Any, pairs: Sequence[gaps.Pair]) -> None:
    """Do with these units what the facts of now ask for."""
    actor = Actor(Role.TRIGGER_MANAGER, f"backfill {b.name}, by {b.actor}" + (f": {b.reason}" if b.reason else ""))
    gaps.evaluate(tx, pairs, actor)
    _lock_coverage(tx, pairs)
    steps, units = [p[0] for p in pairs], [p[1] for p in pairs]
    runs: dict[Refill, dict[int, gaps.Pair]] = defaultdict(dict)
    ask: list[gaps.Pair] = []
    notes: dict[gaps.Pair, str] = {}
    for r in tx.all(
        """
        SELECT c.step_id, c.unit_id, c.state, c.why, c.run_id, f.id AS failed
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) WITH ORDINALITY AS q(s, u, n)
        JOIN coverage c ON (c.step_id, c.unit_id) = (q.s, q.u)
        LEFT JOIN LATERAL (SELECT r.id FROM run r WHERE (r.step_id, r.unit_id, r.wanted) = (q.s, q.u, c.wanted)
            AND r.state IN ('FAILED', 'CANCELLED') AND r.failure <> :withdrawn AND r.probe_of IS NULL
            ORDER BY r.id DESC LIMIT 1) f ON true
        ORDER BY q.n
        """,
        steps=steps,
        units=units,
        withdrawn=WITHDRAWN,
    ):
        pair = (r.step_id, r.unit_id)
        what, note = refill(BackfillKind(b.kind), CoverageState(r.state), Why(r.why))
        match what:
            case Refill.ASK:
                ask.append(pair)
            case Refill.RETRY | Refill.REDRIVE:
                runs[what][r.failed if what is Refill.RETRY else r.run_id] = pair
            case Refill.SKIP:
                notes[pair] = note
    sets = {"priority": b.priority, "backfill_id": b.id}
    retried = retry_runs(tx, sorted(runs[Refill.RETRY]), actor, **sets)
    redriven = redrive_runs(tx, sorted(runs[Refill.REDRIVE]), RunState.PENDING, actor, **sets)
    for refused, tried in ((retried.refused, runs[Refill.RETRY]), (redriven.refused, runs[Refill.REDRIVE])):
        notes |= {tried[i]: str(fault) for i, fault in refused.items()}
    tx.run(
        """
        UPDATE backfill_unit b SET state = q.state, note = q.note
        FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS q(step_id bigint, unit_id bigint, state text, note text)
        WHERE (b.backfill_id, b.step_id, b.unit_id) = (:id, q.step_id, q.unit_id)
        """,
        id=b.id,
        rows=encode(
            [
                {
                    "step_id": s,
                    "unit_id": u,
                    "state": "skipped" if (s, u) in notes else "begun",
                    "note": notes.get((s, u), ""),
                }
                for s, u in pairs
            ]
        ),
    )
    if ask:
        tx.run(
            """
            UPDATE coverage c SET requested = true, backfill_id = :id
            FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
            WHERE (c.step_id, c.unit_id) = (q.s, q.u)
            """,
            id=b.id,
            steps=[p[0] for p in ask],
            units=[p[1] for p in ask],
        )
        gaps.evaluate(tx, ask, actor)


def _end(tx: Tx, b: Any) -> None:
    """A backfill is done when nothing of it is open."""
    if tx.all("SELECT 1 FROM backfill_unit WHERE backfill_id = :id AND state = 'waiting' LIMIT 1", id=b.id):
        return
    left = """
        SELECT 1 FROM backfill_unit b JOIN coverage c ON (c.step_id, c.unit_id) = (b.step_id, b.unit_id)
        WHERE b.backfill_id = :id AND b.state = 'begun' AND c.why <> :but LIMIT 1
    """
    if not tx.all(left, id=b.id, but=Why.UPSTREAM_FAILED):
        _settle(tx, b, last=True)
    if not tx.all(left, id=b.id, but=""):
        tx.run("UPDATE backfill SET state = 'done', finished_at = now() WHERE id = :id", id=b.id)
