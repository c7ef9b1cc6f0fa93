"""The certificate of a night: every raw data package covered, waived or explained; and what was waived."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta

import msgspec
from msgspec import Struct, structs
from sqlalchemy import Connection, literal, select, union_all

from wfm import grouping
from wfm.decide import NOT_ASKED_FOR, standing
from wfm.model import Standing, Why
from wfm.schema import executed_obs_unit, raw_data_package
from wfm.views.coverage import WhyLine, explain, of_members
from wfm.views.planned import PlanLine, planned
from wfm.views.quarantine import PACKAGES_LEFT_OUT
from wfm.views.sql import _OF_PIPELINE, _PIPELINES_HERE, _all, _require, _require_location, _rows

IN_FORCE = "w.ended_at IS NULL AND w.until > now()"
"""For a row w of waiver."""


class WaiverLine(Struct, frozen=True, kw_only=True):
    """What need not be covered, by whose word, why and until when: a package, or a unit of a step.

    Attributes:
        in_force: neither over nor ended before its time; by the clock of the database.
    """

    package: str | None
    pipeline: str | None
    step: str | None
    unit: str | None
    until: datetime
    actor: str
    reason: str
    created_at: datetime
    in_force: bool
    ended_at: datetime | None
    ended_by: str
    ended_reason: str

    @property
    def what(self) -> str:
        """Its name for people."""
        return self.package or f"{self.pipeline}/{self.step} {self.unit}"


class CertifiedPackage(Struct, frozen=True):
    """One raw data package of the night, and where it stands."""

    name: str
    standing: Standing


class OpenUnit(WhyLine, frozen=True, kw_only=True):
    """A (step, unit) that is neither covered nor waived: how many packages of the night it holds, and the first."""

    packages: int
    example: str


class Certificate(Struct, frozen=True, kw_only=True):
    """Where the raw data packages of one observing night stand at one location.

    Attributes:
        counts: packages by standing (each is there).
        open: what is missing. explained: what is not asked for. Both by unit, those with most packages first.
        unsorted: packages that no unit has yet, though they are selected. unselected: those of no enabled pipeline.
        planned: scheduled observations of the night that have neither arrived nor been declared lost.
        waivers: in force, about this night.
    """

    night: date
    counts: dict[Standing, int]
    open: list[OpenUnit]
    explained: list[OpenUnit]
    unsorted: list[str]
    unselected: list[str]
    planned: list[PlanLine]
    waivers: list[WaiverLine]
    packages: list[CertifiedPackage]

    @property
    def complete(self) -> bool:
        """Whether every package is covered, waived or explained, and nothing that was planned is still missing."""
        return not self.counts[Standing.OPEN] and not self.planned


def last_night(conn: Connection) -> date:
    """The last observing night that is over, by the clocks of UTC."""
    (now,) = _all(conn, "SELECT (now() - interval '12 h')::date AS tonight")
    tonight: date = now["tonight"]
    return tonight - timedelta(days=1)


_ASKED = f"p.frozen_at IS NULL AND {_OF_PIPELINE}"
"""Campaigns are no part of a night: what they hold was chosen, and says how far it is by itself."""


def _of_night(conn: Connection, night: date) -> list[int]:
    """The packages of a night, as the dimension of that name tells it.

    Those whose observation does not say when it began belong to the night in which they were registered.
    """
    began, registered = executed_obs_unit.c.started_at, raw_data_package.c.registered_at
    found = []
    for time, extra in ((began, ()), (registered, (began.is_(None),))):
        tells = grouping.at_time(grouping.DIMENSIONS["night"].value, time) == night.isoformat()
        found.append(
            select(raw_data_package.c.id)
            .select_from(grouping.joined([], ["night"]))
            .where(tells, time >= night - _AROUND, time < night + _AROUND, *extra)
        )
    return list(conn.execute(union_all(*found)).scalars())


_AROUND = timedelta(days=3)
"""A night lies within that of its date, whatever the clocks; for the index."""


class _Package(Struct, frozen=True):
    id: int
    name: str
    waived: bool
    pending: bool
    pipelines: list[int]
    pairs_waived: bool
    open: list[int]


class _Pair(Struct, frozen=True):
    id: int
    pipeline: str
    step: str
    unit: str
    step_id: int
    unit_id: int
    why: Why
    aside: list[str] = []


def certificate(conn: Connection, night: date, *, location_id: int, pipeline: str | None = None) -> Certificate:
    """Whether every raw data package of a night is covered, waived or explained, and if not, what is missing.

    Args:
        pipeline: look at this one only; None for all enabled ones of the location.

    Raises:
        NotFoundError: no such location, or no such pipeline there.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    asked = {"loc": location_id, "pipeline": pipeline, "packages": _of_night(conn, night)}
    packages, pairs = _look(conn, asked)
    missing = _not_sorted(conn, packages, asked)
    where = {
        p.id: standing(
            selected=bool(p.pipelines) or p.id in missing,
            unsorted=p.pending or p.id in missing,
            open_pairs=() if p.waived else (pairs[i].why for i in p.open),
            waived=(p.waived and bool(p.open)) or p.pairs_waived,
        )
        for p in packages
    }
    units = _open_units(conn, packages, pairs)
    return Certificate(
        night=night,
        counts=dict.fromkeys(Standing, 0) | Counter(where.values()),
        open=[u for u in units if u.why not in NOT_ASKED_FOR],
        explained=[u for u in units if u.why in NOT_ASKED_FOR],
        unsorted=[p.name for p in packages if p.pending or p.id in missing],
        unselected=[p.name for p in packages if not p.pipelines and not p.pending and p.id not in missing],
        planned=[o for o in planned(conn, night=night) if o.state in ("planned", "late")],
        waivers=_about(conn, asked),
        packages=[CertifiedPackage(p.name, where[p.id]) for p in packages],
    )


