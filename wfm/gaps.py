"""The gap engine: packages into units, units into coverage, gaps into runs.

Truth is level-triggered: what must run is derived from the catalogue and from coverage, never from the order of
messages. An event only says where to look first. Four functions, all set-based, all repeatable:

* `fold` brings the member sets of units up to date for some packages;
* `evaluate` decides for some (step, unit) pairs what coverage says, and turns gaps into runs;
* `pairs_below` names the pairs that depend on others;
* `reconcile` compares everything with the catalogue, and does the first two where something differs.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import BigInteger, ColumnElement, FromClause, Numeric, and_, any_, func, literal, or_, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import ARRAY

from wfm import grouping, plan, schema
from wfm.decide import (
    DIGEST_MODULUS,
    AcceptedRun,
    ActiveRun,
    ApprovalLimits,
    EndedRun,
    GapDecision,
    GapFacts,
    Plan,
    SoftwareVersion,
    Upstream,
    Wish,
    cause,
    choose_version,
    due_text,
    due_times,
    gap,
    in_place_of_revoked,
    needs_approval,
    own_members,
    set_digest,
    wanted_digest,
    without,
)
from wfm.model import (
    Actor,
    CoverageState,
    FanIn,
    OnStale,
    Resources,
    RunState,
    Schedule,
    TriggerType,
    VersionPolicy,
    Why,
)
from wfm.schema import UPSTREAM_COUNTS
from wfm.store import WITHDRAWN, Move, Tx, encode, result_hash
from wfm.views.cost import step_costs

log = logging.getLogger(__name__)

Pair = tuple[int, int]
"""(step id, unit id)"""

CHUNK = 1000
"""Pairs that are evaluated, and packages that are folded, at once: what a flood costs in memory besides their ids."""

TALLY_ROWS = 100
"""Rows of a tally that are read as they are; more are summed into one first."""


# --- fold ---


class _Step(Struct, frozen=True):
    id: int
    dims: str
    group_by: list[str]


class _Pipeline(Struct, frozen=True):
    id: int
    rules: list[Any]
    steps: list[_Step]
    nested: list[tuple[str, str]]
    """(finer, coarser) dims of steps that depend on each other."""


def _group_bys(pipeline: _Pipeline) -> dict[str, list[str]]:
    """By dims, the dimensions."""
    return {s.dims: s.group_by for s in pipeline.steps}


def fold(tx: Tx, location_id: int, packages: Collection[int], pipelines: Collection[int] | None = None) -> set[Pair]:
    """Bring the member sets of units up to date for these packages.

    Args:
        location_id: pipelines of this processing location are looked at; `pipelines` narrows them further.
        packages: ids; new, changed and vanished ones alike.

    Returns:
        the pairs whose unit changed.
    """
    touched: set[Pair] = set()
    ids = sorted(packages)
    if not ids:
        return touched
    for pipeline in _pipelines(tx, location_id, pipelines):
        touched |= _fold_ids(tx, pipeline, ids)
    return touched


def _fold_ids(tx: Tx, pipeline: _Pipeline, packages: Collection[int]) -> set[Pair]:
    ids = sorted(set(packages))
    touched: set[Pair] = set()
    for start in range(0, len(ids), CHUNK):
        touched |= _fold(tx, pipeline, ids[start : start + CHUNK])
    return touched


def _fold(tx: Tx, pipeline: _Pipeline, ids: Sequence[int]) -> set[Pair]:
    touched: set[Pair] = set()
    before: dict[str, Mapping[int, int]] = {}
    after: dict[str, Mapping[int, int]] = {}
    empty: list[int] = []
    for dims, group_by in _group_bys(pipeline).items():
        before[dims], after[dims], changed = _fold_dims(tx, pipeline, dims, group_by, ids)
        touched |= {(s.id, u) for s in pipeline.steps if s.dims == dims for u in changed}
        empty += [u for u, members in changed.items() if not members]
    _fold_edges(tx, pipeline.nested, before, after, empty)
    return touched


def _pipelines(tx: Tx, location_id: int, ids: Collection[int] | None) -> list[_Pipeline]:
    rows = tx.all(
        """
        SELECT p.id, g.rules, s.id AS step_id, s.dims, s.group_by,
            (SELECT array_agg(u.dims) FROM step_dependency d JOIN reduction_step u ON u.id = d.upstream_id
             WHERE d.step_id = s.id AND u.dims <> s.dims) AS finer
        FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id JOIN reduction_step s ON s.pipeline_id = p.id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND p.frozen_at IS NULL AND s.active
            AND (:any OR p.id = ANY(:ids))
        ORDER BY p.id, s.position
        """,
        loc=location_id,
        any=ids is None,
        ids=list(ids or ()),
    )
    found: dict[int, _Pipeline] = {}
    for r in rows:
        p = found.setdefault(r.id, _Pipeline(r.id, r.rules, [], []))
        p.steps.append(_Step(r.step_id, r.dims, r.group_by))
        p.nested.extend((finer, r.dims) for finer in r.finer or ())
    return list(found.values())


def _fold_dims(
    tx: Tx, pipeline: _Pipeline, dims: str, group_by: Sequence[str], ids: Sequence[int]
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """One member set per unit of these dimensions.

    Returns:
        the unit of each package before; the unit of each package now; the members of each unit that changed.
    """
    names = sorted(group_by)
    rules = grouping.rules_from(pipeline.rules)
    target: dict[int, tuple[str, int]] = {}
    values: dict[str, dict[str, str | None]] = {}
    for row in tx.conn.execute(grouping.select_packages(rules, names, package_ids=ids)):
        unit_values = dict(zip(names, row[2:], strict=True))
        key = grouping.unit_key(unit_values)
        values[key] = unit_values
        target[row[0]] = (key, int(row[1]))

    tx.run(
        """
        INSERT INTO unit (pipeline_id, dims, key, "values")
        SELECT :pipeline, :dims, key, vals FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS u(key text, vals jsonb)
        ORDER BY key ON CONFLICT DO NOTHING
        """,
        pipeline=pipeline.id,
        dims=dims,
        rows=encode([{"key": k, "vals": v} for k, v in values.items()]),
    )
    # Lock before looking: another trigger-manager may be folding the same packages.
    units = {
        u.key: u
        for u in tx.all(
            """
            SELECT id, key, digest, members, generation FROM unit WHERE pipeline_id = :pipeline AND dims = :dims
                AND id IN (SELECT id FROM unit WHERE pipeline_id = :pipeline AND dims = :dims AND key = ANY(:keys)
                    UNION SELECT unit_id FROM unit_member WHERE package_id = ANY(:ids) AND removed IS NULL)
            ORDER BY id FOR NO KEY UPDATE
            """,
            pipeline=pipeline.id,
            dims=dims,
            keys=list(values),
            ids=list(ids),
        )
    }
    by_id = {u.id: u for u in units.values()}
    added: dict[int, dict[int, int]] = defaultdict(dict)
    removed: dict[int, dict[int, int]] = defaultdict(dict)
    here = {
        (m.package_id, m.unit_id): int(m.item)
        for m in tx.all(
            "SELECT package_id, unit_id, item FROM unit_member WHERE package_id = ANY(:ids) AND removed IS NULL",
            ids=list(ids),
        )
        if m.unit_id in by_id
    }
    for (package, unit), item in here.items():
        wanted = target.get(package)
        if wanted is None or units[wanted[0]].id != unit or wanted[1] != item:
            removed[unit][package] = item
    for package, (key, item) in target.items():
        unit = units[key].id
        if here.get((package, unit)) != item:
            added[unit][package] = item
    changed = {u: by_id[u].members + len(added[u]) - len(removed[u]) for u in sorted({*added, *removed})}
    if changed:
        tx.run(
            """
            UPDATE unit u SET generation = c.generation, digest = c.digest, members = c.members
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS c(id bigint, generation bigint, digest numeric, members bigint)
            WHERE u.id = c.id
            """,
            rows=encode(
                [
                    {
                        "id": u,
                        "generation": by_id[u].generation + 1,
                        "digest": str(
                            (int(by_id[u].digest) + set_digest(added[u].values()) - set_digest(removed[u].values()))
                            % DIGEST_MODULUS
                        ),
                        "members": members,
                    }
                    for u, members in changed.items()
                ]
            ),
        )
        if any(removed.values()):
            tx.run(
                """
                UPDATE unit_member m SET removed = u.generation FROM unit u, jsonb_to_recordset(CAST(:rows AS jsonb))
                    AS g(unit bigint, package bigint)
                WHERE m.unit_id = g.unit AND m.package_id = g.package AND m.removed IS NULL AND u.id = g.unit
                """,
                rows=encode([{"unit": u, "package": p} for u, gone in removed.items() for p in gone]),
            )
        tx.run(
            """
            INSERT INTO unit_member (unit_id, package_id, added, item)
            SELECT g.unit, g.package, u.generation, g.item FROM unit u, jsonb_to_recordset(CAST(:rows AS jsonb))
                AS g(unit bigint, package bigint, item numeric)
            WHERE u.id = g.unit
            """,
            rows=encode(
                [{"unit": u, "package": p, "item": str(i)} for u, new in added.items() for p, i in new.items()]
            ),
        )
    return dict(here.keys()), {p: units[key].id for p, (key, _) in target.items()}, changed


def _fold_edges(
    tx: Tx,
    nested: Sequence[tuple[str, str]],
    before: Mapping[str, Mapping[int, int]],
    after: Mapping[str, Mapping[int, int]],
    empty: Sequence[int],
) -> None:
    """An edge from each finer unit to the coarser one that shares a package with it, and no others."""

    def edges(unit_of: Mapping[str, Mapping[int, int]]) -> set[tuple[int, int]]:
        return {
            (unit_of[coarse][p], u) for fine, coarse in nested for p, u in unit_of[fine].items() if p in unit_of[coarse]
        }

    here, gone = edges(after), edges(before) - edges(after)
    if here:
        tx.run(
            """
            INSERT INTO unit_edge (upper_id, lower_id)
            SELECT * FROM unnest(CAST(:upper AS bigint[]), CAST(:lower AS bigint[])) ON CONFLICT DO NOTHING
            """,
            upper=[e[0] for e in sorted(here)],
            lower=[e[1] for e in sorted(here)],
        )
    if empty:  # also edges to units of dimensions that no step has at present
        tx.run("DELETE FROM unit_edge WHERE lower_id = ANY(:units) OR upper_id = ANY(:units)", units=sorted(empty))
    if gone:
        tx.run(
            """
            DELETE FROM unit_edge e USING unnest(CAST(:upper AS bigint[]), CAST(:lower AS bigint[])) AS g(upper, lower)
            WHERE (e.upper_id, e.lower_id) = (g.upper, g.lower) AND NOT EXISTS (
                SELECT 1 FROM unit_member l JOIN unit_member u ON u.package_id = l.package_id
                WHERE l.unit_id = g.lower AND u.unit_id = g.upper AND l.removed IS NULL AND u.removed IS NULL)
            """,
            upper=[e[0] for e in sorted(gone)],
            lower=[e[1] for e in sorted(gone)],
        )


# --- evaluate ---


class Evaluated(Struct):
    """What an evaluation did: runs made, runs withdrawn, pairs whose coverage changed."""

    runs: list[int] = []
    withdrawn: list[int] = []
    changed: int = 0


def evaluate(tx: Tx, pairs: Iterable[Pair], actor: Actor, in_time: Callable[[], object] = lambda: None) -> Evaluated:
    """Decide for each pair what coverage says, start the runs that follow, and go on to what depends on them.

    `in_time` is called from time to time; what it raises ends the evaluation.
    """
    done = Evaluated()
    positions = {r.id: r.position for r in tx.all("SELECT id, position FROM reduction_step")}
    waiting: dict[int, set[Pair]] = defaultdict(set)
    for pair in pairs:
        waiting[positions[pair[0]]].add(pair)
    # Steps in topological order: what a step decides is seen by those that depend on it.
    while waiting:
        wave = sorted(waiting.pop(min(waiting)))
        for start in range(0, len(wave), CHUNK):
            in_time()
            changed = _evaluate(tx, wave[start : start + CHUNK], actor, done)
            done.changed += len(changed)
            for pair in pairs_below(tx, changed):
                waiting[positions[pair[0]]].add(pair)
    return done


_NOTHING_TO_ASK = (Why.RUN, Why.FAILED, Why.CANCELLED, Why.NO_VERSION)
"""Gaps that a firing does not ask for: when new input or a new version lets them run, that waits for the next one."""


def request(tx: Tx, pipeline_id: int, why: str) -> set[Pair]:
    """Have the gaps of a pipeline run that only wait to be asked for, or for what is asked for with them.

    Args:
        why: goes into the reason of the runs.

    Returns:
        the pairs, to be evaluated.
    """
    rows = tx.all(
        """
        WITH gap AS MATERIALIZED (
            SELECT c.step_id, c.unit_id FROM coverage c JOIN reduction_step s ON s.id = c.step_id
            WHERE s.pipeline_id = :pipeline AND s.active AND c.state NOT IN ('covered', 'empty')
                AND c.why <> ALL(:nothing)
            ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c)
        UPDATE coverage c SET requested = true, requested_for = :why FROM gap g
        WHERE (c.step_id, c.unit_id) = (g.step_id, g.unit_id) RETURNING c.step_id, c.unit_id
        """,
        pipeline=pipeline_id,
        nothing=list(_NOTHING_TO_ASK),
        why=why,
    )
    return {(r.step_id, r.unit_id) for r in rows}


def pairs_below(tx: Tx, pairs: Collection[Pair]) -> set[Pair]:
    """The pairs that read the results of these."""
    if not pairs:
        return set()
    rows = tx.all(
        """
        SELECT DISTINCT d.step_id, CASE WHEN ds.dims = us.dims THEN q.unit_id ELSE e.upper_id END AS unit_id
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
        JOIN step_dependency d ON d.upstream_id = q.step_id
        JOIN reduction_step us ON us.id = d.upstream_id JOIN reduction_step ds ON ds.id = d.step_id
        LEFT JOIN unit_edge e ON e.lower_id = q.unit_id AND ds.dims <> us.dims
        LEFT JOIN unit u ON u.id = e.upper_id
        WHERE ds.dims = us.dims OR u.dims = ds.dims
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    return {(r.step_id, r.unit_id) for r in rows}


