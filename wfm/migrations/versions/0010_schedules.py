"""pipelines with trigger CRON have a time when they are due; what was asked for says by whom"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "schedule",
        sa.Column("pipeline_id", sa.BigInteger(), nullable=False),
        sa.Column("config", JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("fired_for", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipeline.id"], name=op.f("fk_schedule_pipeline_id")),
        sa.PrimaryKeyConstraint("pipeline_id", name=op.f("pk_schedule")),
    )
    op.add_column("coverage", sa.Column("requested_for", sa.Text(), server_default=sa.text("''"), nullable=False))
