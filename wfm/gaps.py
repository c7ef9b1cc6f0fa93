"""The gap engine: packages into units, units into coverage, gaps into runs.

Truth is level-triggered: what must run is derived from the catalogue and from coverage, never from the order of
messages. An event only says where to look first. Three functions, all set-based, all repeatable:

* `fold` brings the member sets of units up to date for some packages;
* `evaluate` decides for some (step, unit) pairs what coverage says, and turns gaps into runs;
* `pairs_below` names the pairs that depend on others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from wfm import grouping
from wfm.decide import (
    DIGEST_MODULUS,
    AcceptedRun,
    ActiveRun,
    ApprovalLimits,
    EndedRun,
    GapDecision,
    GapFacts,
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
)
from wfm.model import (
    FINAL_STATES,
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
        for start in range(0, len(ids), CHUNK):
            touched |= _fold(tx, pipeline, ids[start : start + CHUNK])
    return touched


def _fold(tx: Tx, pipeline: _Pipeline, ids: Sequence[int]) -> set[Pair]:
    touched: set[Pair] = set()
    before: dict[str, Mapping[int, int]] = {}
    after: dict[str, Mapping[int, int]] = {}
    for dims, group_by in {s.dims: s.group_by for s in pipeline.steps}.items():
        before[dims], after[dims], changed = _fold_dims(tx, pipeline, dims, group_by, ids)
        touched |= {(s.id, u) for s in pipeline.steps if s.dims == dims for u in changed}
    _fold_edges(tx, pipeline.nested, before, after)
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
) -> tuple[dict[int, int], dict[int, int], set[int]]:
    """One member set per unit of these dimensions.

    Returns:
        the unit of each package before; the unit of each package now; units that changed.
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
                AND (key = ANY(:keys) OR id IN (SELECT unit_id FROM unit_member
                    WHERE package_id = ANY(:ids) AND removed IS NULL))
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
            "SELECT package_id, unit_id, item FROM unit_member"
            " WHERE package_id = ANY(:ids) AND unit_id = ANY(:units) AND removed IS NULL",
            ids=list(ids),
            units=list(by_id),
        )
    }
    for (package, unit), item in here.items():
        wanted = target.get(package)
        if wanted is None or units[wanted[0]].id != unit or wanted[1] != item:
            removed[unit][package] = item
    for package, (key, item) in target.items():
        unit = units[key].id
        if here.get((package, unit)) != item:
            added[unit][package] = item
    changed = set(added) | set(removed)
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
                        "members": by_id[u].members + len(added[u]) - len(removed[u]),
                    }
                    for u in sorted(changed)
                ]
            ),
        )
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
            due_at = now() + d.due_in * interval '1 s', updated_at = now()
        FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS d(step_id bigint, unit_id bigint, state text, why text,
            reason text, wanted text, covered_by bigint, settled boolean, due_in float8)
            LEFT JOIN run r ON r.id = d.covered_by
        WHERE (c.step_id, c.unit_id) = (d.step_id, d.unit_id) AND (d.due_in IS NOT NULL
            OR (c.state, c.why, c.reason, c.wanted, c.run_id, c.due_at IS NULL) IS DISTINCT FROM
               (d.state, d.why, d.reason, d.wanted, coalesce(d.covered_by, c.run_id), true)
            OR (c.requested AND d.settled))
        RETURNING c.step_id, c.unit_id
        """,
        rows=encode(
            [
                {
                    "step_id": pair[0],
                    "unit_id": pair[1],
                    "state": d.state,
                    "why": d.why,
                    "reason": f"run {made[pair]}" if pair in made else d.reason,
                    "wanted": facts[pair].facts.wanted,
                    "covered_by": d.covered_by,
                    "settled": d.run or d.state is CoverageState.COVERED,
                    "due_in": d.due_in,
                }
                for pair, d in decisions.items()
            ]
        ),
    )
    changed = [(r.step_id, r.unit_id) for r in rows]
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
    """The facts of one pair, and the run that would follow from them."""

    facts: GapFacts
    cause: str
    new_run: dict[str, Any]


def _facts(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, _Situation]:
    """Everything `decide.gap` looks at, in few statements; locks the coverage rows."""
    final = "('" + "','".join(sorted(FINAL_STATES)) + "')"
    rows = tx.all(
        f"""
        WITH q AS MATERIALIZED (
            SELECT c.step_id, c.unit_id, c.requested, c.requested_for, c.run_id, c.wanted, c.wanted_since,
                c.settling_since, c.paused_by, c.paused_reason, c.backfill_id
            FROM coverage c
            JOIN unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS w(step_id, unit_id)
                ON (w.step_id, w.unit_id) = (c.step_id, c.unit_id)
            ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c)
        SELECT q.step_id, q.unit_id, q.requested, q.requested_for, s.name AS step, s.active AS step_active,
            s.version_policy, s.version AS named_version, s.software_id, sw.name AS software, s.resources,
            s.cooldown_seconds, s.paused_by AS step_paused_by, s.paused_reason AS step_paused_reason,
            s.on_stale, s.approval_units, s.approval_core_hours,
            p.name AS pipeline, p.id AS pipeline_id, p.location_id, p.priority, p.stale_priority,
            p.enabled AND p.deleted_at IS NULL AS enabled,
            p.paused_by, p.paused_reason, p.trigger_type, p.trigger_config, now() AS now,
            q.paused_by AS unit_paused_by, q.paused_reason AS unit_paused_reason, b.id AS backfill_id,
            b.name AS backfill, b.priority AS backfill_priority, coalesce(b.paused_by, '') AS backfill_paused_by,
            b.paused_reason AS backfill_paused_reason,
            s.dims, s.group_by, u.dims AS unit_dims, u.key AS unit, u.members, u.digest, u.generation,
            cf.name AS config, cr.id AS config_id,
            cr.revision AS config_revision, coalesce(cr.hash, '') AS config_hash,
            a.id AS active_id, a.state AS active_state, a.wanted AS active_wanted,
            prev.id AS prev_id, prev.wanted AS prev_wanted, prev.generation AS prev_generation,
            prev.software_version_id AS prev_version_id, psw.name AS prev_software, pv.version AS prev_version,
            coalesce(pc.hash, '') AS prev_config_hash,
            pv.state = 'revoked' OR coalesce(pc.revoked_by, '') <> '' AS prev_revoked,
            s.fan_in, CASE WHEN s.fan_in <> 'all' THEN
                (SELECT sum((x ->> 'read')::int) FROM jsonb_array_elements(prev.upstream) x) END AS accepted_results,
            q.wanted AS known_wanted, s.settle_seconds, s.settle_at_most_seconds,
            extract(epoch FROM now() - q.wanted_since)::float AS quiet_seconds,
            extract(epoch FROM now() - q.settling_since)::float AS settling_seconds,
            CASE WHEN s.cooldown_seconds > 0 THEN extract(epoch FROM now() - (SELECT max(created_at) FROM run r
                WHERE (r.step_id, r.unit_id) = (q.step_id, q.unit_id) AND r.failure <> :withdrawn
                    AND r.id IS DISTINCT FROM a.id))::float END AS since_last_run,
            up.steps AS upstream
        FROM q JOIN reduction_step s ON s.id = q.step_id JOIN pipeline p ON p.id = s.pipeline_id
        JOIN software sw ON sw.id = s.software_id JOIN unit u ON u.id = q.unit_id
        LEFT JOIN run prev ON prev.id = q.run_id LEFT JOIN software_version pv ON pv.id = prev.software_version_id
        LEFT JOIN software psw ON psw.id = pv.software_id
        LEFT JOIN config_revision pc ON pc.id = prev.config_revision_id
        LEFT JOIN backfill b ON b.id = q.backfill_id
        LEFT JOIN run a ON (a.step_id, a.unit_id) = (q.step_id, q.unit_id) AND a.state NOT IN {final}
        LEFT JOIN config cf ON cf.id = s.config_id
        LEFT JOIN LATERAL (SELECT id, revision, hash FROM config_revision WHERE config_id = s.config_id
                AND revoked_by = '' AND (s.config_revision_id IS NULL OR id = s.config_revision_id)
            ORDER BY revision DESC LIMIT 1) cr ON true
        LEFT JOIN LATERAL (
            SELECT jsonb_agg(to_jsonb(z)) AS steps FROM (
                SELECT us.name AS step, n.total, n.covered, n.blocked, n.digest::text AS digest, n.parts
                FROM step_dependency d JOIN reduction_step us ON us.id = d.upstream_id
                JOIN LATERAL ({UPSTREAM_COUNTS}) n ON true
                WHERE d.step_id = s.id) z) up ON true
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
        withdrawn=WITHDRAWN,
    )
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