def _evaluate(tx: Tx, pairs: Sequence[Pair], actor: Actor, done: Evaluated) -> list[Pair]:
    tx.run(
        """
        INSERT INTO coverage (step_id, unit_id, state, why)
        SELECT s, u, 'waiting', 'arrivals_not_sorted_yet'
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u) ORDER BY s, u ON CONFLICT DO NOTHING
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    facts = _facts(tx, pairs)
    decisions = {pair: gap(f.facts) for pair, f in facts.items()}
    starting = [pair for pair, d in decisions.items() if d.run]
    for pair, names in _without_copies(tx, starting).items():
        decisions[pair] = gap(msgspec.structs.replace(facts[pair].facts, missing_copies=names))
    for unwanted, reason in (
        (False, "newer input, version or config arrived before it started"),
        (True, "its step or unit is no longer part of its pipeline"),
    ):
        ids = [d.withdraw for p, d in decisions.items() if d.withdraw and facts[p].facts.unwanted is unwanted]
        _withdraw(tx, ids, reason, actor, done)
    made: dict[Pair, int] = {}
    by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair, d in decisions.items():
        if d.run:
            by_reason[facts[pair].cause].append(facts[pair].new_run)
    for reason, rows in by_reason.items():
        made |= tx.create_runs(rows, Actor(actor.name, reason))
    done.runs.extend(made.values())
    return _write(tx, facts, decisions, made)


def _withdraw(tx: Tx, ids: Sequence[int], reason: str, actor: Actor, done: Evaluated) -> None:
    runs = tx.lock_runs(ids, coverage=False)
    moved, _ = tx.move(
        [
            Move(r, "withdraw", Actor(actor.name, reason), sets={"failure": WITHDRAWN, "message": reason})
            for r in runs.values()
        ]
    )
    done.withdrawn.extend(moved)


def _write(
    tx: Tx, facts: Mapping[Pair, _Situation], decisions: Mapping[Pair, GapDecision], made: Mapping[Pair, int]
) -> list[Pair]:
    rows = tx.all(
        """
        UPDATE coverage c SET state = d.state, why = d.why, reason = d.reason, wanted = d.wanted,
            run_id = coalesce(d.covered_by, c.run_id), result = coalesce(r.result, c.result),
            requested = c.requested AND NOT d.settled,
            requested_for = CASE d.state WHEN 'covered' THEN '' ELSE c.requested_for END,
            wanted_since = CASE WHEN c.wanted = d.wanted THEN c.wanted_since ELSE now() END,
            settling_since = CASE WHEN d.why = 'settling' THEN coalesce(c.settling_since, now())
                WHEN NOT d.settled THEN c.settling_since END,
            backfill_id = CASE WHEN NOT d.settled THEN c.backfill_id END,
            due_at = now() + d.due_in * interval '1 s',
            updated_at = CASE WHEN n.new THEN now() ELSE c.updated_at END, basis = d.basis, gates = d.gates
        FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS d(step_id bigint, unit_id bigint, state text, why text,
            reason text, wanted text, covered_by bigint, settled boolean, due_in float8, basis bigint, gates bigint)
            JOIN coverage o ON (o.step_id, o.unit_id) = (d.step_id, d.unit_id)
            LEFT JOIN run r ON r.id = d.covered_by
            CROSS JOIN LATERAL (SELECT d.due_in IS NOT NULL
                OR (o.state, o.why, o.reason, o.wanted, o.run_id, o.due_at IS NULL) IS DISTINCT FROM
                   (d.state, d.why, d.reason, d.wanted, coalesce(d.covered_by, o.run_id), true)
                OR (o.requested AND d.settled) AS new) n
        WHERE (c.step_id, c.unit_id) = (d.step_id, d.unit_id)
            AND (n.new OR (c.basis, c.gates) IS DISTINCT FROM (d.basis, d.gates))
        RETURNING c.step_id, c.unit_id, n.new
        """,
        rows=encode(
            [
                {
                    "step_id": pair[0],
                    "unit_id": pair[1],
                    "state": d.state,
                    "why": d.why,
                    "reason": f"run {made[pair]}{d.reason}" if pair in made else d.reason,
                    "wanted": facts[pair].facts.wanted,
                    "covered_by": d.covered_by,
                    "settled": d.run or d.state is CoverageState.COVERED,
                    "due_in": d.due_in,
                    "basis": facts[pair].basis,
                    "gates": facts[pair].gates,
                }
                for pair, d in decisions.items()
            ]
        ),
    )
    changed = [(r.step_id, r.unit_id) for r in rows if r.new]
    _let_count(tx, sorted({d.covered_by for pair in changed if (d := decisions[pair]).covered_by}))
    return changed


def _let_count(tx: Tx, runs: Sequence[int]) -> None:
    """The products of runs that coverage rests on count, and no others of their units.

    Changes something where input, version or config went back to what they were: collection saw another order.
    """
    if runs:
        tx.run(
            """
            UPDATE data_product d SET superseded_by = CASE WHEN o.id <> n.id THEN n.id END
            FROM run n JOIN run o ON (o.step_id, o.unit_id) = (n.step_id, n.unit_id)
            WHERE n.id = ANY(:ids) AND d.run_id = o.id AND CASE WHEN o.id <> n.id THEN d.superseded_by IS NULL
                ELSE d.superseded_by <> n.id AND d.attempt = n.attempt END
            """,
            ids=list(runs),
        )


class _Situation(Struct, frozen=True):
    """The facts of one pair, the fingerprints of what they rest on, and the run that would follow from them."""

    facts: GapFacts
    basis: int
    gates: int
    cause: str
    new_run: dict[str, Any]


_RULES = """
SELECT s.id AS step_id, hashtextextended(ROW(s.name, s.active, s.dims, s.software_id, s.version_policy, s.version,
        s.fan_in, s.config_id, s.config_revision_id,
        (SELECT max(id) FROM config_revision r WHERE r.config_id = s.config_id),
        (SELECT array_agg(r.id ORDER BY r.id) FROM config_revision r
            WHERE r.config_id = s.config_id AND r.revoked_by <> ''),
        (SELECT array_agg(v ORDER BY v.id) FROM software_version v WHERE v.software_id = s.software_id),
        (SELECT array_agg(d.upstream_id ORDER BY d.upstream_id) FROM step_dependency d WHERE d.step_id = s.id)
    )::text, 0) AS basis, hashtextextended(ROW(s, p, CAST(:limits AS text),
        (SELECT max(w.approved_at) FROM step_wish w WHERE w.step_id = s.id))::text, 0) AS gates
FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
"""
"""Fingerprints of what all units of a step have in common.

`basis`: what decides what a unit wants, and so whether it is covered. `gates`: all of the step and its pipeline,
limits and approvals, which decide what becomes of a unit that is not. `gap` looks at nothing else of them.
"""

_UPSTREAM = f"""
SELECT jsonb_agg(to_jsonb(z)) AS steps, string_agg(ROW(z.step, z.total, z.covered, z.blocked, z.digest)::text, ' '
    ORDER BY z.step) AS seen
FROM (
    SELECT us.name AS step, n.total, n.covered, n.blocked, n.digest::text AS digest, n.parts
    FROM step_dependency d JOIN reduction_step us ON us.id = d.upstream_id
    JOIN LATERAL ({UPSTREAM_COUNTS}) n ON true
    WHERE d.step_id = s.id) z
"""
"""For a LATERAL join: what lies in unit ``u`` of step ``s``, by upstream step."""

_REVOKED = """
SELECT r.unit_id, string_agg(DISTINCT r.wanted, ' ') AS digests
FROM data_product d JOIN run r ON r.id = d.run_id WHERE d.revoked_by <> '' AND r.step_id = s.id
"""
"""The digests whose results must not be used, of units of step ``s``."""

_FINGERPRINTS = """
hashtextextended(ROW(rules.basis, u.generation, up.seen, rv.digests)::text, 0) AS basis,
hashtextextended(ROW(rules.gates, c.requested, c.paused_by, c.paused_reason, b)::text, 0) AS gates
"""
"""Of one pair: all facts that `gap` looks at, except runs, whose moves write coverage, and time, for which it is due.

A fact of the unit itself that is new in `GapFacts` belongs here: into `basis` if it may change what is covered, else
into `gates`.
"""


def _facts(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, _Situation]:
    """Everything `decide.gap` looks at, in few statements; locks the coverage rows."""
    # Each join is a look-up by key: in the order written, or the planner would now and then read whole tables.
    tx.run("SET LOCAL join_collapse_limit TO 1")
    rows = tx.all(
        f"""
        WITH c AS MATERIALIZED (
            SELECT c.step_id, c.unit_id, c.requested, c.requested_for, c.run_id, c.wanted, c.wanted_since,
                c.settling_since, c.paused_by, c.paused_reason, c.backfill_id
            FROM coverage c
            JOIN unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS w(step_id, unit_id)
                ON (w.step_id, w.unit_id) = (c.step_id, c.unit_id)
            ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c),
        rules AS MATERIALIZED ({_RULES} WHERE s.id = ANY(CAST(:steps AS bigint[])))
        SELECT c.step_id, c.unit_id, c.requested, c.requested_for, s.name AS step, s.active AS step_active,
            s.version_policy, s.version AS named_version, s.software_id, sw.name AS software, s.resources,
            s.cooldown_seconds, s.paused_by AS step_paused_by, s.paused_reason AS step_paused_reason,
            s.on_stale, s.approval_units, s.approval_core_hours,
            p.name AS pipeline, p.id AS pipeline_id, p.location_id, p.priority, p.stale_priority,
            p.enabled AND p.deleted_at IS NULL AS enabled,
            p.paused_by, p.paused_reason, p.trigger_type, p.trigger_config, now() AS now,
            c.paused_by AS unit_paused_by, c.paused_reason AS unit_paused_reason, b.id AS backfill_id,
            b.name AS backfill, b.priority AS backfill_priority, coalesce(b.paused_by, '') AS backfill_paused_by,
            b.paused_reason AS backfill_paused_reason,
            s.dims, s.group_by, u.dims AS unit_dims, u.key AS unit, u.members, u.digest, u.generation,
            cf.name AS config, cr.id AS config_id,
            cr.revision AS config_revision, coalesce(cr.hash, '') AS config_hash,
            a.id AS active_id, a.state AS active_state, a.wanted AS active_wanted, a.missing AS active_missing,
            prev.id AS prev_id, prev.wanted AS prev_wanted, prev.generation AS prev_generation,
            prev.software_version_id AS prev_version_id, psw.name AS prev_software, pv.version AS prev_version,
            coalesce(pc.hash, '') AS prev_config_hash,
            pv.state = 'revoked' OR coalesce(pc.revoked_by, '') <> '' AS prev_revoked,
            s.fan_in, CASE WHEN s.fan_in = 'any' THEN
                (SELECT sum((x ->> 'read')::int) FROM jsonb_array_elements(prev.upstream) x) END AS accepted_results,
            c.wanted AS known_wanted, s.settle_seconds, s.settle_at_most_seconds,
            extract(epoch FROM now() - c.wanted_since)::float AS quiet_seconds,
            extract(epoch FROM now() - c.settling_since)::float AS settling_seconds,
            CASE WHEN s.cooldown_seconds > 0 THEN extract(epoch FROM now() - (SELECT max(created_at) FROM run r
                WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.failure <> :withdrawn
                    AND r.id IS DISTINCT FROM a.id))::float END AS since_last_run,
            up.steps AS upstream, {_FINGERPRINTS}
        FROM c JOIN rules ON rules.step_id = c.step_id
        JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id
        JOIN software sw ON sw.id = s.software_id JOIN unit u ON u.id = c.unit_id
        LEFT JOIN run prev ON prev.id = c.run_id LEFT JOIN software_version pv ON pv.id = prev.software_version_id
        LEFT JOIN software psw ON psw.id = pv.software_id
        LEFT JOIN config_revision pc ON pc.id = prev.config_revision_id
        LEFT JOIN backfill b ON b.id = c.backfill_id
        -- One by one, from its index: in the transaction of a flood nobody knows yet how many active runs there are.
        LEFT JOIN LATERAL (SELECT id, state, wanted, missing FROM run r
            WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.finished_at IS NULL LIMIT 1) a ON true
        LEFT JOIN config cf ON cf.id = s.config_id
        LEFT JOIN LATERAL (SELECT id, revision, hash FROM config_revision WHERE config_id = s.config_id
                AND revoked_by = '' AND (s.config_revision_id IS NULL OR id = s.config_revision_id)
            ORDER BY revision DESC LIMIT 1) cr ON true
        LEFT JOIN LATERAL ({_UPSTREAM}) up ON true
        LEFT JOIN LATERAL ({_REVOKED} AND r.unit_id = c.unit_id GROUP BY r.unit_id) rv ON true
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
        withdrawn=WITHDRAWN,
        limits=_limits(tx),
    )
    tx.run("SET LOCAL join_collapse_limit TO DEFAULT")
    _sum_up(tx, [r.unit_id for r in rows if any(z["parts"] > TALLY_ROWS for z in r.upstream or ())])
    versions: dict[int, list[SoftwareVersion]] = defaultdict(list)
    for v in tx.all(
        "SELECT software_id, id, version, state FROM software_version WHERE software_id = ANY(:ids)",
        ids=sorted({r.software_id for r in rows}),
    ):
        versions[v.software_id].append(SoftwareVersion(v.id, v.version, v.state))
    revoked = revoked_results(tx, pairs)
    known = {}
    for r in rows:
        version, fault = choose_version(VersionPolicy(r.version_policy), r.named_version, versions[r.software_id])
        upstream = tuple(msgspec.convert(z, Upstream, strict=False) for z in r.upstream or ())
        by_step = {u.step: u.digest for u in upstream}
        wanted = ""
        if version and not _config_fault(r):
            own = own_members(FanIn(r.fan_in), int(r.digest), r.members)
            wanted = wanted_digest(*own, by_step, r.software, version.version, r.config_hash)
            wanted = in_place_of_revoked(wanted, revoked[r.step_id, r.unit_id])
        known[r.step_id, r.unit_id] = (r, version, fault, upstream, wanted)
    ended = _ended(tx, {pair: k[4] for pair, k in known.items() if k[4]})
    plans = _plans(tx, [(r.step_id, r.unit_id) for r in rows if r.fan_in == FanIn.COMPLETE])
    wishes = _wishes(tx, {r.step_id: (v.id, r.config_id) for r, v, _, _, wanted in known.values() if wanted and v})

    @cache
    def not_due(cron: str, timezone: str) -> str:
        schedule = Schedule(cron, timezone)
        return f"{due_text(schedule, next(due_times(schedule, rows[0].now)))}, cron {cron}"

    def next_time(r: Any) -> str:
        schedule = msgspec.convert(r.trigger_config, Schedule)
        return not_due(schedule.cron, schedule.timezone) if r.trigger_type == TriggerType.CRON else ""

    return {
        pair: _situation(
            *k,
            ended.get(pair),
            plans.get(pair),
            next_time(k[0]),
            revoked[pair],
            _held(tx, k[0], k[1], wishes, revoked[pair]),
        )
        for pair, k in known.items()
    }


