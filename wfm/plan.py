"""The observing plan against what came: what is still expected, what is late, what is absent.

Nothing here is remembered but what people say (a lost observation) and what was told (an absence). Whether a scheduled
observation was carried out follows from the catalogue: an executed observation carries out the one that it names; or
else the one of the same obs_unit in whose time, from planned start to planned end, it began (of several, the one that
is planned to begin last). It has arrived when each
module that the plan names (or any, where it names none) has a package of it that did not fail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Text, any_, case, func, literal, or_, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql import visitors

from wfm import grouping
from wfm.decide import ObservingPlan
from wfm.events import DataAbsent, DataBack
from wfm.model import Actor, Why
from wfm.schema import executed_obs_unit, instrument_module, obs_unit, scheduled_observation
from wfm.store import Tx

CARRIED_OUT_BY = """
SELECT e.id, e.name FROM executed_obs_unit e WHERE e.scheduled = o.name AND e.scheduled <> ''
UNION ALL
SELECT e.id, e.name FROM executed_obs_unit e WHERE e.scheduled = '' AND e.obs_unit_id = o.obs_unit_id
    AND e.started_at >= o.planned_start AND e.started_at < o.planned_end
    AND NOT EXISTS (SELECT 1 FROM scheduled_observation v WHERE v.obs_unit_id = o.obs_unit_id
        AND e.started_at >= v.planned_start AND e.started_at < v.planned_end
        AND (v.planned_start, v.name) > (o.planned_start, o.name))
"""
"""For a row o of scheduled_observation: the executed observations (id, name) that carry it out."""

MISSING = f"""
SELECT coalesce(array_agg(w.module ORDER BY w.module), '{{}}') AS missing
FROM (SELECT jsonb_array_elements_text(o.modules) AS module UNION ALL SELECT '' WHERE o.modules = '[]') w
WHERE NOT EXISTS (SELECT 1 FROM ({CARRIED_OUT_BY}) x JOIN raw_data_package k ON k.executed_obs_unit_id = x.id
    JOIN instrument_module im ON im.id = k.instrument_module_id
    WHERE k.state <> 'failed' AND w.module IN ('', im.name))
"""
"""For a row o of scheduled_observation: the modules of which no package has come; '' where any would do."""


def look_again(conn: Connection) -> None:
    """Have the trigger-manager look at the units that wait for the plan: it is another now."""
    conn.execute(
        text(
            """
            WITH waiting AS MATERIALIZED (SELECT step_id, unit_id FROM coverage WHERE why = :why
                ORDER BY step_id, unit_id FOR NO KEY UPDATE)
            UPDATE coverage c SET due_at = now() FROM waiting w WHERE (c.step_id, c.unit_id) = (w.step_id, w.unit_id)
            """
        ),
        {"why": Why.INCOMPLETE},
    )


# --- what a unit may expect ---

# What stands for the columns of an observation while it is only planned.
_AS_PLANNED: dict[Any, Column[Any]] = {
    executed_obs_unit.c.started_at: scheduled_observation.c.planned_start,
    executed_obs_unit.c.ended_at: scheduled_observation.c.planned_end,
}
_BY_UNIT, _BY_MODULE = grouping.search(obs_unit), grouping.search(instrument_module)


def _planned(expression: ColumnElement[Any]) -> tuple[ColumnElement[Any], bool] | None:
    """An expression over packages as one over what is planned, and whether it is about modules alone.

    None if it looks at what only data have.
    """
    columns: list[Any] = [x for x in visitors.iterate(expression) if isinstance(x, Column)]
    tables = {c.table.name for c in columns if c not in _AS_PLANNED}
    if not tables <= {*_BY_UNIT, *_BY_MODULE}:
        return None
    about_modules = bool(tables) and all(c.table.name in _BY_MODULE for c in columns)
    return visitors.replacement_traverse(expression, {}, _as_planned), about_modules


def _as_planned(element: Any, **_: Any) -> Any:
    return _AS_PLANNED.get(element) if isinstance(element, Column) else None


def dimension_faults(dims: Sequence[str]) -> list[str]:
    """Dimensions of which the plan says nothing; they are checked with `grouping.validate_group_by`."""
    known = {d: _planned(found.value) for d in dims if isinstance(found := grouping.dimension(d), grouping.Dimension)}
    return [f"the observing plan says nothing of {d}" for d, expression in known.items() if expression is None]


_MODULE = func.jsonb_array_elements_text(scheduled_observation.c.modules).table_valued("value").alias("w")
_ANY_MODULE = _MODULE.c.value.is_(None)


def _joined() -> Any:
    """What is planned, once for each module, joined with all that the plan knows of it."""
    joins: Any = scheduled_observation.join(obs_unit, scheduled_observation.c.obs_unit_id == obs_unit.c.id)
    for name, way in _BY_UNIT.items():
        if way:
            joins = joins.outerjoin(grouping.TABLES[name], way[-1] == grouping.TABLES[name].c.id)
    joins = joins.outerjoin(_MODULE, literal(True))
    joins = joins.outerjoin(instrument_module, instrument_module.c.name == _MODULE.c.value)
    for name, way in _BY_MODULE.items():
        if way:
            joins = joins.outerjoin(grouping.TABLES[name], way[-1] == grouping.TABLES[name].c.id)
    return joins


def of_night(conn: Connection, night: date) -> list[int]:
    """The scheduled observations that are planned to begin in a night, by the clocks of its modules' site."""
    start = scheduled_observation.c.planned_start
    around = timedelta(days=3)
    tells = grouping.at_time(grouping.DIMENSIONS["night"].value, start) == night.isoformat()
    where = (tells, start >= night - around, start < night + around)
    return list(conn.scalars(select(scheduled_observation.c.id).select_from(_joined()).where(*where).distinct()))


