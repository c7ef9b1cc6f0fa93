"""What lies in a coarse unit is counted as it changes: the same as if it were counted now."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from tests.harness import ACTOR, World, wait_until
from wfm import gaps, views
from wfm.gaps import facts
from wfm.schema import UNITS_INSIDE, UPSTREAM_COUNTS
from wfm.store import Tx
from wfm.views import coverage

COUNTED_NOW = f"""
SELECT s.id AS step_id, u.id AS unit_id, us.id AS upstream_id, n.total, n.covered, n.blocked, n.digest,
    (SELECT (count(*), count(*) FILTER (WHERE c.state = 'covered'), count(*) FILTER (WHERE c.state = 'blocked'),
        coalesce(sum(c.result) FILTER (WHERE c.state = 'covered'), 0) % (2::numeric ^ 128))::text
    FROM ({UNITS_INSIDE}) l LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id)) AS truth,
    (n.total, n.covered, n.blocked, n.digest)::text AS tally
FROM reduction_step s JOIN unit u ON u.pipeline_id = s.pipeline_id AND u.dims = s.dims
JOIN step_dependency d ON d.step_id = s.id JOIN reduction_step us ON us.id = d.upstream_id
JOIN LATERAL ({UPSTREAM_COUNTS}) n ON true
"""


def differences(world: World) -> list[Any]:
    norm = "regexp_replace(%s, '\\.0+\\)', ')')"
    return world.query(f"SELECT * FROM ({COUNTED_NOW}) z WHERE {norm % 'truth'} <> {norm % 'tally'}")


def all_ids(tx: Tx) -> list[int]:
    return [r.id for r in tx.all("SELECT id FROM raw_data_package")]


@pytest.fixture
def nested(world: World) -> World:
    world.apply(
        """
        kind: grouping
        name: archived
        rules:
          - {table: raw_data_package, column: state, operator: eq, value: archived}
        """
    )
    steps = [
        {"name": "scan", "group_by": ["executed_obs_unit"]},
        {"name": "flag", "group_by": ["executed_obs_unit"], "depends_on": ["scan"]},
        {"name": "map", "group_by": ["obs_unit"], "depends_on": ["flag", "scan"]},
        {"name": "all", "group_by": [], "depends_on": ["map"]},
    ]
    world.pipeline("nested", steps, grouping="archived")
    return world


@pytest.mark.parametrize("seed", range(6))
def test_after_any_changes_the_tallies_are_what_counting_gives(nested: World, seed: int) -> None:
    rng = random.Random(seed)
    names = [f"p{i}" for i in range(12)]
    nested.register(*(nested.package(n, obs_unit=f"o{i % 3}") for i, n in enumerate(names)))

    def fold(tx: Tx) -> None:
        ids = all_ids(tx)
        gaps.evaluate(tx, gaps.fold(tx, 1, rng.sample(ids, rng.randint(1, len(ids)))), ACTOR)

    def move(tx: Tx) -> None:
        tx.run(
            "UPDATE executed_obs_unit SET obs_unit_id = (SELECT id FROM obs_unit ORDER BY md5(name || :n) LIMIT 1)"
            " WHERE name = :name",
            name=rng.choice(names),
            n=str(rng.random()),
        )

    def lose_or_find(tx: Tx) -> None:
        tx.run(
            "UPDATE raw_data_package SET state = CASE state WHEN 'archived' THEN 'failed' ELSE 'archived' END"
            " WHERE name = ANY(:names)",
            names=rng.sample(names, rng.randint(1, 4)),
        )

    def cover(tx: Tx) -> None:
        """As ends of runs do, and worse."""
        state = rng.choice(["covered", "covered", "blocked", "waiting", "active"])
        tx.run(
            """
            UPDATE coverage c SET state = :state, result = 340282366920938463463374607431768211400 + c.unit_id,
                run_id = (SELECT min(id) FROM run) WHERE md5(c.step_id::text || c.unit_id || :n) < 'a'
            """,
            state=state,
            n=str(rng.random()),
        )

    def forget(tx: Tx) -> None:
        tx.run("DELETE FROM coverage WHERE md5(step_id::text || unit_id || :n) < '2'", n=str(rng.random()))

    def sum_up(tx: Tx) -> None:
        facts.sum_up(tx, [r.id for r in tx.all("SELECT id FROM unit")])

    nested.act(lambda tx: gaps.evaluate(tx, gaps.fold(tx, 1, all_ids(tx)), ACTOR))
    assert differences(nested) == []
    for _ in range(25):
        nested.act(rng.choice([fold, fold, move, lose_or_find, cover, cover, forget, sum_up]))
        assert differences(nested) == []
    assert nested.query("SELECT 1 FROM upstream_tally WHERE covered <> 0")
    nested.act(sum_up)
    assert not nested.query("SELECT 1 FROM upstream_tally GROUP BY upper_id, dims, step_id HAVING count(*) > 1")
    assert differences(nested) == []


@pytest.mark.parametrize("worker_first", [True, False])
def test_a_run_that_ends_while_its_unit_moves_is_counted_where_the_unit_is(nested: World, worker_first: bool) -> None:
    nested.register(*(nested.package(n, obs_unit=o) for n, o in (("p0", "o0"), ("p1", "o1"))))
    nested.act(lambda tx: gaps.evaluate(tx, gaps.fold(tx, 1, all_ids(tx)), ACTOR))
    nested.query(
        "UPDATE executed_obs_unit SET obs_unit_id = (SELECT id FROM obs_unit WHERE name = 'o1') WHERE name = 'p0'"
        " RETURNING 1"
    )

    def end_run(tx: Tx) -> None:
        tx.run(
            "UPDATE coverage c SET state = 'covered', result = 7, run_id = r.id FROM run r JOIN unit u"
            " ON u.id = r.unit_id WHERE (c.step_id, c.unit_id) = (r.step_id, r.unit_id) AND u.key LIKE 'p0%'"
        )

    def fold(tx: Tx) -> None:
        gaps.fold(tx, 1, all_ids(tx))

    first, second = (end_run, fold) if worker_first else (fold, end_run)
    beside = threading.Thread(target=lambda: nested.act(second))
    with nested.store.begin() as tx:
        first(tx)
        beside.start()
        wait_until(
            lambda: (
                not beside.is_alive()
                or nested.query(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
            )
        )
    beside.join()
    assert differences(nested) == []
    assert [r.covered for r in nested.query(f"SELECT * FROM ({COUNTED_NOW}) z WHERE total = 2 AND covered = 1")]


def test_a_first_row_of_coverage_is_counted_where_its_unit_moves_to(nested: World) -> None:
    nested.register(*(nested.package(n, obs_unit=o) for n, o in (("p0", "o0"), ("p1", "o1"))))
    nested.act(lambda tx: gaps.fold(tx, 1, all_ids(tx)))
    nested.query(
        "UPDATE executed_obs_unit SET obs_unit_id = (SELECT id FROM obs_unit WHERE name = 'o1') WHERE name = 'p0'"
        " RETURNING 1"
    )
    nested.query("UPDATE software_version SET state = 'revoked' RETURNING 1")
    scans = nested.query(
        "SELECT s.id AS step, u.id AS unit FROM reduction_step s JOIN unit u USING (dims) WHERE s.name = 'scan'"
    )
    beside = threading.Thread(target=lambda: nested.act(lambda tx: gaps.fold(tx, 1, all_ids(tx))))
    with nested.store.begin() as tx:
        gaps.evaluate(tx, {(r.step, r.unit) for r in scans}, ACTOR)  # blocked: there is no usable version
        beside.start()
        wait_until(
            lambda: (
                not beside.is_alive()
                or nested.query(
                    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
                )
            )
        )
    beside.join()
    assert differences(nested) == []
    assert nested.query(f"SELECT * FROM ({COUNTED_NOW}) z WHERE total = 2 AND blocked = 2")


def test_many_rows_of_a_tally_become_one_when_its_unit_is_looked_at(nested: World) -> None:
    nested.register(nested.package("p0"))
    pairs = nested.act(lambda tx: gaps.fold(tx, 1, all_ids(tx)))
    for i in range(2 * (facts.TALLY_ROWS + 1)):
        state = ("blocked", "waiting")[i % 2]
        nested.query("UPDATE coverage SET state = :s RETURNING 1", s=state) or nested.act(
            lambda tx: gaps.evaluate(tx, pairs, ACTOR)
        )
    before = nested.query("SELECT count(*) AS n FROM upstream_tally")[0].n
    assert before > facts.TALLY_ROWS
    nested.act(lambda tx: gaps.evaluate(tx, pairs, ACTOR))
    assert nested.query("SELECT count(*) AS n FROM upstream_tally")[0].n < 20
    assert differences(nested) == []


SORTED = """
SELECT s.name, u.key FROM reduction_step s JOIN unit u ON u.pipeline_id = s.pipeline_id
LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
WHERE s.active AND (u.dims = s.dims AND u.members > 0 OR c.step_id IS NOT NULL)
ORDER BY array_position(ARRAY['blocked', 'held', 'waiting', 'active', 'covered', 'empty'],
    coalesce(c.state, 'waiting')), s.position, u.key