def _wishes(tx: Tx, wanted: Mapping[int, tuple[int, int | None]]) -> dict[int, Wish]:
    """By step, since when it wants what it wants now, (version, config revision), and what that made stale.

    Who sees first that it changed counts, for the whole step and for good: so it is one decision for all its units,
    whatever is evaluated first, and does not turn while some of them get new data.
    """
    rows = tx.all(
        "SELECT DISTINCT ON (step_id) * FROM step_wish WHERE step_id = ANY(:steps) ORDER BY step_id, id DESC",
        steps=list(wanted),
    )
    known = {r.step_id: r for r in rows if (r.software_version_id, r.config_revision_id) == wanted[r.step_id]}
    new = [step for step in wanted if step not in known]
    if new:
        costs = step_costs(tx.conn, new)
        rows = tx.all(
            """
            INSERT INTO step_wish (step_id, software_version_id, config_revision_id, units, core_hours)
            SELECT w.step_id, w.version_id, w.config_id, n.units, n.units * w.core_hours
            FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                AS w(step_id bigint, version_id bigint, config_id bigint, core_hours float8)
            LEFT JOIN config_revision wc ON wc.id = w.config_id
            CROSS JOIN LATERAL (
                SELECT count(*) AS units FROM coverage c JOIN run r ON r.id = c.run_id JOIN unit u ON u.id = c.unit_id
                LEFT JOIN config_revision rc ON rc.id = r.config_revision_id
                WHERE c.step_id = w.step_id AND u.members > 0 AND u.generation = r.generation
                    AND (r.software_version_id, rc.hash) IS DISTINCT FROM (w.version_id, wc.hash)
                    AND NOT EXISTS (SELECT 1 FROM run o LEFT JOIN config_revision oc ON oc.id = o.config_revision_id
                        WHERE (o.step_id, o.unit_id, o.generation) = (c.step_id, c.unit_id, u.generation)
                            AND o.state = 'COMPLETED' AND o.software_version_id = w.version_id
                            AND oc.hash IS NOT DISTINCT FROM wc.hash)) n
            ORDER BY w.step_id RETURNING *
            """,
            rows=encode(
                [
                    {
                        "step_id": step,
                        "version_id": wanted[step][0],
                        "config_id": wanted[step][1],
                        "core_hours": costs[step].core_hours,
                    }
                    for step in new
                ]
            ),
        )
        known |= {r.step_id: r for r in rows}
    return {step: Wish(r.units, r.core_hours, r.approved_by != "") for step, r in known.items()}


