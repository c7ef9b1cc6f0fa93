"""Compare everything with the catalogue, and look again where something differs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct
from sqlalchemy import BigInteger, ColumnElement, FromClause, Numeric, and_, any_, func, literal, or_, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects.postgresql import ARRAY

from wfm import grouping, schema
from wfm.decide import (
    DIGEST_MODULUS,
)
from wfm.gaps import evaluation
from wfm.gaps.evaluation import Evaluated
from wfm.gaps.facts import FINGERPRINTS, IN_QUARANTINE, REVOKED, RULES, UPSTREAM, limits
from wfm.gaps.membership import CHUNK, Pipeline, fold_chunk, fold_ids, group_bys, pipelines_at
from wfm.model import (
    Actor,
)
from wfm.store import Tx, encode

log = logging.getLogger(__name__)

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
    for pipeline in pipelines_at(tx, location_id, pipelines):
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
            done.changed += len(evaluation.evaluate_chunk(tx, pairs, actor, done))
    return done


def _undecided(tx: Tx, step: Any) -> list[int]:
    """The units of a step whose decision may be another by now, or does not fit their runs."""
    (row,) = tx.all(
        f"""
        WITH rules AS MATERIALIZED ({RULES} WHERE s.id = :step),
        revoked AS MATERIALIZED (SELECT z.* FROM reduction_step s
            CROSS JOIN LATERAL ({REVOKED} GROUP BY r.unit_id) z WHERE s.id = :step),
        qu AS MATERIALIZED ({IN_QUARANTINE}),
        purged AS MATERIALIZED (SELECT DISTINCT t.run_id FROM task t JOIN run r ON r.id = t.run_id
            WHERE t.kind = 'purge' AND t.state <> 'closed' AND t.attempt = r.attempt AND r.step_id = :step)
        SELECT array_agg(z.unit_id ORDER BY z.unit_id) AS units FROM (
            SELECT u.id AS unit_id, c.state, c.requested, c.basis AS had_basis, c.gates AS had_gates, a.id AS active,
                f.id IS NOT NULL OR g.run_id IS NOT NULL AS gone, {FINGERPRINTS}
            FROM unit u CROSS JOIN rules JOIN reduction_step s ON s.id = :step
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (:step, u.id)
            LEFT JOIN backfill b ON b.id = c.backfill_id
            LEFT JOIN run a ON (a.step_id, a.unit_id) = (:step, u.id) AND a.finished_at IS NULL
            LEFT JOIN run f ON f.step_id = :step AND f.id = c.run_id AND f.state IN ('FAILED', 'CANCELLED')
            LEFT JOIN purged g ON g.run_id = c.run_id
            LEFT JOIN revoked rv ON rv.unit_id = u.id LEFT JOIN qu ON qu.unit_id = u.id
            {f"LEFT JOIN LATERAL ({UPSTREAM}) up ON true" if step.nested else "CROSS JOIN (SELECT NULL AS seen) up"}
            WHERE u.pipeline_id = :pipeline AND u.dims = :dims AND (s.active OR c.step_id IS NOT NULL)) z
        WHERE z.state IS NULL OR z.had_basis IS DISTINCT FROM z.basis
            OR z.state NOT IN ('covered', 'empty') AND z.had_gates IS DISTINCT FROM z.gates
            OR (z.state = 'active') <> (z.active IS NOT NULL)
            -- What was asked for and is covered has been answered: else the next change would count as asked for.
            OR z.state = 'covered' AND (z.gone OR z.requested)
        """,
        step=step.id,
        steps=[step.id],
        dims=step.dims,
        pipeline=step.pipeline_id,
        limits=limits(tx),
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


class _Division(Struct):
    """The units of these dimensions that are not what the catalogue says.

    Attributes:
        wanted: by key, the values, the number of members and their digest; of very many, some.
    """

    names: list[str]
    dims: str
    wanted: dict[str, tuple[dict[str, str | None], int, int]]


def _fold_differences(tx: Tx, pipeline: Pipeline) -> None:
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
            fold_ids(tx, pipeline, _strays(tx, pipeline, division, still, [u.id for u in units.values()]))
    fold_ids(tx, pipeline, _without_edge(tx, pipeline))


def _values(packages: FromClause, names: Sequence[str]) -> ColumnElement[Any]:
    """The values of a unit, as `unit.values` has them."""
    return func.jsonb_build_object(*(x for n in names for x in (n, packages.c[n])))


def _weight(values: Sequence[ColumnElement[Any]]) -> ColumnElement[Any]:
    """A hash of a unit's values, in the order of their dimensions."""
    weight: ColumnElement[Any] = literal(1, BigInteger)
    for i, value in enumerate(values):
        weight = weight.bitwise_xor(func.coalesce(func.hashtextextended(value, i), 0))
    return sql_cast(weight, Numeric)


def _differing(tx: Tx, pipeline: Pipeline) -> list[str]:
    """The dims whose units are not, all together, what the catalogue says; in a pass each over packages and units.

    Each unit's digest is the sum of its members' hashes. Weighted with a hash of the unit's values, the sum over all
    units is the sum over all packages: equal sums mean that each package is where it belongs.
    """
    divisions = {d: sorted(names) for d, names in group_bys(pipeline).items()}
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


def _differences(tx: Tx, pipeline: Pipeline, dims: str) -> _Division:
    """Compare the members and the digest of each unit with the catalogue."""
    names = sorted(group_bys(pipeline)[dims])
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
    pipeline: Pipeline,
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


def _without_edge(tx: Tx, pipeline: Pipeline) -> list[int]:
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


def _fold_all(tx: Tx, pipeline: Pipeline) -> None:
    last = 0
    while ids := [
        r.id
        for r in tx.all("SELECT id FROM raw_data_package WHERE id > :last ORDER BY id LIMIT :n", last=last, n=CHUNK)
    ]:
        fold_chunk(tx, pipeline, ids)
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
