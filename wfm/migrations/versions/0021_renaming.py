"""what a thing is, whatever it is called; and what it was called when files were made"""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

# Until now nothing was renamed: what a thing is called now is what it was always called.
FILLED = (
    ("reduction_step", ("identity",), "UPDATE reduction_step SET identity = name"),
    (
        "run",
        ("pipeline_name", "step_name"),
        "UPDATE run r SET pipeline_name = p.name, step_name = s.name FROM reduction_step s"
        " JOIN pipeline p ON p.id = s.pipeline_id WHERE s.id = r.step_id",
    ),
    (
        "run_input",
        ("step_name",),
        "UPDATE run_input i SET step_name = r.step_name FROM run r WHERE r.id = i.upstream_run_id",
    ),
)


def upgrade() -> None:
    for table in ("data_grouping", "pipeline", "reduction_step"):
        op.add_column(table, sa.Column("renamed_from", sa.Text(), server_default=sa.text("''"), nullable=False))
    for table, columns, fill in FILLED:
        for column in columns:
            op.add_column(table, sa.Column(column, sa.Text(), server_default=sa.text("''"), nullable=False))
        op.execute(fill)
        for column in columns:
            op.alter_column(table, column, server_default=None)
    op.create_unique_constraint(
        op.f("uq_reduction_step_pipeline_id_identity"), "reduction_step", ["pipeline_id", "identity"]
    )