def _reprocessed(r: Any) -> bool:
    """Whether the unit has a result of the same raw data."""
    return r.prev_id is not None and r.prev_generation == r.generation


def _held(tx: Tx, r: Any, version: SoftwareVersion | None, wishes: Mapping[int, Wish], revoked: Collection[str]) -> str:
    """Why a stale unit waits for approval; empty if it does not."""
    wish = wishes.get(r.step_id)
    if version is None or wish is None or not _reprocessed(r):
        return ""
    on_stale, how = OnStale(r.on_stale), f"approve with `wfm approve {r.pipeline}/{r.step}`"
    changed = []
    if r.prev_version_id != version.id:
        changed.append(f"{r.software} {version.version}")
    if r.prev_config_hash != r.config_hash:
        changed.append(f"config {r.config} revision {r.config_revision}" if r.config else "no config")
    if not changed:
        held = r.prev_wanted in revoked and on_stale is OnStale.HOLD
        return f"its result was revoked; {how}" if held else ""
    default = tx.approval
    limits = ApprovalLimits(
        default.units if r.approval_units is None else r.approval_units,
        default.core_hours if r.approval_core_hours is None else r.approval_core_hours,
    )
    if not needs_approval(wish, on_stale, limits):
        return ""
    units = f"{wish.units} unit{'' if wish.units == 1 else 's'}"
    cost = "of unknown cost" if wish.core_hours is None else f"about {wish.core_hours:.3g} core-hours"
    return f"{units}, {cost}, because {' and '.join(changed)} is wanted; {how}"


