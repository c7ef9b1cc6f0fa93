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
                " VALUES (5, 1, 1, 1, 1, 1, 'w', 1, 1, 1, 1, 'COMPLETED', 1, 3, now())"
            )
        )
        conn.execute(text("INSERT INTO run_input (run_id, upstream_run_id) VALUES (6, 5)"))
    migrations.upgrade(engine, "wfm")
    with engine.begin() as conn:
        assert conn.execute(text("SELECT upstream_attempt FROM run_input")).scalar_one() == 3
    assert migrations.differences(engine, "wfm") == []
    engine.dispose()
