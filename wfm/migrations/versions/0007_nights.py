"""the night of an observation follows from the time zone of its instrument's site"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("site", sa.Column("time_zone", sa.Text(), server_default=sa.text("'UTC'"), nullable=False))
    op.add_column("instrument", sa.Column("site_id", sa.BigInteger(), nullable=True))
    op.create_foreign_key(op.f("fk_instrument_site_id"), "instrument", "site", ["site_id"], ["id"])