def _ended(tx: Tx, wanted: Mapping[Pair, str]) -> dict[Pair, EndedRun]:
    """The latest ended run with the wanted digest; a completed one before all others, unless its files were purged."""
    rows = tx.all(
        """
        SELECT DISTINCT ON (r.step_id, r.unit_id) r.step_id, r.unit_id, r.id, r.state, r.message,
            CASE r.state WHEN 'FAILED' THEN (SELECT count(*) FROM run f JOIN transition t ON t.run_id = f.id
                WHERE (f.step_id, f.unit_id, f.wanted) = (q.s, q.u, q.w) AND t.trigger = 'fail') ELSE 0 END AS failures
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
    return {(r.step_id, r.unit_id): EndedRun(r.id, RunState(r.state), r.message, r.failures) for r in rows}


def _situation(
    r: Any,
    version: SoftwareVersion | None,
    fault: str,
    upstream: tuple[Upstream, ...],
    wanted: str,
    ended: EndedRun | None,
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
        active=ActiveRun(r.active_id, RunState(r.active_state), r.active_wanted) if r.active_id else None,
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
    }
    accepted = r.prev_wanted and AcceptedRun(r.prev_wanted, r.prev_software, r.prev_version, r.prev_config_hash)
    own = own_members(FanIn(r.fan_in), int(r.digest), r.members)
    now_wanted = (*own, by_step, r.software, version.version if version else "", r.config_hash)
    why = cause(accepted, *now_wanted, revoked=revoked)
    if r.requested_for and (r.requested or r.active_id):
        why += f"; {r.requested_for}"
    if r.backfill_id:
        why += f"; backfill {r.backfill}"
    return _Situation(facts, why, new_run)


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
