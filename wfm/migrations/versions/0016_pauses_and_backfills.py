"""units can be paused; backfills"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def text(name: str, default: str | None = "") -> sa.Column[str]:
    given = None if default is None else sa.text(f"'{default}'")
    return sa.Column(name, sa.Text(), server_default=given, nullable=False)


def time(name: str, *, now: bool = False) -> sa.Column[object]:
    return sa.Column(
        name, sa.DateTime(timezone=True), server_default=sa.text("now()") if now else None, nullable=not now
    )


def ref(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{target}.id"], name=op.f(f"fk_{table}_{column}_{target}"))


def upgrade() -> None:
    op.create_table(
        "backfill",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("location_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pipeline_id", sa.BigInteger(), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=True),
        text("kind", None),
        sa.Column("selection", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("max_in_flight", sa.Integer(), nullable=True),
        text("state", "running"),
        text("actor", None),
        text("reason"),
        text("paused_by"),
        text("paused_reason"),
        time("created_at", now=True),
        time("finished_at"),
        sa.CheckConstraint("kind IN ('missing', 'failed', 'stale', 'all')", name=op.f("ck_backfill_kind")),
        sa.CheckConstraint("state IN ('running', 'paused', 'cancelled', 'done')", name=op.f("ck_backfill_state")),
        sa.CheckConstraint("max_in_flight >= 1", name=op.f("ck_backfill_share")),
        sa.CheckConstraint("(state = 'paused') = (paused_by <> '')", name=op.f("ck_backfill_paused")),
        sa.CheckConstraint(
            "(state IN ('done', 'cancelled')) = (finished_at IS NOT NULL)", name=op.f("ck_backfill_finished_at")
        ),
        ref("backfill", "location_id", "data_location"),
        ref("backfill", "pipeline_id", "pipeline"),
        ref("backfill", "step_id", "reduction_step"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_backfill")),
        sa.UniqueConstraint("name", name=op.f("uq_backfill_name")),
    )
    op.create_table(
        "backfill_unit",
        sa.Column("backfill_id", sa.BigInteger(), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=False),
        sa.Column("unit_id", sa.BigInteger(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        text("state", "waiting"),
        text("note"),
        sa.CheckConstraint(
            "state IN ('waiting', 'begun', 'done', 'failed', 'skipped')", name=op.f("ck_backfill_unit_state")
        ),
        ref("backfill_unit", "backfill_id", "backfill"),
        ref("backfill_unit", "step_id", "reduction_step"),
        ref("backfill_unit", "unit_id", "unit"),
        sa.PrimaryKeyConstraint("backfill_id", "step_id", "unit_id", name=op.f("pk_backfill_unit")),
    )
    op.create_index(
        "ix_backfill_unit_open",
        "backfill_unit",
        ["backfill_id", "state", "place"],
        unique=False,
        postgresql_where=sa.text("state IN ('waiting', 'begun')"),
    )
    for table in ("coverage", "run"):
        op.add_column(table, sa.Column("backfill_id", sa.BigInteger(), nullable=True))
        op.create_foreign_key(op.f(f"fk_{table}_backfill_id_backfill"), table, "backfill", ["backfill_id"], ["id"])
    op.add_column("coverage", text("paused_by"))
    op.add_column("coverage", text("paused_reason"))
    op.create_index(
        "ix_coverage_paused",
        "coverage",
        ["step_id", "unit_id"],
        unique=False,
        postgresql_where=sa.text("paused_by <> ''"),
    )