def _config_fault(r: Any) -> str:
    return f"every revision of config {r.config} is revoked" if r.config and r.config_id is None else ""


def revoked_results(tx: Tx, pairs: Collection[Pair]) -> Mapping[Pair, set[str]]:
    """By pair, the digests whose result must not be used: a product of the run that made it is revoked."""
    found: dict[Pair, set[str]] = defaultdict(set)
    for r in tx.all(
        """
        SELECT DISTINCT r.step_id, r.unit_id, r.wanted
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
        JOIN run r ON (r.step_id, r.unit_id) = (q.s, q.u) JOIN data_product d ON d.run_id = r.id
        WHERE d.revoked_by <> ''
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    ):
        found[r.step_id, r.unit_id].add(r.wanted)
    return found


def _sum_up(tx: Tx, units: Sequence[int]) -> None:
    """Make one row of the many rows of a tally; its sum is the same at all times. Rows in other hands stay."""
    if units:
        tx.run(
            """
            WITH many AS MATERIALIZED (SELECT id FROM upstream_tally WHERE upper_id = ANY(:units)
                FOR UPDATE SKIP LOCKED),
            gone AS (DELETE FROM upstream_tally t USING many WHERE t.id = many.id RETURNING t.*)
            INSERT INTO upstream_tally (upper_id, dims, step_id, units, covered, blocked, digest)
            SELECT upper_id, dims, step_id, sum(units), sum(covered), sum(blocked), mod(sum(digest), :modulus)
            FROM gone GROUP BY upper_id, dims, step_id
            """,
            units=sorted(set(units)),
            modulus=DIGEST_MODULUS,
        )


def _plans(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, Plan]:
    """What the observing plan says of units whose steps wait until their group is complete."""
    if not pairs:
        return {}
    found: dict[Pair, Plan] = {}
    for s in tx.all(
        """
        SELECT s.id, s.group_by, s.fan_in_deadline_hours AS hours, g.rules,
            jsonb_object_agg(u.id::text, u."values") AS units
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
        JOIN reduction_step s ON s.id = q.step_id JOIN unit u ON u.id = q.unit_id AND u.dims = s.dims
        JOIN pipeline p ON p.id = s.pipeline_id JOIN data_grouping g ON g.id = p.grouping_id
        WHERE p.frozen_at IS NULL GROUP BY s.id, g.rules
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    ):
        units = {int(unit): values for unit, values in s.units.items()}
        of = plan.expected(tx, s.rules, s.group_by, units, s.hours)
        found |= {(s.id, unit): said for unit, said in of.items()}
    return found


def _ended(tx: Tx, wanted: Mapping[Pair, str]) -> dict[Pair, EndedRun]:
    """The latest ended run with the wanted digest; a completed one before all others, unless its files were purged."""
    rows = tx.all(
        """
        SELECT DISTINCT ON (r.step_id, r.unit_id) r.step_id, r.unit_id, r.id, r.state, r.message,
            CASE r.state WHEN 'FAILED' THEN (SELECT count(*) FROM run f JOIN transition t ON t.run_id = f.id
                WHERE (f.step_id, f.unit_id, f.wanted) = (q.s, q.u, q.w) AND t.trigger = 'fail') ELSE 0 END AS failures,
            r.missing
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[]), CAST(:wanted AS text[])) AS q(s, u, w)
        JOIN run r ON (r.step_id, r.unit_id, r.wanted) = (q.s, q.u, q.w)
        WHERE r.finished_at IS NOT NULL AND r.failure <> :withdrawn AND NOT (r.state = 'COMPLETED' AND EXISTS (
            SELECT 1 FROM task t WHERE t.run_id = r.id AND t.attempt = r.attempt AND t.kind = 'purge'
                AND t.state <> 'closed'))
        ORDER BY r.step_id, r.unit_id, r.state = 'COMPLETED' DESC, r.id DESC
        """,
        steps=[p[0] for p in wanted],
        units=[p[1] for p in wanted],
        wanted=list(wanted.values()),
        withdrawn=WITHDRAWN,
    )
    return {
        (r.step_id, r.unit_id): EndedRun(r.id, RunState(r.state), r.message, tuple(r.missing), failures=r.failures)
        for r in rows
    }


