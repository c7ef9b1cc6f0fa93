"""pending events are looked up by their type, pending runs by step and priority"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NAME = "ix_event_pending"


def upgrade() -> None:
    op.drop_index(op.f(NAME), table_name="event")
    op.create_index(
        NAME,
        "event",
        ["location_id", "type", "publish_at"],
        unique=False,
        postgresql_where=sa.text("done_at IS NULL"),
    )
    op.create_index(
        "ix_run_pending",
        "run",
        ["location_id", "step_id", sa.literal_column("priority DESC"), "id"],
        unique=False,
        postgresql_where=sa.text("state = 'PENDING'"),
    )
