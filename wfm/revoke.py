"""What must not be used any more: versions of software, revisions of configs, packages, products of runs.

`find` names one, `set_state` writes the fact and tells the trigger-manager, `plan` shows beforehand what becomes of
which units: by the gap engine itself, in a transaction that is undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection

from wfm import gaps, views
from wfm.catalogue import lock
from wfm.errors import NotFoundError
from wfm.events import ENTRANCES, DataArrived, PipelineChanged, RunRevoked
from wfm.grouping import unknown
from wfm.model import Actor, CoverageState, Why
from wfm.store import Store, Tx
from wfm.views.cost import Estimate, estimate, step_costs
from wfm.whatif import ACTOR, and_below, pairs_with, undone


class Kind(StrEnum):
    """What can be revoked."""

    SOFTWARE = "software"
    CONFIG = "config"
    PACKAGE = "package"
    PRODUCT = "product"


class State(StrEnum):
    """Whether a thing may be used."""

    ACTIVE = "active"
    DEPRECATED = "deprecated"
    """Of versions only: not chosen any more; where it is pinned, it runs and its results count."""
    REVOKED = "revoked"


class Thing(Struct, frozen=True, kw_only=True):
    """One version, revision, package or product. `id` is of its row; `name` is for people."""

    kind: Kind
    id: int
    name: str
    state: State


# --- finding ---


def find(conn: Connection, kind: Kind, name: str, which: str = "", *, restore: bool = False) -> Thing:
    """A thing by the names that people give it.

    Args:
        name: of the software, config or package; the id or path of a product.
        which: the version of a software; the revision of a config, by default the newest that counts (to be
            restored: the newest that is revoked).

    Raises:
        NotFoundError: there is none. UsageError: a path that several products have.
    """
    match kind:
        case Kind.SOFTWARE:
            return _version(conn, name, which)
        case Kind.CONFIG:
            return _revision(conn, name, which, restore)
        case Kind.PACKAGE:
            return _package(conn, name)
        case Kind.PRODUCT:
            product, _ = views.find_product(conn, name)
            (row,) = _all(conn, "SELECT id, path, run_id, revoked_by FROM data_product WHERE id = :id", id=product)
            return Thing(
                kind=kind, id=product, name=f"{product} ({row.path} of run {row.run_id})", state=_state(row.revoked_by)
            )


def _all(conn: Connection, sql: str, **params: Any) -> list[Any]:
    from sqlalchemy import text

    return list(conn.execute(text(sql), params))


def _state(revoked_by: str) -> State:
    return State.REVOKED if revoked_by else State.ACTIVE


def _version(conn: Connection, name: str, version: str) -> Thing:
    rows = _all(
        conn,
        "SELECT v.id, v.version, v.state FROM software s LEFT JOIN software_version v ON v.software_id = s.id"
        " WHERE s.name = :name ORDER BY v.id",
        name=name,
    )
    if not rows:
        raise NotFoundError(unknown("software", name, [r.name for r in _all(conn, "SELECT name FROM software")]))
    found = next((r for r in rows if r.version == version), None)
    if found is None:
        raise NotFoundError(unknown(f"version of {name!r}", version, [r.version for r in rows if r.id]))
    return Thing(kind=Kind.SOFTWARE, id=found.id, name=f"{name} {version}", state=State(found.state))


def _revision(conn: Connection, name: str, revision: str, restore: bool) -> Thing:
    rows = _all(
        conn,
        "SELECT r.id, r.revision, r.revoked_by FROM config c LEFT JOIN config_revision r ON r.config_id = c.id"
        " WHERE c.name = :name ORDER BY r.revision DESC",
        name=name,
    )
    if not rows:
        raise NotFoundError(unknown("config", name, [r.name for r in _all(conn, "SELECT name FROM config")]))
    if revision:
        found = next((r for r in rows if str(r.revision) == revision), None)
        if found is None:
            raise NotFoundError(unknown(f"revision of config {name!r}", revision, [str(r.revision) for r in rows]))
    else:
        found = next((r for r in rows if bool(r.revoked_by) is restore), None)
        if found is None:
            raise NotFoundError(f"config {name!r}: no revision is revoked" if restore else f"config {name!r}: all are")
    name = f"{name} revision {found.revision}"
    return Thing(kind=Kind.CONFIG, id=found.id, name=name, state=_state(found.revoked_by))


def _package(conn: Connection, name: str) -> Thing:
    rows = _all(conn, "SELECT id, revoked_by FROM raw_data_package WHERE name = :name", name=name)
    if not rows:
        views.packages(conn, pattern=name)  # says which names are near
        raise NotFoundError(f"unknown raw data package {name!r}")
    return Thing(kind=Kind.PACKAGE, id=rows[0].id, name=name, state=_state(rows[0].revoked_by))


# --- revoking ---

_TABLES = {
    Kind.SOFTWARE: "software_version",
    Kind.CONFIG: "config_revision",
    Kind.PACKAGE: "raw_data_package",
    Kind.PRODUCT: "data_product",
}


def set_state(tx: Tx, thing: Thing, state: State, actor: Actor) -> None:
    """Revoke a thing, deprecate it, or let it be used again; nothing where it is so already.

    Revisions of a config with the same parameters are one thing.
    """
    lock(tx.conn)
    table = _TABLES[thing.kind]
    by = ("", "") if state is State.ACTIVE else (actor.name, actor.reason)
    what = {"id": thing.id, "by": by[0], "reason": by[1]}
    sets = "revoked_by = :by, revoked_reason = :reason"
    if thing.kind is Kind.SOFTWARE:
        tx.run(f"UPDATE {table} SET state = :state, {sets} WHERE id = :id", state=state, **what)
    elif thing.kind is Kind.CONFIG:
        same = f"(config_id, hash) = (SELECT config_id, hash FROM {table} WHERE id = :id)"
        tx.run(f"UPDATE {table} SET {sets} WHERE {same}", **what)
    else:
        tx.run(f"UPDATE {table} SET {sets} WHERE id = :id", **what)
    if thing.state is not state:
        said = "may be used again" if state is State.ACTIVE else f"is {state}"
        _tell(tx, thing, Actor(actor.name, f"{thing.kind} {thing.name} {said}: {actor.reason}"))


def _tell(tx: Tx, thing: Thing, actor: Actor) -> None:
    """Have the trigger-managers look at what the thing is used for."""
    if thing.kind is Kind.PACKAGE:
        for r in tx.all("SELECT DISTINCT location_id FROM pipeline WHERE deleted_at IS NULL ORDER BY 1"):
            tx.emit(r.location_id, DataArrived(raw_data_package=thing.id), ENTRANCES["data.arrived"], actor)
    elif thing.kind is Kind.PRODUCT:
        for run in tx.find_runs("r.id = (SELECT run_id FROM data_product WHERE id = :id)", id=thing.id).values():
            told = RunRevoked(
                run=run.id,
                version=run.version,
                attempt=run.attempt,
                pipeline=run.pipeline,
                step=run.step,
                unit=run.unit,
                state=run.state,
            )
            tx.emit(run.location_id, told, ENTRANCES["run.revoked"], actor)
    else:
        for p in tx.all(f"SELECT DISTINCT p.id, p.name, p.location_id {_USING[thing.kind]} ORDER BY p.id", id=thing.id):
            changed = PipelineChanged(pipeline=p.name, pipeline_id=p.id)
            tx.emit(p.location_id, changed, ENTRANCES["pipeline.changed"], actor)


_STEPS = "FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id AND s.active AND p.deleted_at IS NULL"
_USING = {
    Kind.SOFTWARE: f"{_STEPS} JOIN software_version v ON v.software_id = s.software_id AND v.id = :id",
    Kind.CONFIG: f"{_STEPS} JOIN config_revision v ON v.config_id = s.config_id AND v.id = :id",
}
"""The steps s, of pipelines p, that a version or a revision may be chosen for."""


# --- planning ---


class Effect(StrEnum):
    """What becomes of a unit whose result, or whose run on its way, does not count any more."""

    AGAIN = "runs again"
    BELOW = "follows: it reads results that do not count any more"
    EARLIER = "covered by an earlier result"
    BLOCKED = "blocked: nothing can take the place of its result"
    HELD = "held"
    EMPTY = "has no raw data any more"


class StepPlan(Struct, frozen=True, kw_only=True):
    """So many units of a step, and what becomes of them."""

    pipeline: str
    step: str
    effect: Effect
    units: int


class Plan(Struct, frozen=True):
    """What another state of a thing does.

    Attributes:
        steps: in the order of the steps; a unit counts once.
        cost: of the runs that follow, from past ones.
    """

    steps: list[StepPlan]
    cost: Estimate

    def units(self, *effects: Effect) -> int:
        """How many units have one of these effects."""
        return sum(s.units for s in self.steps if s.effect in effects)


_Seen = dict[gaps.Pair, tuple[str, str, str]]
"""By pair (state, why, wanted digest)."""


def plan(store: Store, thing: Thing, state: State, *, seconds: float = 60.0) -> Plan:
    """Which units another state of a thing makes stale, and what depends on them. Nothing is changed.

    Holds what the gap engine locks until it is done or gives up.

    Raises:
        UnavailableError: it took too long, or others held for too long what it needs.
    """

    def work(tx: Tx, in_time: Callable[[], None]) -> Plan:
        pairs = _pairs(tx, thing)
        # What would change anyhow is no part of it.
        gaps.evaluate(tx, pairs, ACTOR, in_time)
        before = _seen(tx, and_below(tx, pairs))
        set_state(tx, thing, state, ACTOR)
        pairs |= _pairs(tx, thing)
        gaps.evaluate(tx, pairs, ACTOR, in_time)
        after = _seen(tx, and_below(tx, pairs))
        found = Counter((pair[0], effect) for pair, a in after.items() if (effect := _effect(before.get(pair), a)))
        return _plan(tx, found)

    return undone(store, work, seconds, "allow more with --timeout, or go on without a plan with --yes")


def _pairs(tx: Tx, thing: Thing) -> set[gaps.Pair]:
    """The pairs that the state of a thing decides by itself, with the package folded as that now says."""
    if thing.kind is Kind.PACKAGE:
        pairs: set[gaps.Pair] = set()
        for r in tx.all("SELECT DISTINCT location_id FROM pipeline WHERE deleted_at IS NULL ORDER BY 1"):
            pairs |= pairs_with(tx, r.location_id, [thing.id]) | gaps.fold(tx, r.location_id, [thing.id])
        return pairs
    if thing.kind is Kind.PRODUCT:
        rows = tx.all(
            "SELECT r.step_id, r.unit_id FROM data_product d JOIN run r ON r.id = d.run_id WHERE d.id = :id",
            id=thing.id,
        )
    else:
        rows = tx.all(
            f"SELECT c.step_id, c.unit_id {_USING[thing.kind]} JOIN coverage c ON c.step_id = s.id", id=thing.id
        )
    return {(r.step_id, r.unit_id) for r in rows}


def _seen(tx: Tx, pairs: set[gaps.Pair]) -> _Seen:
    rows = tx.all(
        """
        SELECT c.step_id, c.unit_id, c.state, c.why, c.wanted
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
        JOIN coverage c ON (c.step_id, c.unit_id) = (q.s, q.u)
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    return {(r.step_id, r.unit_id): (r.state, r.why, r.wanted) for r in rows}


