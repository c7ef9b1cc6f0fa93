"""The database's schema over time (alembic). Every table, and alembic's own version table, lives in our one schema."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from wfm.schema import metadata


def _config(schema: str, connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes |= {"schema": schema, "connection": connection}
    return config


def head() -> str:
    """The newest revision that this installation knows."""
    return str(ScriptDirectory.from_config(_config("wfm")).get_current_head())


def current(engine: Engine, schema: str) -> str | None:
    """The revision of a database; None when it has none of our tables."""
    with engine.connect() as connection:
        options = {"version_table_schema": schema}
        return MigrationContext.configure(connection, opts=options).get_current_revision()


def upgrade(engine: Engine, schema: str) -> str:
    """Bring a database to the newest revision; safe to call at any time, and from several processes at once."""
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('wfm upgrade ' || :s))"), {"s": schema})
        connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
        command.upgrade(_config(schema, connection), "head")
    return head()


def differences(engine: Engine, schema: str) -> list[str]:
    """Where a database's tables are not what this version declares."""

    def ours(name: str | None, kind: str, _parents: object) -> bool:
        return (kind, name) != ("table", "alembic_version")

    with engine.connect() as connection:
        options = {"version_table_schema": schema, "include_name": ours, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        return [str(d) for d in compare_metadata(context, metadata)]
