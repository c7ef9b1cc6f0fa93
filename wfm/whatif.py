"""What would happen at the next look (`plan`), or if definitions were others (`what_if`).

The real gap engine works it out, and the transaction is rolled back: no row changes, no event is published. (Numbers
that sequences gave out are not given out again.) For `what_if` the future is computed twice in one transaction: with
the definitions as they are, and with the changed ones. Each time everything that is a gap becomes a run, every run
succeeds at once, and what depends on it follows, until nothing is left; the runs of the two futures are compared.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TypeVar

from msgspec import Struct
from sqlalchemy.exc import OperationalError

from wfm import documents, gaps, schema, views
from wfm.catalogue import called_now
from wfm.decide import Capacity, MoveFacts, PendingRun, admit
from wfm.documents import Change, Documents
from wfm.errors import NotFoundError, UnavailableError
from wfm.grouping import unknown
from wfm.model import Actor, CoverageState, RunState, Why
from wfm.store import WITHDRAWN, Move, Store, Tx
from wfm.views import Estimate, StepCost

T = TypeVar("T")


ACTOR = Actor("what-if")

_NEXT = {
    RunState.PENDING: "build",
    RunState.STAGING_DATA: "submit",
    RunState.SUBMITTED: "finish",
    RunState.RUNNING: "finish",
    RunState.COLLECTING_RESULTS: "collect",
    RunState.RETRY_WAIT: "retry_due",
    RunState.CANCELLING: "confirm_cancel",
}
"""The trigger by which a run comes nearer to its good end."""


class RunForecast(Struct, frozen=True):
    """A run that one of the futures has and the other has not.

    Attributes:
        reason: why it would be made; of one that is gone, what is the case instead.
        wave: 1 for runs that start at once, 2 for those that read the results of these, and so on.
        never_fits: why it could never start here; empty if it could.
    """

    pipeline: str
    step: str
    unit: str
    reason: str
    wave: int
    never_fits: str = ""


class Shift(Struct, frozen=True):
    """So many units of a step would end in another coverage state; None where there is no such unit."""

    pipeline: str
    step: str
    before: CoverageState | None
    after: CoverageState | None
    units: int


class WhatIf(Struct, frozen=True):
    """What changed definitions would do.

    Attributes:
        packages: how many recorded arrivals were looked at; None for the whole catalogue.
        changes: what becomes of each document.
        added, gone: runs that only the changed future has, and that only the unchanged one has.
        shifts: how coverage would end otherwise.
    """

    packages: int | None
    changes: list[Change]
    added: list[RunForecast]
    gone: list[RunForecast]
    shifts: list[Shift]


# --- plan ---


class Gaps(Struct, frozen=True, kw_only=True):
    """Units of a step that stand alike.

    Attributes:
        starts: a run of theirs would be made at the next look.
        run: the state of the run that they have already, or would have; None without one.
        why: the reason in coverage. reason: it in words, for one of them; of runs, what caused them.
        example: the key of one of them.
    """

    state: CoverageState
    why: Why
    starts: bool
    run: RunState | None
    reason: str
    units: int
    example: str


class PlannedStep(Struct, frozen=True, kw_only=True):
    """What the next look would make of the units of a step.

    Attributes:
        starts: runs that would be made. cost: of them. per_run: what one took so far.
    """

    pipeline: str
    step: str
    units: int
    starts: int
    cost: Estimate
    per_run: StepCost
    gaps: list[Gaps]


class Plan(Struct, frozen=True):
    """What the next look would do: runs that would be made, their cost, and every step."""

    starts: int
    cost: Estimate
    steps: list[PlannedStep]


def plan(
    store: Store, location_id: int, *, pipeline: str | None = None, step: str | None = None, seconds: float = 60.0
) -> Plan:
    """Compare the catalogue with coverage as the trigger-manager does, and say what it would start now, and why.

    Holds what the gap engine locks until it is done or gives up.

    Args:
        pipeline, step: look only at these; None for all.
        seconds: after which it gives up.

    Raises:
        NotFoundError: no such pipeline at this location, or no such step in it.
        UnavailableError: it took too long, or others held for too long what it needs.
    """

    def work(tx: Tx, in_time: Callable[[], None]) -> Plan:
        views.coverage_summary(tx.conn, location_id, pipeline)
        ids = None
        if pipeline is not None:
            ids = [r.id for r in tx.all("SELECT id FROM pipeline WHERE name = :name", name=pipeline)]
        gaps.reconcile(tx, location_id, ACTOR, ids, in_time)
        return _planned(tx, location_id, pipeline, step)

    return undone(store, work, seconds, "name a pipeline, or allow more seconds")


def _planned(tx: Tx, location_id: int, pipeline: str | None, step: str | None) -> Plan:
    steps = tx.all(
        """
        SELECT s.id, p.name AS pipeline, s.name AS step FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND s.active
            AND (CAST(:pipeline AS text) IS NULL OR p.name = :pipeline) ORDER BY p.name, s.position
        """,
        loc=location_id,
        pipeline=pipeline,
    )
    if step is not None:
        names = [s.step for s in steps]
        steps = [s for s in steps if s.step == step]
        if not steps:
            raise NotFoundError(
                unknown("step", step, names, called_now(tx.conn, schema.reduction_step, step, pipeline))
            )
    found: dict[int, list[Gaps]] = {s.id: [] for s in steps}
    for r in tx.all(
        """
        SELECT c.step_id, c.state, c.why, coalesce(t.actor = :actor, false) AS starts, r.state AS run,
            CASE WHEN r.id IS NOT NULL THEN t.reason ELSE min(c.reason) END AS reason,
            count(*) AS units, min(u.key) AS example
        FROM coverage c JOIN unit u ON u.id = c.unit_id
        LEFT JOIN run r ON (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.finished_at IS NULL
        LEFT JOIN transition t ON t.run_id = r.id AND t.version = 1
        WHERE c.step_id = ANY(:steps) GROUP BY c.step_id, c.state, c.why, 4, r.state, r.id IS NOT NULL, t.reason
        ORDER BY 4 DESC, array_position(CAST(:order AS text[]), c.state), count(*) DESC, c.why
        """,
        actor=ACTOR.name,
        steps=list(found),
        order=[str(s) for s in _PLAN_ORDER],
    ):
        found[r.step_id].append(
            Gaps(
                state=CoverageState(r.state),
                why=Why(r.why),
                starts=r.starts,
                run=RunState(r.run) if r.run else None,
                reason=r.reason,
                units=r.units,
                example=r.example,
            )
        )
    costs = views.step_costs(tx.conn, list(found))
    starts = {i: sum(g.units for g in some if g.starts) for i, some in found.items()}
    planned = [
        PlannedStep(
            pipeline=s.pipeline,
            step=s.step,
            units=sum(g.units for g in found[s.id]),
            starts=starts[s.id],
            cost=views.estimate(costs, {s.id: starts[s.id]}),
            per_run=costs[s.id],
            gaps=found[s.id],
        )
        for s in steps
    ]
    return Plan(sum(starts.values()), views.estimate(costs, starts), planned)


_PLAN_ORDER = (
    CoverageState.ACTIVE,
    CoverageState.WAITING,
    CoverageState.HELD,
    CoverageState.BLOCKED,
    CoverageState.COVERED,
    CoverageState.EMPTY,
)


# --- what becomes of units ---


class StepEffect(Struct, frozen=True):
    """What changed definitions make of the units of a step, before anything runs.

    Attributes:
        stale: units that were covered and are not any more.
        new: units that it did not have.
        orphaned: units that it has no more, or that it had when it was still part of its pipeline.
        runs: active runs that are withdrawn, or whose result will not be the one that is wanted.
    """

    pipeline: str
    step: str
    stale: int
    new: int
    orphaned: int
    runs: int


EFFECT_SECONDS = 10.0
"""How long `wfm apply` and `wfm diff` may take to say what becomes of units, while others wait for what they hold."""


def effects(store: Store, changed: Documents, location_id: int) -> list[StepEffect]:
    """What applying documents does to the units of the pipelines that they touch, by the real gap engine, and undone.

    Steps that nothing happens to are left out. Holds the same as `what_if` meanwhile.

    Raises:
        DocumentError: the documents do not fit the database.
        UnavailableError: it took longer than `EFFECT_SECONDS`, or others held for so long what it needs.
    """

    def work(tx: Tx, in_time: Callable[[], None]) -> list[StepEffect]:
        tx.run(
            f"""
            CREATE TEMPORARY TABLE before_change ON COMMIT DROP AS
            SELECT c.step_id, c.unit_id, c.state, s.active AND u.dims = s.dims AS part, r.id AS run_id
            FROM coverage c JOIN reduction_step s ON s.id = c.step_id JOIN unit u ON u.id = c.unit_id
            JOIN pipeline p ON p.id = s.pipeline_id AND p.location_id = {location_id:d} AND p.deleted_at IS NULL
            LEFT JOIN run r ON (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.finished_at IS NULL
            """
        )
        applied = documents.apply(tx.conn, changed, location_id=location_id, actor=ACTOR.name)
        if not applied.pipeline_ids_changed:
            return []
        gaps.reconcile(tx, location_id, ACTOR, applied.pipeline_ids_changed, in_time)
        return _effects(tx, applied.pipeline_ids_changed)

    return undone(store, work, EFFECT_SECONDS, "`wfm plan` shows it after the change")


def _effects(tx: Tx, pipelines: Sequence[int]) -> list[StepEffect]:
    rows = tx.all(
        """
        SELECT * FROM (
            SELECT p.name AS pipeline, s.name AS step, s.position,
                count(*) FILTER (WHERE z.here AND b.state = 'covered' AND c.state <> 'covered') AS stale,
                count(*) FILTER (WHERE z.here AND NOT coalesce(b.part AND b.state <> 'empty', false)) AS new,
                count(*) FILTER (WHERE NOT z.here AND b.part AND b.state <> 'empty') AS orphaned,
                count(b.run_id) FILTER (WHERE NOT z.here OR r.failure = :withdrawn OR c.why = 'newer_input') AS runs
            FROM coverage c JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id
            JOIN unit u ON u.id = c.unit_id
            LEFT JOIN before_change b ON (b.step_id, b.unit_id) = (c.step_id, c.unit_id)
            LEFT JOIN run r ON r.id = b.run_id
            CROSS JOIN LATERAL (SELECT s.active AND u.dims = s.dims AND c.state <> 'empty' AS here) z
            WHERE s.pipeline_id = ANY(:ids) GROUP BY p.name, s.id) e
        WHERE stale + new + orphaned + runs > 0 ORDER BY pipeline, position, step
        """,
        ids=list(pipelines),
        withdrawn=WITHDRAWN,
    )
    return [StepEffect(r.pipeline, r.step, r.stale, r.new, r.orphaned, r.runs) for r in rows]


# --- other definitions ---


_Unit = tuple[int, str]
"""(step id, unit key): a step that is renamed is the same, and ids of units are not those of the other future"""


class _Future(Struct):
    """By unit and wanted digest the runs; by unit the coverage (state, reason) in the end; by id pipeline and step."""

    runs: dict[tuple[_Unit, str], RunForecast]
    coverage: Mapping[_Unit, tuple[str, str]]
    names: Mapping[int, tuple[str, str]]


def what_if(
    store: Store,
    changed: Documents,
    location_id: int,
    *,
    limits: tuple[Capacity, Capacity],
    since: datetime | None = None,
    until: datetime | None = None,
    seconds: float = 60.0,
) -> WhatIf:
    """Compare the future under changed definitions with the one under those that are.

    Holds what the gap engine locks (the coverage and members of the units looked at, the active runs) and the lock of
    definitions and catalogue, until it is done or gives up.

    Args:
        limits: what the location holds at once, now and then.
        since, until: look only at packages whose arrival was recorded then, and at what their units lead to; the first
            included, the second not. None and None: at the whole catalogue.
        seconds: after which it gives up.

    Raises:
        DocumentError: the documents do not fit the database.
        UnavailableError: it took too long, or others held for too long what it needs.
    """

    def work(tx: Tx, in_time: Callable[[], None]) -> WhatIf:
        packages = None if since is None and until is None else _arrived(tx, location_id, since, until)
        with tx.conn.begin_nested() as savepoint:
            before = _future(tx, location_id, packages, limits[0], in_time)
            savepoint.rollback()
        applied = documents.apply(tx.conn, changed, location_id=location_id, actor=ACTOR.name)
        after = _future(tx, location_id, packages, limits[1], in_time)
        return _compare(before, after, applied.changes, packages)

    return undone(store, work, seconds, "narrow it with --since, or allow more seconds")


def undone(store: Store, work: Callable[[Tx, Callable[[], None]], T], seconds: float, advice: str) -> T:
    """The value of some work, in a transaction that is rolled back.

    Args:
        work: is also given what it has to call from time to time, and that ends it when it takes too long.
        seconds: after which it gives up, with this `advice`.

    Raises:
        UnavailableError: it took too long, or others held for too long what it needs.
    """
    end = time.monotonic() + seconds
    too_long = f"gave up after {seconds:g} s, so as not to hold others up: {advice}"

    def in_time() -> None:
        if time.monotonic() > end:
            raise UnavailableError(too_long)

    def attempt(tx: Tx) -> T:
        try:
            tx.run(
                "SELECT set_config('statement_timeout', :most, true), set_config('lock_timeout', :most, true)",
                most=f"{max(1, int((end - time.monotonic()) * 1000))}ms",
            )
            return work(tx, in_time)
        finally:
            tx.conn.rollback()

    try:
        return store.retrying(attempt)[0]
    except OperationalError as e:
        if getattr(e.orig, "pgcode", None) in ("57014", "55P03"):  # a statement or the wait for a lock took too long
            raise UnavailableError(too_long) from e
        raise


def _arrived(tx: Tx, location_id: int, since: datetime | None, until: datetime | None) -> list[int]:
    rows = tx.all(
        """
        SELECT DISTINCT (body ->> 'raw_data_package')::bigint AS id FROM event
        WHERE location_id = :loc AND type = 'data.arrived' AND jsonb_typeof(body -> 'raw_data_package') = 'number'
            AND (CAST(:since AS timestamptz) IS NULL OR created_at >= :since)
            AND (CAST(:until AS timestamptz) IS NULL OR created_at < :until)
        """,
        loc=location_id,
        since=since,
        until=until,
    )
    return [r.id for r in rows]


def _future(
    tx: Tx, location_id: int, packages: Sequence[int] | None, limit: Capacity, in_time: Callable[[], None]
) -> _Future:
    """Let everything happen that follows from the definitions."""
    in_time()
    if packages is None:
        scope = None
        gaps.reconcile(tx, location_id, ACTOR, in_time=in_time)
    else:
        pairs = gaps.fold(tx, location_id, packages) | pairs_with(tx, location_id, packages)
        scope = and_below(tx, pairs)
        gaps.evaluate(tx, pairs, ACTOR)
    runs: dict[tuple[_Unit, str], RunForecast] = {}
    wave = 1
    while batches := list(_ready(tx, location_id)):
        for ids in batches:
            in_time()
            runs |= _let_succeed(tx, ids, wave, scope, limit)
        wave += 1
    steps = tx.all(
        "SELECT s.id, p.name AS pipeline, s.name FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id"
    )
    return _Future(runs, _coverage(tx, location_id, scope), {s.id: (s.pipeline, s.name) for s in steps})


def pairs_with(tx: Tx, location_id: int, packages: Sequence[int]) -> set[gaps.Pair]:
    """The pairs whose unit has one of these packages."""
    rows = tx.all(
        """
        SELECT DISTINCT s.id AS step_id, u.id AS unit_id FROM unit_member m JOIN unit u ON u.id = m.unit_id
        JOIN reduction_step s ON s.pipeline_id = u.pipeline_id AND s.dims = u.dims AND s.active
        JOIN pipeline p ON p.id = s.pipeline_id AND p.deleted_at IS NULL AND p.location_id = :loc
        WHERE m.package_id = ANY(:ids) AND m.removed IS NULL
        """,
        loc=location_id,
        ids=list(packages),
    )
    return {(r.step_id, r.unit_id) for r in rows}


def and_below(tx: Tx, pairs: Collection[gaps.Pair]) -> set[gaps.Pair]:
    """These pairs and all that depend on them."""
    found = set(pairs)
    fresh = set(pairs)
    while fresh:
        fresh = gaps.pairs_below(tx, fresh) - found
        found |= fresh
    return found


def _ready(tx: Tx, location_id: int) -> list[list[int]]:
    """Active runs that nobody holds back, in batches."""
    rows = tx.all(
        """
        SELECT r.id FROM run r JOIN pipeline p ON p.id = r.pipeline_id JOIN reduction_step s ON s.id = r.step_id
        WHERE r.location_id = :loc AND r.finished_at IS NULL AND NOT (r.state IN ('PENDING', 'RETRY_WAIT')
            AND (NOT p.enabled OR p.paused_by <> '' OR s.paused_by <> '')) ORDER BY r.id
        """,
        loc=location_id,
    )
    ids = [r.id for r in rows]
    return [ids[i : i + gaps.CHUNK] for i in range(0, len(ids), gaps.CHUNK)]


def _let_succeed(
    tx: Tx, ids: Sequence[int], wave: int, scope: Collection[gaps.Pair] | None, limit: Capacity
) -> dict[tuple[_Unit, str], RunForecast]:
    runs = tx.lock_runs(ids)
    causes = {
        r.id: r
        for r in tx.all(
            "SELECT r.id, r.cpu, r.memory_gb, t.reason FROM run r JOIN transition t ON t.run_id = r.id"
            " WHERE r.id = ANY(:ids) AND t.version = 1",
            ids=list(ids),
        )
    }
    moving = runs
    while moving := {i: r for i, r in moving.items() if r.state in _NEXT}:
        moving, _ = tx.move([Move(r, _NEXT[r.state], ACTOR, MoveFacts(exit_record=True)) for r in moving.values()])
    own = {(r.step_id, r.unit_id) for r in runs.values()}
    gaps.evaluate(tx, own | gaps.pairs_below(tx, own), ACTOR)
    found = {}
    for i, r in runs.items():
        if scope is None or (r.step_id, r.unit_id) in scope:
            c = causes[i]
            waiting = admit([PendingRun(i, c.cpu, c.memory_gb)], _FREE, limit)[1].get(i, "")
            found[(r.step_id, r.unit), r.wanted] = RunForecast(r.pipeline, r.step, r.unit, c.reason, wave, waiting)
    return found


_FREE = Capacity(0, 0.0, 0.0)


def _coverage(tx: Tx, location_id: int, scope: Collection[gaps.Pair] | None) -> dict[_Unit, tuple[str, str]]:
    rows = tx.all(
        """
        SELECT c.step_id, c.unit_id, u.key AS unit, c.state, c.reason
        FROM coverage c JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id
        JOIN unit u ON u.id = c.unit_id WHERE p.location_id = :loc AND p.deleted_at IS NULL
        """,
        loc=location_id,
    )
    return {(r.step_id, r.unit): (r.state, r.reason) for r in rows if scope is None or (r.step_id, r.unit_id) in scope}


def _compare(before: _Future, after: _Future, changes: list[Change], packages: Sequence[int] | None) -> WhatIf:
    added = [run for key, run in after.runs.items() if key not in before.runs]
    instead = {unit for unit, wanted in after.runs if (unit, wanted) not in before.runs}
    gone = []
    for (unit, wanted), run in before.runs.items():
        if (unit, wanted) not in after.runs:
            state, reason = after.coverage.get(unit, ("", "there is no such step or unit any more"))
            said = "newer input, version or config takes its place" if unit in instead else f"{state}: {reason}"
            gone.append(RunForecast(run.pipeline, run.step, run.unit, said.removeprefix(": "), run.wave))
    names = {**before.names, **after.names}
    turned = Counter(
        (*names[unit[0]], b, a)
        for unit in before.coverage.keys() | after.coverage.keys()
        if (b := before.coverage.get(unit, (None,))[0]) != (a := after.coverage.get(unit, (None,))[0])
    )
    shifts = [
        Shift(p, s, CoverageState(b) if b else None, CoverageState(a) if a else None, n)
        for (p, s, b, a), n in sorted(turned.items(), key=lambda item: tuple(map(str, item[0])))
    ]

    def place(r: RunForecast) -> tuple[int, str, str, str]:
        return r.wave, r.pipeline, r.step, r.unit

    return WhatIf(
        None if packages is None else len(packages), changes, sorted(added, key=place), sorted(gone, key=place), shifts
    )