def _situation(
    r: Any,
    version: SoftwareVersion | None,
    fault: str,
    upstream: tuple[Upstream, ...],
    wanted: str,
    ended: EndedRun | None,
    planned: Plan | None,
    not_due: str,
    revoked: Collection[str],
    held: str,
) -> _Situation:
    paused = ""
    for what, by, reason in (
        ("pipeline", r.paused_by, r.paused_reason),
        ("step", r.step_paused_by, r.step_paused_reason),
        ("unit", r.unit_paused_by, r.unit_paused_reason),
        (f"backfill {r.backfill}", r.backfill_paused_by, r.backfill_paused_reason),
    ):
        if by:
            paused = f"{what} paused by {by}" + (f": {reason}" if reason else "")
            break
    by_step = {u.step: u.digest for u in upstream}
    facts = GapFacts(
        members=r.members,
        wanted=wanted,
        version_fault=fault,
        config_fault=_config_fault(r),
        upstream=upstream,
        fan_in=FanIn(r.fan_in),
        accepted_results=r.accepted_results or 0,
        active=ActiveRun(r.active_id, RunState(r.active_state), r.active_wanted, tuple(r.active_missing))
        if r.active_id
        else None,
        ended=ended,
        step_active=r.step_active,
        orphaned="" if r.unit_dims == r.dims else ", ".join(r.group_by) or "nothing",
        enabled=r.enabled,
        paused=paused,
        trigger=TriggerType(r.trigger_type),
        not_due=not_due,
        requested=r.requested,
        cooldown_seconds=r.cooldown_seconds,
        seconds_since_last_run=r.since_last_run,
        settle_seconds=r.settle_seconds,
        settle_at_most_seconds=10 * r.settle_seconds if r.settle_at_most_seconds is None else r.settle_at_most_seconds,
        quiet_seconds=(r.quiet_seconds or 0.0) if wanted == r.known_wanted else 0.0,
        settling_seconds=r.settling_seconds or 0.0,
        held=held,
        revoked=r.prev_revoked or r.prev_wanted in revoked,
        plan=planned,
    )
    resources = msgspec.convert(r.resources, Resources)
    new_run = {
        "step_id": r.step_id,
        "unit_id": r.unit_id,
        "pipeline_id": r.pipeline_id,
        "location_id": r.location_id,
        "generation": r.generation,
        "wanted": wanted,
        "result": str(result_hash(r.step, r.unit, wanted)),
        "software_version_id": version.id if version else None,
        "config_revision_id": r.config_id,
        "priority": _priority(r),
        "backfill_id": r.backfill_id,
        "cpu": resources.cpu,
        "memory_gb": resources.memory_gb,
        "missing": planned.missing if planned else (),
    }
    accepted = r.prev_wanted and AcceptedRun(r.prev_wanted, r.prev_software, r.prev_version, r.prev_config_hash)
    own = own_members(FanIn(r.fan_in), int(r.digest), r.members)
    now_wanted = (*own, by_step, r.software, version.version if version else "", r.config_hash)
    why = cause(accepted, *now_wanted, revoked=revoked)
    if r.requested_for and (r.requested or r.active_id):
        why += f"; {r.requested_for}"
    if r.backfill_id:
        why += f"; backfill {r.backfill}"
    why += without(planned.missing if planned else ())
    return _Situation(facts, r.basis, r.gates, why, new_run)


def _priority(r: Any) -> int:
    if r.backfill_id:
        return int(r.backfill_priority)
    return int(r.stale_priority if _reprocessed(r) and r.stale_priority is not None else r.priority)


