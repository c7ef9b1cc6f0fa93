"""history knows of each failed attempt why it failed"""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("transition", sa.Column("failure", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("transition", sa.Column("exit_code", sa.Integer(), nullable=True))
