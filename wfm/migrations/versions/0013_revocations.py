"""packages, versions, config revisions and products are revoked by somebody, for a reason"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("raw_data_package", "software_version", "config_revision", "data_product"):
        for column in ("revoked_by", "revoked_reason"):
            op.add_column(table, sa.Column(column, sa.Text(), server_default=sa.text("''"), nullable=False))
    op.create_index(
        "ix_data_product_revoked",
        "data_product",
        ["run_id"],
        unique=False,
        postgresql_where=sa.text("revoked_by <> ''"),
    )
