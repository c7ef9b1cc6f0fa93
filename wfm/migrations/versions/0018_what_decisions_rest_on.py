"""each row of coverage keeps a fingerprint of what its decision rested on; what is open, and what failed, has an index"""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("coverage", sa.Column("basis", sa.BigInteger(), nullable=True))
    op.add_column("coverage", sa.Column("gates", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_coverage_open",
        "coverage",
        ["step_id", "state", "unit_id"],
        unique=False,
        postgresql_where=sa.text("state NOT IN ('covered', 'empty')"),
    )
    op.create_index(
        "ix_run_failed",
        "run",
        ["step_id", "unit_id", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('FAILED', 'CANCELLED')"),
    )
    op.drop_index("uq_run_active", table_name="run")
    op.create_index(
        "uq_run_active",
        "run",
        ["step_id", "unit_id"],
        unique=True,
        postgresql_where=sa.text("finished_at IS NULL"),
    )
