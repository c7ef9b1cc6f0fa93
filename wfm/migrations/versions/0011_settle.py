"""steps may wait until what they read is quiet"""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    seconds = sa.Column("settle_seconds", sa.Double(), server_default=sa.text("0"), nullable=False)
    op.add_column("reduction_step", seconds)
    op.add_column("reduction_step", sa.Column("settle_at_most_seconds", sa.Double(), nullable=True))
    op.create_check_constraint(
        op.f("ck_reduction_step_settle"),
        "reduction_step",
        "settle_seconds >= 0 AND settle_at_most_seconds >= settle_seconds",
    )
    for name in ("wanted_since", "settling_since"):
        op.add_column("coverage", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
