"""other attempts of ended runs (products by attempt, and whose products a run read); why dead letters were settled"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run_input", sa.Column("upstream_attempt", sa.Integer(), server_default=sa.text("1"), nullable=False))
    # Until now only a run's last attempt could have products.
    op.execute("UPDATE run_input i SET upstream_attempt = r.attempt FROM run r WHERE r.id = i.upstream_run_id")
    op.drop_constraint(op.f("ck_data_product_not_by_itself"), "data_product", type_="check")
    op.drop_constraint(op.f("uq_data_product_run_id_path"), "data_product", type_="unique")
    op.create_unique_constraint(
        op.f("uq_data_product_run_id_attempt_path"), "data_product", ["run_id", "attempt", "path"]
    )
    op.add_column("dead_letter", sa.Column("actor_reason", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("dead_letter", sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True))
