"""what a step wants since when, and who approved what that made stale; a priority for such runs"""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pipeline", sa.Column("stale_priority", sa.Integer(), nullable=True))
    op.add_column("reduction_step", sa.Column("on_stale", sa.Text(), server_default=sa.text("'run'"), nullable=False))
    op.create_check_constraint(op.f("ck_reduction_step_on_stale"), "reduction_step", "on_stale IN ('run', 'hold')")
    op.add_column("reduction_step", sa.Column("approval_units", sa.BigInteger(), nullable=True))
    op.add_column("reduction_step", sa.Column("approval_core_hours", sa.Double(), nullable=True))
    op.create_table(
        "step_wish",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=False),
        sa.Column("software_version_id", sa.BigInteger(), nullable=False),
        sa.Column("config_revision_id", sa.BigInteger(), nullable=True),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("core_hours", sa.Double(), nullable=True),
        sa.Column("approved_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("approved_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("approved_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["step_id"], ["reduction_step.id"], name=op.f("fk_step_wish_step_id")),
        sa.ForeignKeyConstraint(
            ["software_version_id"], ["software_version.id"], name=op.f("fk_step_wish_software_version_id")
        ),
        sa.ForeignKeyConstraint(
            ["config_revision_id"], ["config_revision.id"], name=op.f("fk_step_wish_config_revision_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_step_wish")),
    )
    op.create_index("ix_step_wish_step_id", "step_wish", ["step_id", "id"], unique=False)
    op.add_column(
        "coverage",
        sa.Column(
            "counts",
            sa.Boolean(),
            sa.Computed("state = 'covered' OR why = 'held_for_approval'", persisted=True),
            nullable=False,
        ),
    )
    # What lies in a coarse unit counts where its result may be read, not only where it is covered.
    connection = op.get_bind()
    for name in ("coverage_insert", "coverage_update", "coverage_delete", "unit_edge_insert", "unit_edge_delete"):
        (definition,) = connection.exec_driver_sql(
            "SELECT pg_get_functiondef(oid) FROM pg_proc"
            f" WHERE proname = 'tally_{name}' AND pronamespace = current_schema()::regnamespace"
        ).one()
        counted = definition.replace("c.state IN ('covered', 'blocked')", "(c.counts OR c.state = 'blocked')")
        connection.exec_driver_sql(counted.replace("c.state = 'covered'", "c.counts"))
