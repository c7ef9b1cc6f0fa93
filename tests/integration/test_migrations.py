"""The migrations and the declared tables are the same thing, and live in one schema."""

from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import text

from wfm import migrations
from wfm.model import RunState
from wfm.store import connect


@pytest.fixture
def empty(servers):
    with servers.database() as url:
        yield url


@pytest.mark.parametrize("schema", ["wfm", "obs_wfm"])
def test_upgrading_an_empty_database_gives_the_declared_tables_in_one_schema(empty, schema):
    engine = connect(empty, schema)
    assert migrations.current(engine, schema) is None
    migrations.upgrade(engine, schema)
    assert migrations.upgrade(engine, schema) == migrations.head() == migrations.current(engine, schema)
    assert migrations.differences(engine, schema) == []
    with engine.begin() as conn:
        elsewhere = conn.execute(
            text(
                "SELECT table_schema, table_name FROM information_schema.tables"
                " WHERE table_schema NOT IN (:s, 'pg_catalog', 'information_schema')"
            ),
            {"s": schema},
        ).all()
        assert elsewhere == []
        conn.execute(text("ALTER TABLE run DROP COLUMN message"))
    assert any("message" in d for d in migrations.differences(engine, schema))
    engine.dispose()


def test_the_states_of_the_database_are_those_of_the_chart(database):
    engine = connect(database, "wfm")
    with engine.connect() as conn:
        check = conn.execute(
            text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'ck_run_state'")
        ).scalar_one()
    engine.dispose()
    assert {s for s in RunState if f"'{s}'" in check} == set(RunState)


def test_what_runs_read_is_known_by_attempt_after_the_second_migration(empty):
    engine = connect(empty, "wfm")
    with engine.begin() as conn:
        conn.execute(text("CREATE SCHEMA wfm"))
        command.upgrade(migrations._config("wfm", conn), "0001")
        conn.execute(text("SET LOCAL session_replication_role = replica"))  # no foreign keys
        conn.execute(
            text(
                "INSERT INTO run (id, location_id, pipeline_id, step_id, unit_id, generation, wanted, result,"
                " software_version_id, cpu, memory_gb, state, chart_version, attempt, finished_at)"
                " VALUES (5, 1, 1, 1, 1, 1, 'w', 1, 1, 1, 1, 'COMPLETED', 1, 3, now()),"
                " (6, 1, 1, 1, 2, 1, 'w', 1, 1, 1, 1, 'COMPLETED', 1, 1, now())"
            )
        )
        conn.execute(text("INSERT INTO run_input (run_id, upstream_run_id) VALUES (6, 5)"))
    migrations.upgrade(engine, "wfm")
    with engine.begin() as conn:
        assert conn.execute(text("SELECT upstream_attempt FROM run_input")).scalar_one() == 3
    assert migrations.differences(engine, "wfm") == []
    engine.dispose()


def test_what_lies_in_coarse_units_is_counted_by_the_fifth_migration(empty):
    engine = connect(empty, "wfm")
    with engine.begin() as conn:
        conn.execute(text("CREATE SCHEMA wfm"))
        command.upgrade(migrations._config("wfm", conn), "0005")
        conn.execute(text("SET LOCAL session_replication_role = replica"))  # no foreign keys
        conn.execute(
            text(
                """
                INSERT INTO unit (id, pipeline_id, dims, key, members)
                VALUES (1, 1, '[]', 'all', 3), (2, 1, 'fine', 'a', 1), (3, 1, 'fine', 'b', 1), (4, 1, 'fine', 'c', 1),
                    (5, 1, 'fine', 'lost', 0);
                INSERT INTO unit_edge (upper_id, lower_id) SELECT 1, id FROM unit WHERE dims = 'fine';
                INSERT INTO coverage (step_id, unit_id, state, why, run_id, result)
                VALUES (8, 2, 'covered', 'covered', 1, 2::numeric ^ 127),
                    (8, 3, 'covered', 'covered', 2, 2::numeric ^ 127 + 5),
                    (9, 2, 'blocked', 'failed', 1, 7)
                """
            )
        )
    migrations.upgrade(engine, "wfm")
    with engine.begin() as conn:
        rows = conn.execute(
            text("SELECT upper_id, dims, step_id, units, covered, blocked, digest::text FROM upstream_tally ORDER BY 3")
        ).all()
        assert sorted(tuple(r) for r in rows[:2]) == [(1, "fine", 8, 0, 2, 0, "5"), (1, "fine", 9, 0, 0, 1, "0")]
        assert tuple(rows[2]) == (1, "fine", None, 3, 0, 0, "0")
    engine.dispose()


def test_what_was_made_before_keeps_its_names_after_the_twenty_first_migration(empty):
    engine = connect(empty, "wfm")
    with engine.begin() as conn:
        conn.execute(text("CREATE SCHEMA wfm"))
        command.upgrade(migrations._config("wfm", conn), "0020")
        conn.execute(text("SET LOCAL session_replication_role = replica"))  # no foreign keys
        conn.execute(
            text(
                """
                INSERT INTO pipeline (id, name, grouping_id, location_id) VALUES (1, 'maps', 1, 1);
                INSERT INTO reduction_step (id, pipeline_id, name, position, dims, software_id, final)
                VALUES (1, 1, 'scan', 0, '[]', 1, false), (2, 1, 'map', 1, '[]', 1, true);
                INSERT INTO run (id, location_id, pipeline_id, step_id, unit_id, generation, wanted, result,
                    software_version_id, cpu, memory_gb, state, chart_version, finished_at)
                VALUES (5, 1, 1, 1, 1, 1, 'w', 1, 1, 1, 1, 'COMPLETED', 1, now()),
                    (6, 1, 1, 2, 1, 1, 'w', 1, 1, 1, 1, 'COMPLETED', 1, now());
                INSERT INTO run_input (run_id, upstream_run_id) VALUES (6, 5)
                """
            )
        )
    with engine.begin() as conn:
        conn.execute(text("SET LOCAL session_replication_role = replica"))
        command.upgrade(migrations._config("wfm", conn), "0021")
        assert conn.execute(text("SELECT identity, renamed_from FROM reduction_step ORDER BY id")).all() == [
            ("scan", ""),
            ("map", ""),
        ]
        assert conn.execute(text("SELECT pipeline_name, step_name FROM run ORDER BY id")).all() == [
            ("maps", "scan"),
            ("maps", "map"),
        ]
        assert conn.execute(text("SELECT step_name FROM run_input")).scalar_one() == "scan"
    migrations.upgrade(engine, "wfm")
    assert migrations.differences(engine, "wfm") == []
    engine.dispose()
