"""what the observing plan expects, and what is absent"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("instrument_module", sa.Column("expect_every_hours", sa.Double(), nullable=True))
    op.create_check_constraint("expect_every_hours", "instrument_module", "expect_every_hours > 0")
    op.add_column("executed_obs_unit", sa.Column("scheduled", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.create_index(
        "ix_executed_obs_unit_scheduled",
        "executed_obs_unit",
        ["scheduled"],
        postgresql_where=sa.text("scheduled <> ''"),
    )
    op.create_index("ix_raw_data_package_newest", "raw_data_package", ["instrument_module_id", "registered_at"])
    op.create_table(
        "scheduled_observation",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("obs_unit_id", sa.BigInteger(), nullable=False),
        sa.Column("planned_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("planned_end", sa.DateTime(timezone=True), nullable=False),
        sa.Column("modules", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("late_after_hours", sa.Double(), server_default=sa.text("12"), nullable=False),
        sa.Column("state", sa.Text(), server_default=sa.text("'planned'"), nullable=False),
        sa.Column("lost_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("lost_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("arrived_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("state IN ('planned', 'lost')", name=op.f("ck_scheduled_observation_state")),
        sa.CheckConstraint(
            "planned_end > planned_start AND late_after_hours >= 0", name=op.f("ck_scheduled_observation_times")
        ),
        sa.ForeignKeyConstraint(["obs_unit_id"], ["obs_unit.id"], name=op.f("fk_scheduled_observation_obs_unit_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_scheduled_observation")),
        sa.UniqueConstraint("name", name=op.f("uq_scheduled_observation_name")),
    )
    op.create_index(op.f("ix_scheduled_observation_obs_unit_id"), "scheduled_observation", ["obs_unit_id"])
    op.create_index(op.f("ix_scheduled_observation_planned_start"), "scheduled_observation", ["planned_start"])
    op.create_index(
        "ix_scheduled_observation_expected",
        "scheduled_observation",
        ["planned_end"],
        postgresql_where=sa.text("state = 'planned' AND arrived_at IS NULL"),
    )
    op.create_table(
        "absence",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("location_id", sa.BigInteger(), nullable=False),
        sa.Column("instrument_module_id", sa.BigInteger(), nullable=True),
        sa.Column("scheduled_observation_id", sa.BigInteger(), nullable=True),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("noticed_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "num_nonnulls(instrument_module_id, scheduled_observation_id) = 1", name=op.f("ck_absence_one_thing")
        ),
        sa.ForeignKeyConstraint(["location_id"], ["data_location.id"], name=op.f("fk_absence_location_id")),
        sa.ForeignKeyConstraint(
            ["instrument_module_id"], ["instrument_module.id"], name=op.f("fk_absence_instrument_module_id")
        ),
        sa.ForeignKeyConstraint(
            ["scheduled_observation_id"], ["scheduled_observation.id"], name=op.f("fk_absence_scheduled_observation_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_absence")),
    )
    open_ = sa.text("ended_at IS NULL")
    for name, column in (("module", "instrument_module_id"), ("observation", "scheduled_observation_id")):
        op.create_index(f"uq_absence_{name}", "absence", [column, "location_id"], unique=True, postgresql_where=open_)
