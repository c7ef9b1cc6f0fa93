"""probes, and what is in quarantine"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "reduction_step",
        sa.Column("quarantine_at_most", sa.Integer(), server_default=sa.text("0"), nullable=False),
    )
    op.create_check_constraint(
        op.f("ck_reduction_step_quarantine_at_most"), "reduction_step", "quarantine_at_most >= 0"
    )
    op.add_column("coverage", sa.Column("quarantined", postgresql.ARRAY(sa.BigInteger()), nullable=True))
    op.add_column("run", sa.Column("subset", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("run", sa.Column("probe_of", sa.BigInteger(), nullable=True))
    op.add_column("run", sa.Column("probe", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.create_foreign_key(op.f("fk_run_probe_of"), "run", "run", ["probe_of"], ["id"])
    op.create_check_constraint(op.f("ck_run_probe"), "run", "(probe_of IS NULL) = (probe IS NULL)")
    op.create_index("ix_run_probe_of", "run", ["probe_of"], postgresql_where=sa.text("probe_of IS NOT NULL"))
    op.create_table(
        "quarantine",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=False),
        sa.Column("unit_id", sa.BigInteger(), nullable=False),
        sa.Column("package_id", sa.BigInteger(), nullable=True),
        sa.Column("member_id", sa.BigInteger(), nullable=True),
        sa.Column("content", sa.Numeric(39, 0), server_default=sa.text("0"), nullable=False),
        sa.Column("software_version_id", sa.BigInteger(), nullable=False),
        sa.Column("config", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("run_id", sa.BigInteger(), nullable=False),
        sa.Column("run_version", sa.Integer(), nullable=False),
        sa.Column("probe_id", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("released_by", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("released_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.CheckConstraint("num_nonnulls(package_id, member_id) = 1", name=op.f("ck_quarantine_one_thing")),
        sa.ForeignKeyConstraint(["step_id"], ["reduction_step.id"], name=op.f("fk_quarantine_step_id")),
        sa.ForeignKeyConstraint(["unit_id"], ["unit.id"], name=op.f("fk_quarantine_unit_id")),
        sa.ForeignKeyConstraint(["package_id"], ["raw_data_package.id"], name=op.f("fk_quarantine_package_id")),
        sa.ForeignKeyConstraint(["member_id"], ["unit.id"], name=op.f("fk_quarantine_member_id")),
        sa.ForeignKeyConstraint(
            ["software_version_id"], ["software_version.id"], name=op.f("fk_quarantine_software_version_id")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_quarantine_run_id")),
        sa.ForeignKeyConstraint(["probe_id"], ["run.id"], name=op.f("fk_quarantine_probe_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantine")),
    )
    op.create_index(op.f("ix_quarantine_run_id"), "quarantine", ["run_id"])
    op.create_index(
        "ix_quarantine_unreleased",
        "quarantine",
        ["step_id", "unit_id"],
        postgresql_where=sa.text("released_at IS NULL"),
    )
    for member in ("package", "member"):
        op.create_index(
            f"uq_quarantine_{member}",
            "quarantine",
            ["step_id", "unit_id", f"{member}_id", "content", "software_version_id", "config"],
            unique=True,
            postgresql_where=sa.text(f"released_at IS NULL AND {member}_id IS NOT NULL"),
        )
