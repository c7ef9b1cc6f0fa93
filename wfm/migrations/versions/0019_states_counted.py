"""units and the states of their coverage are counted as they change, not when somebody asks"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

FUNCTION = """
CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT SET enable_hashjoin TO off SET enable_mergejoin TO off
AS $$
BEGIN
{body}
    RETURN NULL;
END
$$
"""

COVERAGE = """
    INSERT INTO coverage_tally (pipeline_id, dims, step_id, state, why, units)
    SELECT u.pipeline_id, u.dims, c.step_id, c.state, c.why, sum(c.n)
    FROM ({changes}) c JOIN unit u ON u.id = c.unit_id
    GROUP BY u.pipeline_id, u.dims, c.step_id, c.state, c.why HAVING sum(c.n) <> 0;
"""
UNIT = """
    INSERT INTO coverage_tally (pipeline_id, dims, units)
    SELECT pipeline_id, dims, count(*) FROM come GROUP BY pipeline_id, dims;
"""

GONE = "SELECT *, -1 AS n FROM gone"
COME = "SELECT *, 1 AS n FROM come"

TRIGGERS = {
    ("coverage", "INSERT"): (COVERAGE.format(changes=COME), "NEW TABLE AS come"),
    ("coverage", "UPDATE"): (
        COVERAGE.format(changes=f"{GONE} UNION ALL {COME}"),
        "OLD TABLE AS gone NEW TABLE AS come",
    ),
    ("coverage", "DELETE"): (COVERAGE.format(changes=GONE), "OLD TABLE AS gone"),
    ("unit", "INSERT"): (UNIT, "NEW TABLE AS come"),
}


def upgrade() -> None:
    op.create_table(
        "coverage_tally",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("pipeline_id", sa.BigInteger(), nullable=False),
        sa.Column("dims", sa.Text(), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.Text(), nullable=True),
        sa.Column("why", sa.Text(), nullable=True),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_coverage_tally")),
    )
    op.create_index("ix_coverage_tally_pipeline_id", "coverage_tally", ["pipeline_id", "dims"])
    op.execute(
        """
        INSERT INTO coverage_tally (pipeline_id, dims, step_id, state, why, units)
        SELECT pipeline_id, dims, NULL, NULL, NULL, count(*) FROM unit GROUP BY pipeline_id, dims
        UNION ALL
        SELECT u.pipeline_id, u.dims, c.step_id, c.state, c.why, count(*)
        FROM coverage c JOIN unit u ON u.id = c.unit_id GROUP BY 1, 2, 3, 4, 5
        """
    )
    for (table, event), (body, seen) in TRIGGERS.items():
        name = f"count_{table}_{event.lower()}"
        op.execute(FUNCTION.format(name=name, body=body))
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON {table} REFERENCING {seen} FOR EACH STATEMENT"
            f" EXECUTE FUNCTION {name}()"
        )
