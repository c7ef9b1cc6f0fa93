"""Decide what coverage says, and turn gaps into runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from wfm.decide import (
    GapDecision,
    examines,
    gap,
)
from wfm.gaps import membership, quarantine
from wfm.gaps.facts import Situation, situations, without_copies
from wfm.model import (
    Actor,
    CoverageState,
    Pair,
    Why,
)
from wfm.store import WITHDRAWN, Move, Prepared, Tx, encode


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
    with tx.by_key():
        # Steps in topological order: what a step decides is seen by those that depend on it.
        while waiting:
            wave = sorted(waiting.pop(min(waiting)))
            for start in range(0, len(wave), membership.CHUNK):
                in_time()
                changed = evaluate_chunk(tx, wave[start : start + membership.CHUNK], actor, done)
                done.changed += len(changed)
                for pair in pairs_below(tx, changed):
                    waiting[positions[pair[0]]].add(pair)
    return done


_NOTHING_TO_ASK = (Why.RUN, Why.BISECTING, Why.FAILED, Why.CANCELLED, Why.NO_VERSION)
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


_PAIRS_BELOW = Prepared(
    "pairs_below",
    """
    SELECT DISTINCT d.step_id, CASE WHEN ds.dims = us.dims THEN q.unit_id ELSE e.upper_id END AS unit_id
    FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
    JOIN step_dependency d ON d.upstream_id = q.step_id
    JOIN reduction_step us ON us.id = d.upstream_id JOIN reduction_step ds ON ds.id = d.step_id
    LEFT JOIN unit_edge e ON e.lower_id = q.unit_id AND ds.dims <> us.dims
    LEFT JOIN unit u ON u.id = e.upper_id
    WHERE ds.dims = us.dims OR u.dims = ds.dims
    """,
)


def pairs_below(tx: Tx, pairs: Collection[Pair]) -> set[Pair]:
    """The pairs that read the results of these."""
    if not pairs:
        return set()
    rows = tx.all(
        _PAIRS_BELOW,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    return {(r.step_id, r.unit_id) for r in rows}


_NEW_COVERAGE = Prepared(
    "new_coverage",
    """
    INSERT INTO coverage (step_id, unit_id, state, why)
    SELECT s, u, 'waiting', 'arrivals_not_sorted_yet'
    FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u) ORDER BY s, u ON CONFLICT DO NOTHING
    """,
)


def evaluate_chunk(tx: Tx, pairs: Sequence[Pair], actor: Actor, done: Evaluated) -> list[Pair]:
    with tx.by_key():
        tx.run(
            _NEW_COVERAGE,
            steps=[p[0] for p in pairs],
            units=[p[1] for p in pairs],
        )
        facts = situations(tx, pairs)
        decisions = {pair: gap(f.facts) for pair, f in facts.items()}
        starting = [pair for pair, d in decisions.items() if d.run or d.probe]
        for pair, names in without_copies(tx, starting).items():
            if needed := tuple(n for n in names if n not in facts[pair].unread(decisions[pair].probe)):
                decisions[pair] = gap(msgspec.structs.replace(facts[pair].facts, missing_copies=needed))
        for unwanted, reason in (
            (False, "newer input, version or config arrived before it started"),
            (True, "its step or unit is no longer part of its pipeline"),
        ):
            ids = [d.withdraw for p, d in decisions.items() if d.withdraw and facts[p].facts.unwanted is unwanted]
            _withdraw(tx, ids, reason, actor, done)
        again = _settle_quarantine(tx, facts, decisions, actor)
        made: dict[Pair, int] = {}
        by_reason: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for pair, d in decisions.items():
            if d.run:
                by_reason[facts[pair].cause].append(facts[pair].new_run)
            elif d.probe:
                run = facts[pair].probe(d.probe)
                decisions[pair] = msgspec.structs.replace(d, reason=examines(facts[pair].facts, run["probe"]))
                by_reason[decisions[pair].reason.removeprefix(": ")].append(run)
        for reason, rows in by_reason.items():
            made |= tx.create_runs(rows, Actor(actor.name, reason))
        done.runs.extend(made.values())
        changed = _write(tx, facts, {pair: d for pair, d in decisions.items() if pair not in again}, made)
        # What is left out changes what these want; there are ever fewer to leave out, or to release.
        return changed + (evaluate_chunk(tx, again, actor, done) if again else [])


def _settle_quarantine(
    tx: Tx, facts: Mapping[Pair, Situation], decisions: Mapping[Pair, GapDecision], actor: Actor
) -> list[Pair]:
    """Put into quarantine what is guilty, release what explains nothing; returns the pairs to be decided again."""
    guilty = [facts[pair].guilty(pair, d.guilty, d.evidence) for pair, d in decisions.items() if d.guilty]
    if guilty:
        quarantine.set_aside(tx, guilty, actor)
    useless = {pair: d.release for pair, d in decisions.items() if d.release}
    for pair, reason in useless.items():
        rows = [m.row for m in facts[pair].aside if not m.proven]
        quarantine.release(tx, rows, Actor(actor.name, reason))
    return [*(g.pair for g in guilty), *useless]


def _withdraw(tx: Tx, ids: Sequence[int], reason: str, actor: Actor, done: Evaluated) -> None:
    runs = tx.lock_runs(ids, coverage=False)
    moved, _ = tx.move(
        [
            Move(r, "withdraw", Actor(actor.name, reason), sets={"failure": WITHDRAWN, "message": reason})
            for r in runs.values()
        ]
    )
    done.withdrawn.extend(moved)


_WRITE_COVERAGE = Prepared(
    "write_coverage",
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
        updated_at = CASE WHEN n.new THEN now() ELSE c.updated_at END, basis = d.basis, gates = d.gates,
        quarantined = d.quarantined
    FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS d(step_id bigint, unit_id bigint, state text, why text,
        reason text, wanted text, covered_by bigint, settled boolean, due_in float8, basis bigint, gates bigint,
        quarantined bigint[])
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
)


def _write(
    tx: Tx, facts: Mapping[Pair, Situation], decisions: Mapping[Pair, GapDecision], made: Mapping[Pair, int]
) -> list[Pair]:
    rows = tx.all(
        _WRITE_COVERAGE,
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
                    "quarantined": [m.row for m in facts[pair].aside] or None,
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
