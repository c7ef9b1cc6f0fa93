"""shares of the slots: weights and limits of pipelines and steps, and whose turn it is"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pipeline", sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False))
    op.add_column("pipeline", sa.Column("max_in_flight", sa.Integer(), nullable=True))
    op.create_check_constraint(op.f("ck_pipeline_share"), "pipeline", "weight > 0 AND max_in_flight >= 1")
    op.add_column("reduction_step", sa.Column("max_in_flight", sa.Integer(), nullable=True))
    op.create_check_constraint(op.f("ck_reduction_step_share"), "reduction_step", "max_in_flight >= 1")
    op.create_table(
        "slot_turn",
        sa.Column("location_id", sa.BigInteger(), nullable=False),
        sa.Column("queue", sa.Text(), nullable=False),
        sa.Column("served_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["location_id"], ["data_location.id"], name=op.f("fk_slot_turn_location_id_data_location")
        ),
        sa.PrimaryKeyConstraint("location_id", "queue", name=op.f("pk_slot_turn")),
    )
