"""The observing plan against what came: what is still expected, what is late, what is absent.

Nothing here is remembered but what people say (a lost observation) and what was told (an absence). Whether a scheduled
observation was carried out follows from the catalogue: an executed observation carries out the one that it names; or
else the one of the same obs_unit in whose time, from planned start to planned end, it began (of several, the one that
is planned to begin last). It has arrived when each
module that the plan names (or any, where it names none) has a package of it that did not fail.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

from wfm.events import DataAbsent, DataBack
from wfm.model import Actor, Why
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