def _without_copies(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, tuple[str, ...]]:
    """Of pairs that read raw data: names of packages that lie on no disk."""
    if not pairs:
        return {}
    rows = tx.all(
        """
        SELECT q.step_id, q.unit_id, m.names
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
        CROSS JOIN LATERAL (
            -- In WHERE, "removed IS NULL" would have each unit's members looked for in the index of all packages.
            SELECT array_agg(p.name ORDER BY p.name) FILTER (WHERE m.removed IS NULL) AS names FROM unit_member m
            JOIN raw_data_package p ON p.id = m.package_id
            WHERE m.unit_id = q.unit_id
                AND NOT EXISTS (SELECT 1 FROM physical_copy c JOIN data_location l ON l.id = c.location_id
                    WHERE c.package_id = p.id AND c.status IN ('present', 'staged') AND l.storage = 'disk')) m
        WHERE m.names IS NOT NULL AND NOT EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = q.step_id)
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    return {(r.step_id, r.unit_id): tuple(r.names) for r in rows}


# --- reconcile ---

FEW = 10_000
"""Units of one division that differ from the catalogue: their packages are looked for. Of more, all are folded."""


def reconcile(
    tx: Tx,
    location_id: int,
    actor: Actor,
    pipelines: Collection[int] | None = None,
    in_time: Callable[[], object] = lambda: None,
) -> Evaluated:
    """Compare with the whole catalogue: fold what differs, and decide again what may be decided otherwise by now.

    Costs a few set-based statements for each step, and else only what differs: the digests of all units are computed
    anew from the catalogue, and a pair is left out if all that its decision rested on is as it was.

    Args:
        location_id: pipelines of this processing location are looked at; `pipelines` narrows them further.
        in_time: called now and then; what it raises ends it.
    """
    tx.run("SELECT set_config('work_mem', '64MB', true)")
    done = Evaluated()
    for pipeline in _pipelines(tx, location_id, pipelines):
        _fold_differences(tx, pipeline)
    for step in tx.all(
        """
        SELECT s.id, s.dims, s.pipeline_id, EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = s.id) AS nested
        FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND (:any OR p.id = ANY(:ids)) ORDER BY s.position, s.id
        """,
        loc=location_id,
        any=pipelines is None,
        ids=list(pipelines or ()),
    ):
        # In the order of the steps: what is decided here changes what those below rest on, so they come up in turn.
        units = _undecided(tx, step)
        for start in range(0, len(units), CHUNK):
            in_time()
            pairs = [(step.id, u) for u in units[start : start + CHUNK]]
            done.changed += len(_evaluate(tx, pairs, actor, done))
    return done


def _undecided(tx: Tx, step: Any) -> list[int]:
    """The units of a step whose decision may be another by now, or does not fit their runs."""
    (row,) = tx.all(
        f"""
        WITH rules AS MATERIALIZED ({_RULES} WHERE s.id = :step),
        revoked AS MATERIALIZED (SELECT z.* FROM reduction_step s
            CROSS JOIN LATERAL ({_REVOKED} GROUP BY r.unit_id) z WHERE s.id = :step),
        purged AS MATERIALIZED (SELECT DISTINCT t.run_id FROM task t JOIN run r ON r.id = t.run_id
            WHERE t.kind = 'purge' AND t.state <> 'closed' AND t.attempt = r.attempt AND r.step_id = :step)
        SELECT array_agg(z.unit_id ORDER BY z.unit_id) AS units FROM (
            SELECT u.id AS unit_id, c.state, c.requested, c.basis AS had_basis, c.gates AS had_gates, a.id AS active,
                f.id IS NOT NULL OR g.run_id IS NOT NULL AS gone, {_FINGERPRINTS}
            FROM unit u CROSS JOIN rules JOIN reduction_step s ON s.id = :step
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (:step, u.id)
            LEFT JOIN backfill b ON b.id = c.backfill_id
            LEFT JOIN run a ON (a.step_id, a.unit_id) = (:step, u.id) AND a.finished_at IS NULL
            LEFT JOIN run f ON f.step_id = :step AND f.id = c.run_id AND f.state IN ('FAILED', 'CANCELLED')
            LEFT JOIN purged g ON g.run_id = c.run_id
            LEFT JOIN revoked rv ON rv.unit_id = u.id
            {f"LEFT JOIN LATERAL ({_UPSTREAM}) up ON true" if step.nested else "CROSS JOIN (SELECT NULL AS seen) up"}
            WHERE u.pipeline_id = :pipeline AND u.dims = :dims AND (s.active OR c.step_id IS NOT NULL)) z
        WHERE z.state IS NULL OR z.had_basis IS DISTINCT FROM z.basis
            OR z.state NOT IN ('covered', 'empty') AND z.had_gates IS DISTINCT FROM z.gates
            OR (z.state = 'active') <> (z.active IS NOT NULL)
            -- What was asked for and is covered has been answered: else the next change would count as asked for.
            OR z.state = 'covered' AND (z.gone OR z.requested)
        """,
        step=step.id,
        dims=step.dims,
        pipeline=step.pipeline_id,
        limits=_limits(tx),
    )
    return [*(row.units or ()), *_orphans(tx, step)]


def _orphans(tx: Tx, step: Any) -> list[int]:
    """Units of a step that is grouped otherwise now, until that is noted."""
    (many,) = tx.all(
        "SELECT coalesce(sum(units), 0) AS units FROM coverage_tally"
        " WHERE pipeline_id = :pipeline AND step_id = :step AND dims <> :dims AND why <> 'orphaned'",
        pipeline=step.pipeline_id,
        step=step.id,
        dims=step.dims,
    )
    if not many.units:
        return []
    rows = tx.all(
        "SELECT c.unit_id FROM coverage c JOIN unit u ON u.id = c.unit_id"
        " WHERE c.step_id = :step AND u.dims <> :dims AND c.why <> 'orphaned' ORDER BY c.unit_id",
        step=step.id,
        dims=step.dims,
    )
    return [r.unit_id for r in rows]


def _limits(tx: Tx) -> str:
    """The settings that decisions rest on, as text."""
    return str(msgspec.structs.astuple(tx.approval))


class _Division(Struct):
    """The units of these dimensions that are not what the catalogue says.

    Attributes:
        wanted: by key, the values, the number of members and their digest; of very many, some.
    """

    names: list[str]
    dims: str
    wanted: dict[str, tuple[dict[str, str | None], int, int]]


def _fold_differences(tx: Tx, pipeline: _Pipeline) -> None:
    """Fold the packages by which units differ from the catalogue."""
    divisions = [_differences(tx, pipeline, d) for d in _differing(tx, pipeline)]
    # One lost package is missing in a unit of each division: look for it where units are many and small.
    for division in sorted(divisions, key=lambda d: -len(d.wanted)):
        if len(division.wanted) > FEW:
            _fold_all(tx, pipeline)
            return
        units = {
            u.key: u
            for u in tx.all(
                "SELECT id, key, members, digest FROM unit WHERE pipeline_id = :pipeline AND dims = :dims"
                " AND key = ANY(:keys)",
                pipeline=pipeline.id,
                dims=division.dims,
                keys=list(division.wanted),
            )
        }
        still = [
            values
            for key, (values, members, digest) in division.wanted.items()
            if (members, digest) != ((units[key].members, int(units[key].digest)) if key in units else (0, 0))
        ]
        if still:
            _fold_ids(tx, pipeline, _strays(tx, pipeline, division, still, [u.id for u in units.values()]))
    _fold_ids(tx, pipeline, _without_edge(tx, pipeline))


def _values(packages: FromClause, names: Sequence[str]) -> ColumnElement[Any]:
    """The values of a unit, as `unit.values` has them."""
    return func.jsonb_build_object(*(x for n in names for x in (n, packages.c[n])))


def _weight(values: Sequence[ColumnElement[Any]]) -> ColumnElement[Any]:
    """A hash of a unit's values, in the order of their dimensions."""
    weight: ColumnElement[Any] = literal(1, BigInteger)
    for i, value in enumerate(values):
        weight = weight.bitwise_xor(func.coalesce(func.hashtextextended(value, i), 0))
    return sql_cast(weight, Numeric)


def _differing(tx: Tx, pipeline: _Pipeline) -> list[str]:
    """The dims whose units are not, all together, what the catalogue says; in a pass each over packages and units.

    Each unit's digest is the sum of its members' hashes. Weighted with a hash of the unit's values, the sum over all
    units is the sum over all packages: equal sums mean that each package is where it belongs.
    """
    divisions = {d: sorted(names) for d, names in _group_bys(pipeline).items()}
    packages = grouping.select_packages(
        grouping.rules_from(pipeline.rules), sorted({n for names in divisions.values() for n in names})
    ).subquery()
    weights = [_weight([packages.c[n] for n in names]) for names in divisions.values()]
    sums = (x for w in weights for x in (func.sum(w), func.sum(w * packages.c.item)))
    there = tx.conn.execute(select(*sums).select_from(packages)).one()
    u = schema.unit.c

    def here(dims: str) -> Any:
        weight = _weight([u["values"][n].astext for n in divisions[dims]])
        here = select(func.sum(weight * u.members), func.sum(weight * u.digest))
        return tx.conn.execute(here.where(u.pipeline_id == pipeline.id, u.dims == dims)).one()

    def total(sums: Sequence[Any]) -> list[int]:
        return [int(x or 0) % DIGEST_MODULUS for x in sums]

    return [d for i, d in enumerate(divisions) if total(there[2 * i : 2 * i + 2]) != total(here(d))]


def _differences(tx: Tx, pipeline: _Pipeline, dims: str) -> _Division:
    """Compare the members and the digest of each unit with the catalogue."""
    names = sorted(_group_bys(pipeline)[dims])
    packages = grouping.select_packages(grouping.rules_from(pipeline.rules), names).subquery()
    there = (
        select(
            _values(packages, names).label("values"),
            func.count().label("members"),
            func.mod(func.sum(packages.c.item), literal(DIGEST_MODULUS, Numeric)).label("digest"),
        )
        .group_by(*(packages.c[n] for n in names))
        .having(func.count() > 0)
        .subquery()
    )
    u = schema.unit.c
    here = (
        select(u["values"], u.members, u.digest)
        .where(u.pipeline_id == pipeline.id, u.dims == dims, u.members > 0)
        .subquery()
    )
    differing = (
        select(
            func.coalesce(there.c["values"], here.c["values"]),
            func.coalesce(there.c.members, 0),
            func.coalesce(there.c.digest, 0),
        )
        .select_from(there.join(here, there.c["values"] == here.c["values"], full=True))
        .where(
            or_(
                there.c.members.is_distinct_from(here.c.members),
                there.c.digest.is_distinct_from(here.c.digest),
            )
        )
        .limit(FEW + 1)
    )
    wanted = {grouping.unit_key(r[0]): (r[0], int(r[1]), int(r[2])) for r in tx.conn.execute(differing)}
    return _Division(names, dims, wanted)


