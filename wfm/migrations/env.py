"""Run by alembic; the connection and the schema come from `wfm.migrations`."""

from alembic import context

from wfm.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table_schema=context.config.attributes["schema"],
    include_name=lambda name, kind, _parents: (kind, name) != ("table", "alembic_version"),
)
with context.begin_transaction():
    context.run_migrations()
