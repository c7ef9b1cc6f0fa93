"""What people do to pipelines and runs, each in one transaction, with their name and their reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from wfm import gaps, plan, schema
from wfm.catalogue import called_now, emit, lock
from wfm.decide import AgainFacts, MoveFacts, not_again
from wfm.errors import NotFoundError, RefusedError
from wfm.events import ENTRANCES, Message, ObservationLost, PipelineChanged, WaiverChanged
from wfm.grouping import unknown
from wfm.model import Actor, Role, RunState
from wfm.roles import next_attempt
from wfm.schema import MEMBER_NAME
from wfm.store import Move, RunRow, Tx, encode
from wfm.views.approvals import HELD, ApprovalLine, approvals


class Moved(Struct, frozen=True):
    """The runs that moved, as they are now, and why the others did not; by id."""

    moved: Mapping[int, RunRow]
    refused: Mapping[int, RefusedError]


def _locked(tx: Tx, ids: Sequence[int]) -> dict[int, RunRow]:
    runs = tx.lock_runs(ids)
    missing = sorted(set(ids) - set(runs))
    if missing:
        raise NotFoundError(f"no such run: {', '.join(map(str, missing))}; see `wfm runs list`")
    return runs


def cancel_runs(tx: Tx, ids: Sequence[int], actor: Actor) -> Moved:
    """Cancel runs. Those that may have a job are CANCELLED only when the backend confirms."""
    message = f"cancelled by {actor.name}" + (f": {actor.reason}" if actor.reason else "")
    runs = _locked(tx, ids)
    return Moved(*tx.move([Move(r, "cancel", actor, sets={"message": message, "failure": ""}) for r in runs.values()]))


def retry_runs(tx: Tx, ids: Sequence[int], actor: Actor, **sets: Any) -> Moved:
    """Begin another attempt of runs that FAILED or were CANCELLED, with all their retries.

    `sets` are other columns of the runs, such as their priority. Refused where another run of the same unit is on its
    way, or where the unit wants other inputs by now.
    """
    return _again(tx, ids, "retry", RunState.PENDING, actor, **sets)


def redrive_runs(tx: Tx, ids: Sequence[int], begin: RunState, actor: Actor, **sets: Any) -> Moved:
    """Begin another attempt of ended runs, of COMPLETED ones too, by the newest chart.

    Products of earlier attempts count until those of the new one are collected, and are superseded then. What depends
    on the unit waits meanwhile, and is not run again: a repeated result of the same inputs, version and config counts
    as the same.

    Args:
        begin: PENDING does everything again; COLLECTING_RESULTS collects once more what the last job left.
        sets: other columns of the runs, such as their priority.

    Refused where the same would be refused to `retry_runs`, and where there is nothing to collect.
    """
    trigger = {RunState.PENDING: "redrive", RunState.COLLECTING_RESULTS: "recollect"}[begin]
    return _again(tx, ids, trigger, begin, actor, chart_version=tx.chart.version, **sets)


def _again(tx: Tx, ids: Sequence[int], trigger: str, begin: RunState, actor: Actor, **sets: Any) -> Moved:
    runs = _locked(tx, ids)
    unfit = {
        r.id: RefusedError(f"run {r.id}: {reason}")
        for r in tx.all(
            """
            SELECT r.id, s.active AND p.deleted_at IS NULL AS part, c.wanted IS NOT DISTINCT FROM r.wanted AS newest,
                a.id AS active, r.exit_code, r.probe_of, EXISTS (SELECT 1 FROM task t WHERE t.run_id = r.id
                    AND t.attempt = r.attempt AND t.kind = 'purge' AND t.state <> 'closed') AS purged
            FROM run r JOIN reduction_step s ON s.id = r.step_id JOIN pipeline p ON p.id = r.pipeline_id
            LEFT JOIN run a ON (a.step_id, a.unit_id) = (r.step_id, r.unit_id) AND a.id <> r.id
                AND a.finished_at IS NULL
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (r.step_id, r.unit_id)
            WHERE r.id = ANY(:ids) AND r.finished_at IS NOT NULL
            """,
            ids=list(runs),
        )
        if (reason := not_again(AgainFacts(r.part, r.newest, r.active, r.exit_code, r.purged, r.probe_of), begin))
    }
    moves = []
    for i, run in runs.items():
        if i not in unfit:
            kept = {"attempt": run.attempt + 1} if begin is RunState.COLLECTING_RESULTS else next_attempt(run)
            cleared = {"failures": 0, "failure": "", "message": ""}
            facts = MoveFacts(exit_record=run.exit_code == 0)
            moves.append(Move(run, trigger, actor, facts, {**kept, **cleared, **sets}))
    moved, refused = tx.move(moves)
    return Moved(moved, {**unfit, **refused})


def _pipeline(tx: Tx, name: str, step: str | None = None) -> Any:
    rows = tx.all(
        """
        SELECT p.id, p.name, p.location_id, s.id AS step_id FROM pipeline p
        LEFT JOIN reduction_step s ON s.pipeline_id = p.id AND s.active AND s.name = :step
        WHERE p.name = :name AND p.deleted_at IS NULL
        """,
        name=name,
        step=step or "",
    )
    if not rows:
        known = tx.all("SELECT name FROM pipeline WHERE deleted_at IS NULL ORDER BY name")
        now = called_now(tx.conn, schema.pipeline, name)
        raise NotFoundError(unknown("pipeline", name, [p.name for p in known], now))
    if step and rows[0].step_id is None:
        now = called_now(tx.conn, schema.reduction_step, step, name)
        hint = f"it is called {now!r} now" if now else f"see `wfm get pipeline {name}`"
        raise NotFoundError(f"pipeline {name!r} has no step {step!r}; {hint}")
    return rows[0]


def _tell(tx: Tx, pipeline: Any, actor: Actor) -> None:
    """Have the trigger-manager look at the pipeline, and the workflow-manager at what waits for it."""
    event = PipelineChanged(pipeline=pipeline.name, pipeline_id=pipeline.id)
    tx.emit(pipeline.location_id, event, ENTRANCES["pipeline.changed"], actor)


def pause(tx: Tx, pipeline: str, step: str | None, unit: str | None, actor: Actor) -> None:
    """Start nothing new in a pipeline, a step, or a unit of these; what runs goes on."""
    _set_pause(tx, pipeline, step, unit, actor, by=actor.name, reason=actor.reason)


def resume(tx: Tx, pipeline: str, step: str | None, unit: str | None, actor: Actor) -> bool:
    """Undo `pause`; returns whether there was something to undo."""
    return _set_pause(tx, pipeline, step, unit, actor, by="", reason="")


def _set_pause(
    tx: Tx, pipeline: str, step: str | None, unit: str | None, actor: Actor, *, by: str, reason: str
) -> bool:
    row = _pipeline(tx, pipeline, step)
    if unit:
        changed = _pause_unit(tx, row, unit, by, reason)
    else:
        table, key = ("reduction_step", row.step_id) if step else ("pipeline", row.id)
        changed = tx.run(
            f"UPDATE {table} SET paused_by = :by, paused_reason = :reason"
            " WHERE id = :id AND (paused_by <> '' OR :by <> '')",
            by=by,
            reason=reason,
            id=key,
        )
    if changed:
        _tell(tx, row, actor)
    return changed > 0


def _pause_unit(tx: Tx, pipeline: Any, unit: str, by: str, reason: str) -> int:
    """Of every step that has the unit, or of the one named."""
    found = tx.all(
        """
        INSERT INTO coverage (step_id, unit_id, state, why)
        SELECT s.id, u.id, 'waiting', 'arrivals_not_sorted_yet'
        FROM reduction_step s JOIN unit u ON u.pipeline_id = s.pipeline_id AND u.dims = s.dims
        WHERE s.pipeline_id = :pipeline AND s.active AND (:step = 0 OR s.id = :step) AND u.key = :unit
        ORDER BY s.id, u.id ON CONFLICT (step_id, unit_id) DO UPDATE SET updated_at = coverage.updated_at
        RETURNING step_id, unit_id
        """,
        pipeline=pipeline.id,
        step=pipeline.step_id or 0,
        unit=unit,
    )
    if not found:
        raise _no_unit(tx, pipeline, unit)
    return tx.run(
        "UPDATE coverage SET paused_by = :by, paused_reason = :reason"
        " WHERE step_id = ANY(:steps) AND unit_id = ANY(:units) AND (paused_by <> '' OR :by <> '')",
        by=by,
        reason=reason,
        steps=[r.step_id for r in found],
        units=[r.unit_id for r in found],
    )


def _no_unit(tx: Tx, pipeline: Any, unit: str) -> NotFoundError:
    """That a pipeline, or the step of it that is named, has no such unit, with the nearest one."""
    near = tx.all(
        """
        SELECT u.key FROM unit u WHERE u.pipeline_id = :pipeline
            AND u.dims IN (SELECT dims FROM reduction_step s WHERE s.pipeline_id = :pipeline AND s.active
                AND (:step = 0 OR s.id = :step))
        GROUP BY u.key ORDER BY abs(length(u.key) - :length), u.key LIMIT 2000
        """,
        pipeline=pipeline.id,
        step=pipeline.step_id or 0,
        length=len(unit),
    )
    # By their names as people write them, without the digest (16 digits) at the end.
    return NotFoundError(unknown("unit", unit, sorted({r.key[:-17] or r.key for r in near})))


def set_enabled(tx: Tx, pipeline: str, enabled: bool, actor: Actor) -> None:
    """Enable or disable a pipeline."""
    row = _pipeline(tx, pipeline)
    tx.run("UPDATE pipeline SET enabled = :on WHERE id = :id", on=enabled, id=row.id)
    _tell(tx, row, actor)


def trigger(tx: Tx, pipeline: str, step: str | None, unit: str | None, actor: Actor) -> int:
    """Ask for the gaps of a pipeline (of a step, of a unit) to run now; returns how many (step, unit) were asked for.

    A pipeline with trigger MANUAL runs only so, one with CRON also so. What is covered stays covered; what is held for
    approval stays held, unless its unit is named.
    """
    row = _pipeline(tx, pipeline, step)
    asked = tx.run(
        f"""
        INSERT INTO coverage (step_id, unit_id, state, why, requested, requested_for)
        SELECT s.id, u.id, 'waiting', 'arrivals_not_sorted_yet', true, :by
        FROM reduction_step s JOIN unit u ON u.pipeline_id = s.pipeline_id AND u.dims = s.dims
        WHERE s.pipeline_id = :pipeline AND s.active AND (:step = 0 OR s.id = :step) AND (:unit = '' OR u.key = :unit)
        ORDER BY s.id, u.id ON CONFLICT (step_id, unit_id) DO UPDATE
            SET requested = true, requested_for = excluded.requested_for
            WHERE :unit <> '' OR coverage.why NOT IN {HELD}
        """,
        by=f"asked for by {actor.name}" + (f": {actor.reason}" if actor.reason else ""),
        pipeline=row.id,
        step=row.step_id or 0,
        unit=unit or "",
    )
    if unit and not asked:
        raise _no_unit(tx, row, unit)
    _tell(tx, row, actor)
    return asked


def approve(tx: Tx, location_id: int, pipeline: str, step: str | None, actor: Actor) -> list[ApprovalLine]:
    """Let what is stale and held in a pipeline or a step run again; returns what was held.

    Raises:
        NotFoundError: no such pipeline or step. RefusedError: nothing is held there.
    """
    row = _pipeline(tx, pipeline, step)
    held = approvals(tx.conn, location_id, pipeline, step)
    if not held:
        where = f"{pipeline}/{step}" if step else pipeline
        raise RefusedError(f"nothing is held for approval in {where}; see `wfm approve --list` and `wfm why {where}`")
    wishes = [a.wish for a in held]
    tx.run(
        "UPDATE step_wish SET approved_by = :by, approved_reason = :reason, approved_at = now() WHERE id = ANY(:ids)",
        by=actor.name,
        reason=actor.reason,
        ids=wishes,
    )
    # Units that want what they have, but for a revocation: another version or config needs an approval of its own.
    tx.run(
        f"""
        UPDATE coverage c SET requested = true FROM step_wish w, run r
        WHERE w.id = ANY(:ids) AND c.step_id = w.step_id AND c.why IN {HELD} AND r.id = c.run_id
            AND (r.software_version_id, r.config_revision_id)
                IS NOT DISTINCT FROM (w.software_version_id, w.config_revision_id)
        """,
        ids=wishes,
    )
    what = "; ".join(f"{a.units} units of {a.step} with {a.wanted}" for a in held)
    _tell(tx, row, Actor(actor.name, f"approved: {what}: {actor.reason}"))
    return held


# --- quarantine ---


class Released(Struct, frozen=True):
    """Members that were in quarantine and are used again.

    Attributes:
        members: their names. retried: the run with the whole input that begins another attempt, None if another run
            does what is to be done. refused: why it did not; empty if nothing was refused.
    """

    members: list[str]
    retried: int | None
    refused: str = ""


def release_quarantine(tx: Tx, pipeline: str, step: str, unit: str, member: str | None, actor: Actor) -> Released:
    """Use members of a unit again that were left out since it failed on them, and try it with them.

    The run that failed with them begins another attempt, so that they are looked for anew should it fail again.

    Args:
        member: name of a package or key of a finer unit; None for all of the unit.

    Raises:
        NotFoundError: no such pipeline, step, unit, or no such member in quarantine there.
        RefusedError: nothing of the unit is in quarantine.
    """
    row = _pipeline(tx, pipeline, step)
    found = tx.all(
        """
        SELECT c.step_id, c.unit_id, c.quarantined FROM coverage c JOIN unit u ON u.id = c.unit_id
        WHERE c.step_id = :step AND u.key = :unit FOR NO KEY UPDATE OF c
        """,
        step=row.step_id,
        unit=unit,
    )
    if not found:
        raise _no_unit(tx, row, unit)
    pair = found[0].step_id, found[0].unit_id
    aside = {
        r.member: r.id
        for r in tx.all(
            f"SELECT w.id, {MEMBER_NAME} AS member FROM quarantine w WHERE w.id = ANY(:ids)",
            ids=found[0].quarantined or [],
        )
    }
    if not aside:
        raise RefusedError(f"nothing of {pipeline}/{step} {unit} is in quarantine; see `wfm quarantine`")
    if member is not None and member not in aside:
        raise NotFoundError(unknown("member in quarantine", member, sorted(aside)))
    ids = [aside[member]] if member is not None else list(aside.values())
    released = gaps.release(tx, ids, actor)
    gaps.evaluate(tx, [pair], actor)
    names = sorted(r.member for r in released)
    failed = tx.all(
        """
        SELECT r.id FROM coverage c JOIN run r ON (r.step_id, r.unit_id, r.wanted) = (c.step_id, c.unit_id, c.wanted)
        WHERE (c.step_id, c.unit_id) = (:step, :unit) AND r.state = 'FAILED' AND r.probe_of IS NULL
        ORDER BY r.id DESC LIMIT 1
        """,
        step=pair[0],
        unit=pair[1],
    )
    if failed:
        moved = retry_runs(tx, [failed[0].id], actor)
        refused = moved.refused.get(failed[0].id)
        return Released(names, None if refused else failed[0].id, str(refused) if refused else "")
    tx.run(
        "UPDATE coverage SET requested = true, requested_for = :by WHERE (step_id, unit_id) = (:step, :unit)",
        by=f"released from quarantine by {actor.name}: {actor.reason}",
        step=pair[0],
        unit=pair[1],
    )
    gaps.evaluate(tx, [pair], actor)
    return Released(names, None)


# --- waivers ---


class _Waived(Struct, frozen=True):
    """What a waiver is about: the ids of its row, and the names of its event."""

    package_id: int | None
    step_id: int | None
    unit_id: int | None
    event: WaiverChanged


def waive(
    tx: Tx, location_id: int, packages: Sequence[str], units: Mapping[str, Sequence[str]], until: datetime, actor: Actor
) -> int:
    """Say that packages, or units of steps, need not be covered until then; returns how many.

    It counts for the certificate of a night alone: what is waived still runs, and is waited for. A waiver takes the
    place of an older one about the same.

    Args:
        units: their keys, by ``PIPELINE/STEP``.

    Raises:
        NotFoundError: with every name that does not exist; nothing is waived then.
    """
    things = _to_waive(tx, location_id, packages, units, until)
    _end_waivers(tx, things, Actor(actor.name, "another waiver takes its place"))
    tx.run(
        """
        INSERT INTO waiver (package_id, step_id, unit_id, until, actor, reason)
        SELECT package_id, step_id, unit_id, :until, :actor, :reason FROM jsonb_to_recordset(CAST(:rows AS jsonb))
            AS w(package_id bigint, step_id bigint, unit_id bigint)
        """,
        until=until,
        actor=actor.name,
        reason=actor.reason,
        rows=encode(things),
    )
    _tell_waivers(tx, location_id, things, actor)
    return len(things)


def end_waivers(
    tx: Tx, location_id: int, packages: Sequence[str], units: Mapping[str, Sequence[str]], actor: Actor
) -> int:
    """End waivers before their time; returns how many were in force.

    Raises:
        NotFoundError: with every name that does not exist. RefusedError: something that is not waived; nothing ends.
    """
    things = _to_waive(tx, location_id, packages, units, None)
    ended = _end_waivers(tx, things, actor)
    if len(ended) < len(things):
        names = [t.event.package or f"{t.event.pipeline}/{t.event.step} {t.event.unit}" for t in things]
        raise RefusedError(f"not all of this is waived: {', '.join(names)}; see `wfm waive --list`")
    _tell_waivers(tx, location_id, things, actor)
    return len(ended)


def _to_waive(
    tx: Tx,
    location_id: int,
    packages: Sequence[str],
    units: Mapping[str, Sequence[str]],
    until: datetime | None,
) -> list[_Waived]:
    more: dict[str, Any] = {"until": "" if until is None else until.isoformat(), "ended": until is None}
    pairs = [(target, key) for target, keys in units.items() for key in keys]
    known = {
        r.name: r.id
        for r in tx.all("SELECT id, name FROM raw_data_package WHERE name = ANY(:names)", names=list(packages))
    }
    found = {
        (r.target, r.key): r
        for r in tx.all(
            """
            SELECT p.name || '/' || s.name AS target, p.name AS pipeline, s.name AS step, u.key, s.id AS step_id,
                u.id AS unit_id
            FROM unnest(CAST(:targets AS text[]), CAST(:keys AS text[])) AS q(target, key)
            JOIN pipeline p ON p.name = split_part(q.target, '/', 1) AND p.location_id = :loc AND p.deleted_at IS NULL
            JOIN reduction_step s ON s.pipeline_id = p.id AND s.active AND s.name = split_part(q.target, '/', 2)
            JOIN unit u ON u.pipeline_id = p.id AND u.dims = s.dims AND u.key = q.key
            """,
            loc=location_id,
            targets=[target for target, _ in pairs],
            keys=[key for _, key in pairs],
        )
    }
    faults = [f"unknown raw data package {name!r}; see `wfm data list`" for name in packages if name not in known]
    faults += [f"{t} has no unit {k!r}; see `wfm why {t}`" for t, k in pairs if (t, k) not in found]
    if faults:
        raise NotFoundError("\n".join(faults))
    about = [_Waived(known[name], None, None, WaiverChanged(package=name, **more)) for name in dict.fromkeys(packages)]
    return about + [
        _Waived(None, r.step_id, r.unit_id, WaiverChanged(pipeline=r.pipeline, step=r.step, unit=r.key, **more))
        for r in found.values()
    ]


def _end_waivers(tx: Tx, things: Sequence[_Waived], actor: Actor) -> list[int]:
    """End what is in force of these; those whose time is over make room, but are not counted."""
    rows = tx.all(
        """
        UPDATE waiver w SET ended_at = now(), ended_by = :actor, ended_reason = :reason
        FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS t(package_id bigint, step_id bigint, unit_id bigint)
        WHERE w.ended_at IS NULL AND (w.package_id = t.package_id OR (w.step_id, w.unit_id) = (t.step_id, t.unit_id))
        RETURNING w.id, w.until > now() AS counts
        """,
        actor=actor.name,
        reason=actor.reason,
        rows=encode(things),
    )
    return [r.id for r in rows if r.counts]


def _tell_waivers(tx: Tx, location_id: int, things: Sequence[_Waived], actor: Actor) -> None:
    told = [(location_id, t.event) for t in things]
    tx.load_events(emit(tx.conn, told, actor=actor.name, reason=actor.reason))


# --- the observing plan ---


def lose(tx: Tx, location_id: int, names: Sequence[str], actor: Actor) -> None:
    """Declare scheduled observations lost: nothing waits for them any more, and they are no absence.

    Raises:
        NotFoundError: with every name that does not exist; nothing is lost then.
    """
    lock(tx.conn)
    rows = tx.all(
        "UPDATE scheduled_observation SET state = 'lost', lost_by = :actor, lost_reason = :reason"
        " WHERE name = ANY(:names) RETURNING name",
        names=list(names),
        actor=actor.name,
        reason=actor.reason,
    )
    if missing := sorted({*names} - {r.name for r in rows}):
        known = [r.name for r in tx.all("SELECT name FROM scheduled_observation ORDER BY name")]
        raise NotFoundError("\n".join(unknown("scheduled observation", name, known) for name in missing))
    plan.look_again(tx.conn)
    told = [(location_id, ObservationLost(scheduled_observation=r.name)) for r in rows]
    tx.load_events(emit(tx.conn, told, actor=actor.name, reason=actor.reason))


# --- the ledger ---


def republish(tx: Tx, location_id: int, ids: Sequence[int] | None = None) -> int:
    """Publish pending events again now (all, or these); returns how many."""
    rows = tx.all(
        """
        UPDATE event SET publish_at = now() + :later * interval '1 s', publishes = publishes + 1
        WHERE location_id = :loc AND done_at IS NULL AND (:any OR id = ANY(:ids)) RETURNING id
        """,
        loc=location_id,
        any=ids is None,
        ids=list(ids or ()),
        later=tx.republish_seconds,
    )
    tx.load_events([r.id for r in rows])
    return len(rows)


def resend_dead(tx: Tx, location_id: int, ids: Sequence[int], actor: Actor) -> int:
    """Put dead letters back on their streams, as they were; their events are pending again.

    To be published before the commit, since not every letter has an event that would be published again.
    """
    rows = _dead(tx, location_id, ids, "resent", actor)
    tx.outbox += [Message(r.kind, r.recipient, bytes(r.body)) for r in rows]
    tx.run(
        "UPDATE event SET done_at = NULL, failures = 0, publish_at = now() + :later * interval '1 s'"
        " WHERE id = ANY(:ids)",
        ids=[r.event_id for r in rows if r.event_id is not None],
        later=tx.republish_seconds,
    )
    return len(rows)


def drop_dead(tx: Tx, location_id: int, ids: Sequence[int], actor: Actor) -> int:
    """Mark dead letters as dropped; their bytes stay."""
    return len(_dead(tx, location_id, ids, "dropped", actor))


class _Letter(Struct, frozen=True):
    kind: str
    recipient: str
    body: bytes
    event_id: int | None


def _dead(tx: Tx, location_id: int, ids: Sequence[int], state: str, actor: Actor) -> list[_Letter]:
    """Settle open dead letters of a location, all or none.

    Raises:
        NotFoundError: with every letter that is not there. RefusedError: with every letter that cannot be settled so.
    """
    found = {
        r.id: r
        for r in tx.all(
            "SELECT id, location_id, stream, body, event_id, state, actor FROM dead_letter WHERE id = ANY(:ids)"
            " ORDER BY id FOR NO KEY UPDATE",
            ids=list(ids),
        )
    }
    faults = [f"dead letter {i} does not exist; see `wfm events dead list`" for i in sorted(set(ids) - set(found))]
    if faults:
        raise NotFoundError("\n".join(faults))
    letters = []
    for r in found.values():
        kind = r.stream.rsplit(":", 1)[-1]
        recipient = _recipient(tx, kind)
        letters.append(_Letter(kind, recipient, r.body, r.event_id))
        if r.location_id != location_id:
            faults.append(f"dead letter {r.id} belongs to location {r.location_id}, and this is {location_id}")
        if r.state != "open":
            faults.append(f"dead letter {r.id} was {r.state} by {r.actor} already")
        if state == "resent" and not recipient:
            faults.append(f"dead letter {r.id}: nobody reads a stream {kind!r}; drop it instead")
    if faults:
        raise RefusedError("\n".join(faults))
    tx.run(
        "UPDATE dead_letter SET state = :state, actor = :actor, actor_reason = :reason, settled_at = now()"
        " WHERE id = ANY(:ids)",
        state=state,
        actor=actor.name,
        reason=actor.reason,
        ids=list(found),
    )
    return letters


def _recipient(tx: Tx, kind: str) -> Role | str:
    emits = (e for s in tx.chart.states.values() for e in s.emits if e.event == kind)
    return ENTRANCES.get(kind) or next((e.to for e in emits if e.to), "")