def _strays(
    tx: Tx,
    pipeline: _Pipeline,
    division: _Division,
    values: Sequence[Mapping[str, str | None]],
    units: Sequence[int],
) -> list[int]:
    """The packages by which these units differ from the catalogue."""
    rules = grouping.rules_from(pipeline.rules)
    packages = grouping.select_packages(rules, division.names, values=values).subquery()
    there = select(packages.c.id, packages.c.item, _values(packages, division.names).label("values")).subquery()
    m, u = schema.unit_member.c, schema.unit.c
    here = (
        select(m.package_id, m.item, u["values"])
        .join(schema.unit, u.id == m.unit_id)
        .where(u.id == any_(literal(list(units), ARRAY(BigInteger))), m.removed.is_(None))
        .subquery()
    )
    same = and_(there.c.id == here.c.package_id, there.c["values"] == here.c["values"])
    differing = (
        select(func.coalesce(there.c.id, here.c.package_id))
        .select_from(there.join(here, same, full=True))
        .where(there.c.item.is_distinct_from(here.c.item))
    )
    return list(tx.conn.execute(differing).scalars())


def _without_edge(tx: Tx, pipeline: _Pipeline) -> list[int]:
    """A package of each finer unit that lies in no coarser one: of steps that came to depend on each other."""
    found: list[int] = []
    for fine, coarse in set(pipeline.nested):
        (count,) = tx.all(
            """
            SELECT (SELECT count(*) FROM unit WHERE pipeline_id = :pipeline AND dims = :fine AND members > 0) AS units,
                (SELECT coalesce(sum(t.units), 0) FROM upstream_tally t JOIN unit u ON u.id = t.upper_id
                WHERE u.pipeline_id = :pipeline AND u.dims = :coarse AND t.dims = :fine AND t.step_id IS NULL) AS edges
            """,
            pipeline=pipeline.id,
            fine=fine,
            coarse=coarse,
        )
        if count.units != count.edges:
            rows = tx.all(
                """
                SELECT (SELECT package_id FROM unit_member WHERE unit_id = l.id AND removed IS NULL LIMIT 1) AS package
                FROM unit l WHERE l.pipeline_id = :pipeline AND l.dims = :fine AND l.members > 0 AND NOT EXISTS (
                    SELECT 1 FROM unit_edge e JOIN unit u ON u.id = e.upper_id WHERE e.lower_id = l.id
                    AND u.dims = :coarse)
                """,
                pipeline=pipeline.id,
                fine=fine,
                coarse=coarse,
            )
            found.extend(r.package for r in rows)
    return found


def _fold_all(tx: Tx, pipeline: _Pipeline) -> None:
    last = 0
    while ids := [
        r.id
        for r in tx.all("SELECT id FROM raw_data_package WHERE id > :last ORDER BY id LIMIT :n", last=last, n=CHUNK)
    ]:
        _fold(tx, pipeline, ids)
        last = ids[-1]


def mend_tallies(tx: Tx, location_id: int) -> int:
    """Count all that is tallied anew; returns how many tallies were wrong, of which none should be."""
    return _mend_upstream(tx, location_id) + _mend_states(tx, location_id)


def _mend_upstream(tx: Tx, location_id: int) -> int:
    lies = """
        unit_edge e JOIN unit l ON l.id = e.lower_id JOIN pipeline p ON p.id = l.pipeline_id AND p.location_id = :loc
    """
    wrong = tx.all(
        f"""
        SELECT upper_id, dims, step_id, sum(units) AS units, sum(covered) AS covered, sum(blocked) AS blocked,
            mod(sum(digest), :modulus)::text AS digest
        FROM (
            SELECT e.upper_id, l.dims, NULL AS step_id, count(*) AS units, 0 AS covered, 0 AS blocked, 0 AS digest
            FROM {lies} GROUP BY e.upper_id, l.dims
            UNION ALL
            SELECT e.upper_id, l.dims, c.step_id, 0, count(*) FILTER (WHERE c.counts),
                count(*) FILTER (WHERE c.state = 'blocked'), sum(c.result) FILTER (WHERE c.counts)
            FROM {lies} JOIN coverage c ON c.unit_id = l.id AND (c.counts OR c.state = 'blocked')
            GROUP BY e.upper_id, l.dims, c.step_id
            UNION ALL
            SELECT t.upper_id, t.dims, t.step_id, -t.units, -t.covered, -t.blocked, -t.digest FROM upstream_tally t
            JOIN unit u ON u.id = t.upper_id JOIN pipeline p ON p.id = u.pipeline_id AND p.location_id = :loc) z
        GROUP BY upper_id, dims, step_id
        HAVING (sum(units), sum(covered), sum(blocked), mod(sum(digest), :modulus)) <> (0, 0, 0, 0)
        """,
        loc=location_id,
        modulus=DIGEST_MODULUS,
    )
    if wrong:
        tx.run(
            """
            INSERT INTO upstream_tally (upper_id, dims, step_id, units, covered, blocked, digest)
            SELECT upper_id, dims, step_id, units, covered, blocked, digest
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS w(upper_id bigint, dims text, step_id bigint, units bigint,
                covered bigint, blocked bigint, digest numeric)
            """,
            rows=encode([dict(r._mapping) for r in wrong]),
        )
    return len(wrong)


def _mend_states(tx: Tx, location_id: int) -> int:
    ours = "JOIN pipeline p ON p.id = u.pipeline_id AND p.location_id = :loc"
    wrong = tx.all(
        f"""
        SELECT pipeline_id, dims, step_id, state, why, sum(units) AS units FROM (
            SELECT u.pipeline_id, u.dims, NULL AS step_id, NULL AS state, NULL AS why, count(*) AS units
            FROM unit u {ours} GROUP BY u.pipeline_id, u.dims
            UNION ALL
            SELECT u.pipeline_id, u.dims, c.step_id, c.state, c.why, count(*)
            FROM coverage c JOIN unit u ON u.id = c.unit_id {ours}
            GROUP BY u.pipeline_id, u.dims, c.step_id, c.state, c.why
            UNION ALL
            SELECT u.pipeline_id, u.dims, u.step_id, u.state, u.why, -u.units FROM coverage_tally u {ours}) z
        GROUP BY pipeline_id, dims, step_id, state, why HAVING sum(units) <> 0
        """,
        loc=location_id,
    )
    if wrong:
        tx.run(
            """
            INSERT INTO coverage_tally (pipeline_id, dims, step_id, state, why, units)
            SELECT pipeline_id, dims, step_id, state, why, units
            FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS w(pipeline_id bigint, dims text, step_id bigint,
                state text, why text, units bigint)
            """,
            rows=encode([dict(r._mapping) for r in wrong]),
        )
    tx.run(
        """
        WITH many AS MATERIALIZED (SELECT id FROM coverage_tally FOR UPDATE SKIP LOCKED),
        gone AS (DELETE FROM coverage_tally t USING many WHERE t.id = many.id RETURNING t.*)
        INSERT INTO coverage_tally (pipeline_id, dims, step_id, state, why, units)
        SELECT pipeline_id, dims, step_id, state, why, sum(units) FROM gone
        GROUP BY pipeline_id, dims, step_id, state, why HAVING sum(units) <> 0
        """
    )
    return len(wrong)
