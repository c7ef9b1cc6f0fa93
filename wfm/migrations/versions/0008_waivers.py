"""what need not be covered for the certificate of a night"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_executed_obs_unit_started_at", "executed_obs_unit", ["started_at"])
    op.create_index("ix_raw_data_package_registered_at", "raw_data_package", ["registered_at"])
    op.create_table(
        "waiver",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("package_id", sa.BigInteger(), nullable=True),
        sa.Column("step_id", sa.BigInteger(), nullable=True),
        sa.Column("unit_id", sa.BigInteger(), nullable=True),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("ended_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.CheckConstraint(
            "(package_id IS NULL) = (step_id IS NOT NULL) AND (step_id IS NULL) = (unit_id IS NULL)",
            name=op.f("ck_waiver_one_thing"),
        ),
        sa.ForeignKeyConstraint(["package_id"], ["raw_data_package.id"], name=op.f("fk_waiver_package_id")),
        sa.ForeignKeyConstraint(["step_id"], ["reduction_step.id"], name=op.f("fk_waiver_step_id")),
        sa.ForeignKeyConstraint(["unit_id"], ["unit.id"], name=op.f("fk_waiver_unit_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_waiver")),
    )
    where = sa.text("ended_at IS NULL")
    op.create_index("uq_waiver_package", "waiver", ["package_id"], unique=True, postgresql_where=where)
    op.create_index("uq_waiver_unit", "waiver", ["step_id", "unit_id"], unique=True, postgresql_where=where)
