"""fan-in by the observing plan"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_constraint(op.f("ck_reduction_step_fan_in"), "reduction_step", type_="check")
    op.create_check_constraint(
        op.f("ck_reduction_step_fan_in"), "reduction_step", "fan_in IN ('all', 'any', 'complete')"
    )
    op.add_column("reduction_step", sa.Column("fan_in_deadline_hours", sa.Double(), nullable=True))
    op.create_check_constraint(
        op.f("ck_reduction_step_fan_in_deadline_hours"),
        "reduction_step",
        "(fan_in = 'complete') = (fan_in_deadline_hours IS NOT NULL)",
    )
    op.add_column(
        "run",
        sa.Column("missing", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False),
    )