def expected(
    tx: Tx, rules: Sequence[Any], dims: Sequence[str], units: Mapping[int, Mapping[str, Any]], hours: float
) -> dict[int, ObservingPlan]:
    """What the plan says of some units of the same dimensions.

    A scheduled observation falls into a unit if its values are the unit's, and if no rule excludes it; rules that look
    at what only data have exclude nothing. What a plan without modules says of modules is: any.

    Args:
        rules: of the data grouping. dims: checked with `dimension_faults`.
        units: by id, the values. hours: after the last planned end, until nothing is waited for any more.
    """
    where = []
    for rule in grouping.rules_from(rules):
        found = _planned(grouping.condition(rule))
        if found is not None:
            where.append(or_(_ANY_MODULE, found[0]) if found[1] else found[0])
    columns = {}
    by_module = set()
    for d in sorted(dims):
        dimension = grouping.dimension(d)
        assert isinstance(dimension, grouping.Dimension)
        found = _planned(dimension.value)
        assert found is not None
        columns[d] = found[0]
        if found[1]:
            by_module.add(d)
    for d, column in columns.items():
        given = sorted({v[d] for v in units.values() if v[d] is not None})
        in_units = column == any_(literal(given, ARRAY(Text)))
        if any(v[d] is None for v in units.values()):
            in_units = or_(column.is_(None), in_units)
        where.append(or_(_ANY_MODULE, in_units) if d in by_module else in_units)
    o = scheduled_observation.c
    rows = tx.conn.execute(
        select(o.id, o.name, o.planned_end, case((_ANY_MODULE, ""), else_=_MODULE.c.value).label("module"))
        .add_columns(*(c.label(f"d{n}") for n, c in enumerate(columns.values())))
        .select_from(_joined())
        .where(o.state == "planned", *where)
    ).all()
    missing, now = _missing(tx, sorted({r.id for r in rows}))
    plans = {}
    for unit, values in units.items():
        mine: dict[str, list[Any]] = defaultdict(list)
        for r in rows:
            if all(r[4 + n] == values[d] or (d in by_module and r.module == "") for n, d in enumerate(columns)):
                mine[r.name].append(r)
        late = sorted(name for name, some in mine.items() if any(r.module in missing.get(r.id, ()) for r in some))
        if mine:
            deadline = max(r.planned_end for some in mine.values() for r in some) + timedelta(hours=hours)
            shown = f"{deadline.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
            plans[unit] = ObservingPlan(len(mine), tuple(late), (deadline - now).total_seconds(), shown)
    return plans