def _effect(before: tuple[str, str, str] | None, after: tuple[str, str, str]) -> Effect | None:
    """What happened to a unit that had a result, or a run on its way; None if that goes on counting."""
    if before is None or before[0] not in (CoverageState.COVERED, CoverageState.ACTIVE) or before[2] == after[2]:
        return None
    state, why, _ = after
    if why in (Why.UPSTREAM, Why.UPSTREAM_FAILED):
        return Effect.BELOW
    return {
        CoverageState.COVERED: Effect.EARLIER,
        CoverageState.BLOCKED: Effect.BLOCKED,
        CoverageState.HELD: Effect.HELD,
        CoverageState.EMPTY: Effect.EMPTY,
    }.get(CoverageState(state), Effect.AGAIN)


_RUNS = (Effect.AGAIN, Effect.BELOW, Effect.HELD)


def _plan(tx: Tx, found: Counter[tuple[int, Effect]]) -> Plan:
    steps = sorted({step for step, _ in found})
    rows = tx.all(
        "SELECT s.id, s.name AS step, p.name AS pipeline FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id"
        " WHERE s.id = ANY(:ids) ORDER BY p.name, s.position",
        ids=steps,
    )
    lines = [
        StepPlan(pipeline=r.pipeline, step=r.step, effect=effect, units=found[r.id, effect])
        for r in rows
        for effect in Effect
        if found[r.id, effect]
    ]
    runs = {step: n for step in steps if (n := sum(found[step, effect] for effect in _RUNS))}
    return Plan(lines, estimate(step_costs(tx.conn, steps), runs))
