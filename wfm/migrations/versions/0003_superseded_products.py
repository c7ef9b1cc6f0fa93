"""the index of superseded products holds no others"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NAME = "ix_data_product_superseded_by"


def upgrade() -> None:
    op.drop_index(op.f(NAME), table_name="data_product")
    op.create_index(
        NAME, "data_product", ["superseded_by"], unique=False, postgresql_where=sa.text("superseded_by IS NOT NULL")
    )