def _missing(tx: Tx, ids: Sequence[int]) -> tuple[dict[int, list[str]], datetime]:
    """By scheduled observation, the modules of which nothing has come; and the time."""
    rows = tx.all(
        f"""
        SELECT o.id, z.missing FROM scheduled_observation o CROSS JOIN LATERAL ({MISSING}) z
        WHERE o.id = ANY(:ids) AND o.arrived_at IS NULL
        """,
        ids=list(ids),
    )
    (clock,) = tx.all("SELECT now() AS now")
    return {r.id: r.missing for r in rows}, clock.now


# --- absence ---


ABSENT = f"""
SELECT m.id AS instrument_module_id, CAST(NULL AS bigint) AS scheduled_observation_id, m.name, n.at AS since,
    'no data from module ' || m.name || ' for more than ' || m.expect_every_hours || ' h' AS reason
FROM instrument_module m CROSS JOIN LATERAL (SELECT k.registered_at AS at FROM raw_data_package k
    WHERE k.instrument_module_id = m.id ORDER BY k.registered_at DESC LIMIT 1) n
WHERE n.at < now() - m.expect_every_hours * interval '1 h'
UNION ALL
SELECT NULL, o.id, o.name, o.planned_end, 'scheduled observation ' || o.name || ' was not carried out within '
    || o.late_after_hours || ' h after its planned end'
FROM scheduled_observation o CROSS JOIN LATERAL ({MISSING}) z
WHERE o.state = 'planned' AND o.arrived_at IS NULL AND z.missing <> '{{}}'
    AND o.planned_end < now() - o.late_after_hours * interval '1 h'
"""
"""Everything that is absent now, by the clock of the database.

A module counts from its first package on: what never sent anything is told by the observing plan.
"""


def notice(tx: Tx, location_id: int, actor: Actor) -> None:
    """Tell what is absent, and what is not any more: each once, whoever looks, and however often."""
    tx.run(
        f"""
        UPDATE scheduled_observation p SET arrived_at = now() FROM scheduled_observation o
        CROSS JOIN LATERAL ({MISSING}) z
        WHERE o.id = p.id AND o.state = 'planned' AND o.arrived_at IS NULL AND o.planned_end < now()
            AND z.missing = '{{}}'
        """
    )
    ended = tx.all(
        f"""
        WITH absent AS MATERIALIZED ({ABSENT})
        UPDATE absence a SET ended_at = now()
        FROM absence b LEFT JOIN instrument_module m ON m.id = b.instrument_module_id
            LEFT JOIN scheduled_observation o ON o.id = b.scheduled_observation_id
        WHERE b.id = a.id AND a.location_id = :loc AND a.ended_at IS NULL AND NOT EXISTS (SELECT 1 FROM absent n
            WHERE (n.instrument_module_id, n.scheduled_observation_id)
                IS NOT DISTINCT FROM (a.instrument_module_id, a.scheduled_observation_id))
        RETURNING a.instrument_module_id, a.scheduled_observation_id, coalesce(m.name, o.name) AS name, a.since,
            a.reason
        """,
        loc=location_id,
    )
    begun = tx.all(
        f"""
        WITH absent AS MATERIALIZED ({ABSENT}),
        told AS (INSERT INTO absence
            (location_id, instrument_module_id, scheduled_observation_id, since, reason)
            SELECT :loc, instrument_module_id, scheduled_observation_id, since, reason FROM absent
            ORDER BY instrument_module_id, scheduled_observation_id ON CONFLICT DO NOTHING
            RETURNING instrument_module_id, scheduled_observation_id)
        SELECT n.* FROM told t JOIN absent n ON (n.instrument_module_id, n.scheduled_observation_id)
            IS NOT DISTINCT FROM (t.instrument_module_id, t.scheduled_observation_id)
        """,
        loc=location_id,
    )
    for kind, rows, how in ((DataBack, ended, "no longer: "), (DataAbsent, begun, "")):
        for r in rows:
            module, observation = (r.name, "") if r.instrument_module_id else ("", r.name)
            event = kind(module=module, scheduled_observation=observation, since=r.since.isoformat())
            tx.emit(location_id, event, "", Actor(actor.name, how + r.reason))
