"""Which raw data packages belong to which units, and which finer units lie in which coarser ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from msgspec import Struct

from wfm import grouping
from wfm.decide import (
    DIGEST_MODULUS,
    set_digest,
)
from wfm.model import Pair
from wfm.store import Prepared, Tx, encode

CHUNK = 1000
"""Pairs that are evaluated, and packages that are folded, at once: what a flood costs in memory besides their ids."""


class _Step(Struct, frozen=True):
    id: int
    dims: str
    group_by: list[str]


class Pipeline(Struct, frozen=True):
    id: int
    rules: list[Any]
    steps: list[_Step]
    nested: list[tuple[str, str]]
    """(finer, coarser) dims of steps that depend on each other."""


def group_bys(pipeline: Pipeline) -> dict[str, list[str]]:
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
    for pipeline in pipelines_at(tx, location_id, pipelines):
        touched |= fold_ids(tx, pipeline, ids)
    return touched


def fold_ids(tx: Tx, pipeline: Pipeline, packages: Collection[int]) -> set[Pair]:
    ids = sorted(set(packages))
    touched: set[Pair] = set()
    for start in range(0, len(ids), CHUNK):
        touched |= fold_chunk(tx, pipeline, ids[start : start + CHUNK])
    return touched


def fold_chunk(tx: Tx, pipeline: Pipeline, ids: Sequence[int]) -> set[Pair]:
    touched: set[Pair] = set()
    before: dict[str, Mapping[int, int]] = {}
    after: dict[str, Mapping[int, int]] = {}
    empty: list[int] = []
    with tx.by_key():
        for dims, group_by in group_bys(pipeline).items():
            before[dims], after[dims], changed = _fold_dims(tx, pipeline, dims, group_by, ids)
            touched |= {(s.id, u) for s in pipeline.steps if s.dims == dims for u in changed}
            empty += [u for u, members in changed.items() if not members]
        _fold_edges(tx, pipeline.nested, before, after, empty)
    return touched


def pipelines_at(tx: Tx, location_id: int, ids: Collection[int] | None) -> list[Pipeline]:
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
    found: dict[int, Pipeline] = {}
    for r in rows:
        p = found.setdefault(r.id, Pipeline(r.id, r.rules, [], []))
        p.steps.append(_Step(r.step_id, r.dims, r.group_by))
        p.nested.extend((finer, r.dims) for finer in r.finer or ())
    return list(found.values())


_NEW_UNITS = Prepared(
    "new_units",
    """
    INSERT INTO unit (pipeline_id, dims, key, "values")
    SELECT :pipeline, :dims, key, vals FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS u(key text, vals jsonb)
    ORDER BY key ON CONFLICT DO NOTHING
    """,
)

_LOCK_UNITS = Prepared(
    "lock_units",
    """
    SELECT id, key, digest, members, generation FROM unit WHERE pipeline_id = :pipeline AND dims = :dims
        AND id IN (SELECT id FROM unit WHERE pipeline_id = :pipeline AND dims = :dims AND key = ANY(:keys)
            UNION SELECT unit_id FROM unit_member WHERE package_id = ANY(:ids) AND removed IS NULL)
    ORDER BY id FOR NO KEY UPDATE
    """,
)

_COUNT_MEMBERS = Prepared(
    "count_members",
    """
    UPDATE unit u SET generation = c.generation, digest = c.digest, members = c.members
    FROM jsonb_to_recordset(CAST(:rows AS jsonb))
        AS c(id bigint, generation bigint, digest numeric, members bigint)
    WHERE u.id = c.id
    """,
)

_LEAVE = Prepared(
    "leave_units",
    """
    UPDATE unit_member m SET removed = u.generation FROM unit u, jsonb_to_recordset(CAST(:rows AS jsonb))
        AS g(unit bigint, package bigint)
    WHERE m.unit_id = g.unit AND m.package_id = g.package AND m.removed IS NULL AND u.id = g.unit
    """,
)

_JOIN = Prepared(
    "join_units",
    """
    INSERT INTO unit_member (unit_id, package_id, added, item)
    SELECT g.unit, g.package, u.generation, g.item FROM unit u, jsonb_to_recordset(CAST(:rows AS jsonb))
        AS g(unit bigint, package bigint, item numeric)
    WHERE u.id = g.unit
    """,
)

_UNITS_OF = Prepared(
    "units_of", "SELECT package_id, unit_id, item FROM unit_member WHERE package_id = ANY(:ids) AND removed IS NULL"
)


def _fold_dims(
    tx: Tx, pipeline: Pipeline, dims: str, group_by: Sequence[str], ids: Sequence[int]
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """One member set per unit of these dimensions.

    Returns:
        the unit of each package before; the unit of each package now; the members of each unit that changed.
    """
    names = sorted(group_by)
    rules = grouping.rules_from(pipeline.rules)
    target: dict[int, tuple[str, int]] = {}
    values: dict[str, dict[str, str | None]] = {}
    keys: dict[tuple[str | None, ...], str] = {}
    for row in tx.conn.execute(grouping.select_packages(rules, names, package_ids=ids)):
        package, item, *found = row
        key = keys.get(tuple(found))
        if key is None:
            unit_values = dict(zip(names, found, strict=True))
            key = keys[tuple(found)] = grouping.unit_key(unit_values)
            values[key] = unit_values
        target[package] = (key, int(item))

    tx.run(
        _NEW_UNITS,
        pipeline=pipeline.id,
        dims=dims,
        rows=encode([{"key": k, "vals": v} for k, v in values.items()]),
    )
    # Lock before looking: another trigger-manager may be folding the same packages.
    units = {
        u.key: u
        for u in tx.all(
            _LOCK_UNITS,
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
            _UNITS_OF,
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
            _COUNT_MEMBERS,
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
                _LEAVE,
                rows=encode([{"unit": u, "package": p} for u, gone in removed.items() for p in gone]),
            )
        tx.run(
            _JOIN,
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
