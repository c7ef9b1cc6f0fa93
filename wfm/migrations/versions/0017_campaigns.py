"""frozen data sets"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pipeline", sa.Column("frozen_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("reduction_step", sa.Column("config_revision_id", sa.BigInteger(), nullable=True))
    op.create_foreign_key(
        op.f("fk_reduction_step_config_revision_id"),
        "reduction_step",
        "config_revision",
        ["config_revision_id"],
        ["id"],
    )
    op.create_table(
        "campaign",
        sa.Column("pipeline_id", sa.BigInteger(), nullable=False),
        sa.Column("template_id", sa.BigInteger(), nullable=False),
        sa.Column("packages", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["pipeline_id"], ["pipeline.id"], name=op.f("fk_campaign_pipeline_id")),
        sa.ForeignKeyConstraint(["template_id"], ["pipeline.id"], name=op.f("fk_campaign_template_id")),
        sa.PrimaryKeyConstraint("pipeline_id", name=op.f("pk_campaign")),
    )
