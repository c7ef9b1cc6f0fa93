"""steps may run with the upstream results that are there"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("reduction_step", sa.Column("fan_in", sa.Text(), server_default=sa.text("'all'"), nullable=False))
    op.create_check_constraint(op.f("ck_reduction_step_fan_in"), "reduction_step", "fan_in IN ('all', 'any')")
    op.add_column("run", sa.Column("upstream", JSONB(), server_default=sa.text("'[]'"), nullable=False))