def _look(conn: Connection, asked: Mapping[str, object]) -> tuple[list[_Package], dict[int, _Pair]]:
    """The packages of the night; the pairs that are neither covered nor waived, by the numbers that packages name.

    So are those that are covered without some of the packages, for these.
    """
    (row,) = _all(
        conn,
        f"""
        WITH night AS MATERIALIZED (SELECT id, name FROM raw_data_package WHERE id = ANY(:packages)),
        member AS MATERIALIZED (SELECT m.package_id, m.unit_id FROM night n
            JOIN unit_member m ON m.package_id = n.id AND m.removed IS NULL),
        pair AS MATERIALIZED (
            SELECT row_number() OVER () AS id, p.name AS pipeline, s.name AS step, u.key AS unit, s.id AS step_id,
                u.id AS unit_id, p.id AS pipeline_id, coalesce(c.why, 'arrivals_not_sorted_yet') AS why,
                c.state IS DISTINCT FROM 'covered' AS uncovered, c.quarantined IS NOT NULL AS partial,
                EXISTS (SELECT 1 FROM waiver w WHERE (w.step_id, w.unit_id) = (s.id, u.id) AND {IN_FORCE}) AS waived
            FROM (SELECT DISTINCT unit_id FROM member) x JOIN unit u ON u.id = x.unit_id
            JOIN pipeline p ON p.id = u.pipeline_id AND p.location_id = :loc AND p.enabled AND p.deleted_at IS NULL
                AND {_ASKED}
            JOIN reduction_step s ON s.pipeline_id = p.id AND s.dims = u.dims AND s.active
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)),
        pending AS MATERIALIZED (SELECT DISTINCT (body ->> 'raw_data_package')::bigint AS package_id FROM event
            WHERE location_id = :loc AND type = 'data.arrived' AND done_at IS NULL
                AND jsonb_typeof(body -> 'raw_data_package') = 'number'),
        -- A covered pair without some of its packages is an open one of these, under a number of its own.
        aside AS MATERIALIZED (SELECT DISTINCT a.id, x.member, x.package_id FROM pair a JOIN ({PACKAGES_LEFT_OUT}) x
            ON (x.step_id, x.unit_id) = (a.step_id, a.unit_id) WHERE a.partial AND NOT a.uncovered),
        asked AS (
            SELECT m.package_id, a.pipeline_id, a.waived, x.id IS NOT NULL OR a.uncovered AS uncovered,
                CASE WHEN x.id IS NULL THEN a.id ELSE -a.id END AS id
            FROM member m JOIN pair a ON a.unit_id = m.unit_id
            LEFT JOIN aside x ON (x.id, x.package_id) = (a.id, m.package_id)),
        stands AS (
            SELECT n.id, n.name, q.package_id IS NOT NULL AS pending,
                EXISTS (SELECT 1 FROM waiver w WHERE w.package_id = n.id AND {IN_FORCE}) AS waived,
                coalesce(array_agg(DISTINCT a.pipeline_id) FILTER (WHERE a.id IS NOT NULL), '{{}}') AS pipelines,
                coalesce(bool_or(a.uncovered AND a.waived), false) AS pairs_waived,
                coalesce(array_agg(a.id) FILTER (WHERE a.uncovered AND NOT a.waived), '{{}}') AS open
            FROM night n LEFT JOIN asked a ON a.package_id = n.id
            LEFT JOIN pending q ON q.package_id = n.id
            GROUP BY n.id, n.name, q.package_id)
        SELECT (SELECT coalesce(jsonb_agg(to_jsonb(t) ORDER BY t.name COLLATE "C"), '[]') FROM stands t) AS packages,
            (SELECT coalesce(jsonb_agg(to_jsonb(a)), '[]') FROM (
                SELECT id, pipeline, step, unit, step_id, unit_id, why, '[]'::jsonb AS aside FROM pair a
                WHERE a.uncovered AND NOT a.waived
                UNION ALL SELECT -a.id, a.pipeline, a.step, a.unit, a.step_id, a.unit_id, 'quarantined', x.members
                FROM pair a JOIN (SELECT id, jsonb_agg(DISTINCT member) AS members FROM aside GROUP BY id) x
                    ON x.id = a.id WHERE NOT a.waived) a) AS pairs
        """,
        **asked,
    )
    pairs = msgspec.convert(row["pairs"], list[_Pair])
    return msgspec.convert(row["packages"], list[_Package]), {p.id: p for p in pairs}


