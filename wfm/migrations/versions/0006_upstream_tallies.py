"""what lies in a coarse unit is counted as it changes, not when somebody asks"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

MODULUS = "340282366920938463463374607431768211456"

# What one state of a unit's coverage adds to the tally of each unit that it lies in.
COUNTS = f"""
    sum(n * (c.state = 'covered')::int), sum(n * (c.state = 'blocked')::int),
    mod(coalesce(sum(n * c.result) FILTER (WHERE c.state = 'covered'), 0), {MODULUS})
"""

# Planned once for a session, and what changes is little beside the tables: by index, however they looked then.
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

COVERAGE = f"""
    INSERT INTO upstream_tally (upper_id, dims, step_id, covered, blocked, digest)
    SELECT e.upper_id, l.dims, c.step_id, {COUNTS}
    FROM ({{changes}}) c JOIN unit_edge e ON e.lower_id = c.unit_id JOIN unit l ON l.id = c.unit_id
    WHERE c.state IN ('covered', 'blocked')
    GROUP BY e.upper_id, l.dims, c.step_id
    HAVING ({COUNTS}) <> (0, 0, 0);
"""

# Whoever changes the coverage of a lower unit now did not see these edges, and we do not see what he writes: wait for
# him, or have him wait. A first row of coverage cannot be locked; whoever writes it locks its unit.
EDGE = f"""
    PERFORM 1 FROM unit WHERE id IN (SELECT lower_id FROM edges) ORDER BY id FOR UPDATE;
    PERFORM 1 FROM coverage WHERE unit_id IN (SELECT lower_id FROM edges) ORDER BY step_id, unit_id FOR NO KEY UPDATE;
    INSERT INTO upstream_tally (upper_id, dims, units)
    SELECT e.upper_id, l.dims, sum({{sign}}) FROM edges e JOIN unit l ON l.id = e.lower_id GROUP BY e.upper_id, l.dims;
    INSERT INTO upstream_tally (upper_id, dims, step_id, covered, blocked, digest)
    SELECT e.upper_id, l.dims, c.step_id, {COUNTS}
    FROM (SELECT *, {{sign}} AS n FROM edges) e JOIN unit l ON l.id = e.lower_id JOIN coverage c ON c.unit_id = l.id
    WHERE c.state IN ('covered', 'blocked')
    GROUP BY e.upper_id, l.dims, c.step_id;
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
    ("unit_edge", "INSERT"): (EDGE.format(sign="1"), "NEW TABLE AS edges"),
    ("unit_edge", "DELETE"): (EDGE.format(sign="-1"), "OLD TABLE AS edges"),
}


def upgrade() -> None:
    op.create_table(
        "upstream_tally",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("upper_id", sa.BigInteger(), nullable=False),
        sa.Column("dims", sa.Text(), nullable=False),
        sa.Column("step_id", sa.BigInteger(), nullable=True),
        sa.Column("units", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("covered", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("blocked", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("digest", sa.Numeric(39, 0), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upstream_tally")),
    )
    op.create_index("ix_upstream_tally_upper_id", "upstream_tally", ["upper_id", "dims"])
    op.execute("DELETE FROM unit_edge e USING unit l WHERE l.id = e.lower_id AND l.members = 0")
    op.execute(
        """
        INSERT INTO upstream_tally (upper_id, dims, units)
        SELECT e.upper_id, l.dims, count(*) FROM unit_edge e JOIN unit l ON l.id = e.lower_id GROUP BY 1, 2
        """
    )
    op.execute(
        f"""
        INSERT INTO upstream_tally (upper_id, dims, step_id, covered, blocked, digest)
        SELECT e.upper_id, l.dims, c.step_id, {COUNTS}
        FROM unit_edge e JOIN unit l ON l.id = e.lower_id
        JOIN (SELECT *, 1 AS n FROM coverage WHERE state IN ('covered', 'blocked')) c ON c.unit_id = l.id
        GROUP BY e.upper_id, l.dims, c.step_id
        """
    )
    for (table, event), (body, seen) in TRIGGERS.items():
        name = f"tally_{table}_{event.lower()}"
        op.execute(FUNCTION.format(name=name, body=body))
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON {table} REFERENCING {seen} FOR EACH STATEMENT"
            f" EXECUTE FUNCTION {name}()"
        )
