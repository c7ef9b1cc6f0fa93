"""Statements that look up by key are planned once, from the indexes, whatever the planner knows of the tables."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from tests.harness import ACTOR, World
from wfm import gaps
from wfm.gaps import evaluation, facts, membership, quarantine
from wfm.store import Prepared, Tx

VIEW = "pg_prepared_statements"
PREPARED = [
    x
    for module in (evaluation, facts, membership, quarantine)
    for x in vars(module).values()
    if isinstance(x, Prepared)
]


@pytest.fixture
def folded(world: World) -> World:
    world.pipeline(
        "nightly",
        [
            {"name": "scan", "group_by": ["executed_obs_unit"]},
            {"name": "all", "group_by": [], "depends_on": ["scan"]},
        ],
    )
    world.register(world.package("p1"), world.package("p2"))
    return world


def work(tx: Tx) -> None:
    ids = [r.id for r in tx.all("SELECT id FROM raw_data_package")]
    gaps.evaluate(tx, gaps.fold(tx, 1, ids), ACTOR)


def settings(tx: Tx) -> list[Any]:
    names = ("join_collapse_limit", "enable_seqscan", "enable_hashjoin", "enable_mergejoin")
    return [tx.all(f"SHOW {name}")[0][0] for name in names]


def test_plans_are_made_once_for_each_connection(folded: World) -> None:
    with folded.store.begin() as tx:
        for n in range(3):
            tx.run("UPDATE raw_data_package SET item = item + 1")
            work(tx)
            known = tx.all(f"SELECT name, generic_plans, custom_plans FROM {VIEW}")
            if n == 1:
                first = {r.name for r in known}
        assert {r.name for r in known} == first
        assert {"situations", "write_coverage", "lock_units"} <= first
        assert all(r.generic_plans >= 3 and not r.custom_plans for r in known if r.name in ("situations", "ended"))


def test_no_plan_reads_a_table_from_end_to_end_although_they_are_all_but_empty(folded: World) -> None:
    """A plan is kept: one that was good for an empty table would read a million rows for each row of a chunk."""
    with folded.store.begin() as tx:
        tx.run("ANALYZE")  # else the planner takes tables that it knows nothing of for larger ones
        work(tx)
        tx.run("UPDATE raw_data_package SET item = item + 1")
        with tx.by_key():
            known = {r.name: r.types for r in tx.all("SELECT name, parameter_types::text[] AS types FROM " + VIEW)}
            for statement in PREPARED:
                if statement.name not in known:
                    continue
                given = {"jsonb": "'[]'", "text": "''", "bigint": "1"}
                values = ", ".join(given.get(kind, "'{}'") for kind in known[statement.name])
                plan = tx.all(f"EXPLAIN EXECUTE {statement.name}({values})")
                text = "\n".join(r[0] for r in plan)
                for word in ("Seq Scan", "Hash Join", "Merge Join"):
                    assert word not in text, text


def test_the_planner_is_asked_again_afterwards(folded: World) -> None:
    with folded.store.begin() as tx:
        usual = settings(tx)
        with tx.by_key():
            assert settings(tx) == ["1", "off", "off", "off"]
            with tx.by_key(False):
                assert settings(tx) == usual
            assert settings(tx) == ["1", "off", "off", "off"]
            with tx.by_key():
                pass
            assert settings(tx) == ["1", "off", "off", "off"]
        assert settings(tx) == usual
    with pytest.raises(DBAPIError), folded.store.begin() as tx, tx.by_key():
        tx.run("SELECT 1 / 0")
    with folded.store.begin() as tx:
        assert settings(tx) == usual
        work(tx)  # what the transaction before had prepared is still known


def test_the_planner_is_asked_again_after_a_savepoint(folded: World) -> None:
    with folded.store.begin() as tx:
        usual = settings(tx)
        with pytest.raises(DBAPIError), tx.conn.begin_nested(), tx.by_key():
            tx.run("SELECT 1 / 0")
        assert settings(tx) == usual
        with tx.by_key():
            assert settings(tx) == ["1", "off", "off", "off"]


def test_names_are_their_own() -> None:
    assert len({x.name for x in PREPARED}) == len(PREPARED) > 8