def _not_sorted(conn: Connection, packages: Sequence[_Package], asked: Mapping[str, object]) -> set[int]:
    """Packages that an enabled pipeline selects, though no unit of it has them."""
    chosen = []
    for p in _all(
        conn,
        f"""
        SELECT p.id, g.rules FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id
        WHERE p.location_id = :loc AND p.enabled AND p.deleted_at IS NULL AND {_ASKED}
            AND EXISTS (SELECT 1 FROM reduction_step s WHERE s.pipeline_id = p.id AND s.active)
        """,
        loc=asked["loc"],
        pipeline=asked["pipeline"],
    ):
        without = [k.id for k in packages if p["id"] not in k.pipelines]
        if without:
            rules = grouping.rules_from(p["rules"])
            chosen.append(select(grouping.select_packages(rules, [], package_ids=without).subquery().c.id))
    return set(conn.execute(union_all(*chosen, select(literal(0)))).scalars()) - {0}


def _open_units(conn: Connection, packages: Sequence[_Package], pairs: Mapping[int, _Pair]) -> list[OpenUnit]:
    """What is neither covered nor waived, unit by unit, with its reason and what would change it."""
    names: dict[int, list[str]] = defaultdict(list)
    for p in packages:
        for i in () if p.waived else p.open:
            names[i].append(p.name)
    holding = {(pairs[i].pipeline, pairs[i].step, pairs[i].unit): named for i, named in names.items()}
    aside = {(x.pipeline, x.step, x.unit): x.aside for i in names if (x := pairs[i]).aside}
    lines = explain(conn, [(pairs[i].step_id, pairs[i].unit_id) for i in names])
    found = []
    for line in lines:
        named = holding[line.pipeline, line.step, line.unit]
        members = aside.get((line.pipeline, line.step, line.unit))
        said = of_members(line, members) if members else line
        found.append(OpenUnit(**structs.asdict(said), packages=len(named), example=named[0]))
    return sorted(found, key=lambda u: -u.packages)


# --- waivers ---

_WAIVERS = f"""
SELECT k.name AS package, p.name AS pipeline, s.name AS step, u.key AS unit, w.until, w.actor, w.reason, w.created_at,
    {IN_FORCE} AS in_force, w.ended_at, w.ended_by, w.ended_reason
FROM waiver w LEFT JOIN raw_data_package k ON k.id = w.package_id LEFT JOIN reduction_step s ON s.id = w.step_id
LEFT JOIN pipeline p ON p.id = s.pipeline_id LEFT JOIN unit u ON u.id = w.unit_id
"""


def waivers(conn: Connection, *, in_force: bool = False, limit: int = 1000) -> list[WaiverLine]:
    """What was waived, the newest first; with `in_force`, only what still is."""
    which = f"WHERE {IN_FORCE}" if in_force else ""
    return _rows(conn, WaiverLine, f"{_WAIVERS} {which} ORDER BY w.id DESC LIMIT :limit", limit=limit)


def _about(conn: Connection, asked: Mapping[str, object]) -> list[WaiverLine]:
    return _rows(
        conn,
        WaiverLine,
        f"""
        {_WAIVERS} WHERE {IN_FORCE} AND (w.package_id = ANY(:packages)
            OR p.location_id = :loc AND {_OF_PIPELINE} AND EXISTS (SELECT 1 FROM unit_member m
                WHERE m.unit_id = w.unit_id AND m.package_id = ANY(:packages) AND m.removed IS NULL))
        ORDER BY w.id
        """,
        **asked,
    )