"""


@pytest.mark.parametrize("few", [0, 3, 2000])
def test_the_first_lines_of_why_are_those_that_sorting_everything_gives(
    nested: World, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are looked up by their state, or among all units in the order of their keys."""
    monkeypatch.setattr(coverage, "_FEW_UNITS", few)
    rng = random.Random(few)
    names = [f"p{i}" for i in range(12)]
    nested.register(*(nested.package(n, obs_unit=f"o{i % 3}") for i, n in enumerate(names)))
    nested.act(lambda tx: gaps.evaluate(tx, gaps.fold(tx, 1, all_ids(tx)), ACTOR))
    # By another division: units of a step that are orphaned, and units that nobody has looked at.
    nested.pipeline(
        "nested",
        [
            {"name": "scan", "group_by": ["executed_obs_unit"]},
            {"name": "flag", "group_by": ["executed_obs_unit", "source"], "depends_on": ["scan"]},
            {"name": "map", "group_by": ["obs_unit"], "depends_on": ["scan"]},
            {"name": "all", "group_by": [], "depends_on": ["map"]},
        ],
        grouping="archived",
    )
    nested.act(lambda tx: gaps.fold(tx, 1, all_ids(tx)))
    lines = set()
    for _ in range(6):

        def change(tx: Tx) -> None:
            tx.run(
                """
                UPDATE coverage c SET result = 1, run_id = (SELECT min(id) FROM run),
                    state = (ARRAY['blocked', 'held', 'waiting', 'active', 'covered', 'empty'])[1 + mod(
                        ('x' || left(md5(step_id::text || unit_id || :n), 6))::bit(24)::int, 6)]
                """,
                n=str(rng.random()),
            )
            tx.run("DELETE FROM coverage WHERE md5(step_id::text || unit_id || :n) < '2'", n=str(rng.random()))

        nested.act(change)
        everything = [tuple(r) for r in nested.query(SORTED)]
        for limit in (1, 2, 5, 20, len(everything), 1000):
            with nested.store.engine.connect() as conn:
                found = views.why(conn, pipeline="nested", location_id=1, limit=limit)
                assert [(line.step, line.unit) for line in found] == everything[:limit]
                of_step = views.why(conn, pipeline="nested", step="flag", location_id=1, limit=limit)
                assert [line.unit for line in of_step] == [u for s, u in everything if s == "flag"][:limit]
            lines |= {(line.state, line.why) for line in found}
        for name, key in everything:
            with nested.store.engine.connect() as conn:
                (line,) = views.why(conn, pipeline="nested", step=name, unit=key, location_id=1)
            assert (line.step, line.unit) == (name, key)
    assert len({state for state, _ in lines}) == 6
    assert ("waiting", "arrivals_not_sorted_yet") in lines
