"""Reconciliation finds what a full evaluation of everything finds, and decides nothing else again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.harness import ACTOR, World
from wfm import acts, gaps, views
from wfm.decide import MoveFacts
from wfm.gaps import evaluation, reconciliation
from wfm.store import Move, Tx
from wfm.whatif import _NEXT

STEPS: list[dict[str, Any]] = [
    {"name": "scan", "group_by": ["executed_obs_unit"]},
    {"name": "flag", "group_by": ["executed_obs_unit"], "depends_on": ["scan"]},
    {"name": "map", "group_by": ["obs_unit"], "depends_on": ["flag"], "config": "c"},
    {"name": "all", "group_by": [], "depends_on": ["map"]},
]


def state(world: World) -> list[Any]:
    return [
        *world.query("SELECT step_id, unit_id, state, why, reason, wanted, run_id, result FROM coverage ORDER BY 1, 2"),
        *world.query("SELECT id, pipeline_id, key, digest, members FROM unit ORDER BY 1"),
        *world.query("SELECT upper_id, lower_id FROM unit_edge ORDER BY 1, 2"),
        *world.query("SELECT id, state FROM run ORDER BY 1"),
    ]


def everything(tx: Tx) -> None:
    """The oracle: every package folded, every pair decided."""
    gaps.fold(tx, 1, [r.id for r in tx.all("SELECT id FROM raw_data_package")])
    pairs = tx.all(
        """
        SELECT s.id AS step, u.id AS unit FROM reduction_step s
        JOIN unit u ON u.pipeline_id = s.pipeline_id AND u.dims = s.dims
        WHERE s.active OR EXISTS (SELECT 1 FROM coverage c WHERE (c.step_id, c.unit_id) = (s.id, u.id))
        """
    )
    gaps.evaluate(tx, {(r.step, r.unit) for r in pairs}, ACTOR)


def reconcile(tx: Tx) -> None:
    gaps.reconcile(tx, 1, ACTOR)


@pytest.fixture
def decided(world: World, monkeypatch: pytest.MonkeyPatch) -> list[gaps.Pair]:
    """The pairs that were decided on."""
    seen: list[gaps.Pair] = []
    evaluate = evaluation.evaluate_chunk

    def spy(tx: Tx, pairs: Any, *args: Any) -> Any:
        seen.extend(pairs)
        return evaluate(tx, pairs, *args)

    monkeypatch.setattr(evaluation, "evaluate_chunk", spy)
    return seen


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
    world.config("c", n=0)
    world.pipeline("nested", STEPS, grouping="archived")
    return world


def let_succeed(tx: Tx, some: Callable[[int], bool] = lambda i: True) -> None:
    ids = [r.id for r in tx.all("SELECT id FROM run WHERE finished_at IS NULL") if some(r.id)]
    moving = tx.lock_runs(ids)
    while moving := {i: r for i, r in moving.items() if r.state in _NEXT}:
        moving, _ = tx.move([Move(r, _NEXT[r.state], ACTOR, MoveFacts(exit_record=True)) for r in moving.values()])


@pytest.mark.parametrize("seed", range(8))
def test_after_a_reconciliation_a_full_evaluation_changes_nothing(nested: World, seed: int) -> None:
    rng = random.Random(seed)
    names = [f"p{i}" for i in range(10)]

    def sql(text: str, **params: Any) -> Callable[[Tx], None]:
        return lambda tx: tx.run(text, **params)  # type: ignore[return-value]

    fresh = iter(names)

    def arrive() -> Any:
        p = nested.package(next(fresh, "p0"), obs_unit=f"o{rng.randint(0, 2)}")
        known = nested.query("SELECT 1 FROM raw_data_package WHERE name = :n", n=p.name)
        return lambda tx: known or nested.register(p)

    def content() -> Any:
        return sql("UPDATE raw_data_package SET item = :i WHERE name = :n", i=rng.randint(1, 9), n=rng.choice(names))

    def succeed() -> Any:
        return lambda tx: let_succeed(tx, lambda i: rng.random() < 0.7)

    def fail() -> Any:
        def work(tx: Tx) -> None:
            ids = [r.id for r in tx.all("SELECT id FROM run WHERE finished_at IS NULL") if rng.random() < 0.3]
            acts.cancel_runs(tx, ids, ACTOR) if ids else None

        return work

    def again() -> Any:
        def work(tx: Tx) -> None:
            ids = [r.id for r in tx.all("SELECT id FROM run WHERE state = 'CANCELLED'") if rng.random() < 0.3]
            acts.retry_runs(tx, ids, ACTOR) if ids else None

        return work

    def move() -> Any:
        return sql(
            "UPDATE executed_obs_unit SET obs_unit_id = (SELECT id FROM obs_unit ORDER BY md5(name || :n) LIMIT 1)"
            " WHERE name = :name",
            name=rng.choice(names),
            n=str(rng.random()),
        )

    def lose() -> Any:
        return sql(
            "UPDATE raw_data_package SET state = CASE state WHEN 'archived' THEN 'failed' ELSE 'archived' END"
            " WHERE name = :name",
            name=rng.choice(names),
        )

    def config() -> Any:
        n = rng.randint(0, 3)
        return lambda tx: nested.config("c", n=n)

    def version() -> Any:
        state = rng.choice(["active", "deprecated", "revoked"])
        return sql("UPDATE software_version SET state = :s", s=state)

    def release() -> Any:
        return sql(
            "INSERT INTO software_version (software_id, version, command) SELECT software_id, :v, command"
            " FROM software_version LIMIT 1 ON CONFLICT DO NOTHING",
            v=f"1.0.{rng.randint(1, 3)}",
        )

    def switch() -> Any:
        name = rng.choice(["scan", "map", None])
        act = rng.choice([acts.pause, acts.resume])
        return lambda tx: act(tx, "nested", name, None, ACTOR)

    def enable() -> Any:
        on = rng.random() < 0.7
        return lambda tx: acts.set_enabled(tx, "nested", on, ACTOR)

    def definition() -> Any:
        steps = [dict(s) for s in STEPS]
        what = rng.randrange(4)
        if what == 1:
            steps[3] = {**steps[3], "depends_on": ["map", "scan"]}
        elif what == 2:
            steps[2] = {**steps[2], "depends_on": ["scan"], "group_by": ["source"]}
        elif what == 3:
            del steps[3]
        trigger = rng.choice(["CONTINUOUS", "MANUAL"])
        return lambda tx: nested.pipeline("nested", steps, grouping="archived", trigger=trigger)

    def ask() -> Any:
        return lambda tx: acts.trigger(tx, "nested", None, None, ACTOR)

    def some_folded() -> Any:
        def work(tx: Tx) -> None:
            ids = [r.id for r in tx.all("SELECT id FROM raw_data_package") if rng.random() < 0.5]
            gaps.evaluate(tx, gaps.fold(tx, 1, ids), ACTOR)

        return work

    changes = [
        arrive,
        arrive,
        arrive,
        content,
        succeed,
        succeed,
        succeed,
        fail,
        again,
        move,
        lose,
        config,
        version,
        release,
    ]
    changes += [switch, enable, definition, ask, some_folded]
    for _ in range(14):
        for _ in range(rng.randint(1, 4)):
            change = rng.choice(changes)
            work = change()
            if change in (arrive, config, definition):  # transactions of their own
                work(None)
            else:
                nested.act(work)
        nested.act(reconcile)
        found = state(nested)
        nested.act(everything)
        assert state(nested) == found
    with nested.store.begin() as tx:
        assert gaps.mend_tallies(tx, 1) == 0


def test_a_reconciliation_decides_nothing_again(nested: World, decided: list[gaps.Pair]) -> None:
    nested.register(*(nested.package(f"p{i}", obs_unit=f"o{i % 2}") for i in range(4)))
    for _ in range(5):  # down to `all`, and once more
        nested.act(reconcile)
        nested.act(let_succeed)
    assert nested.all_covered(11)
    decided.clear()
    nested.act(reconcile)
    nested.act(reconcile)
    assert decided == []
    # What is held is not looked at again either, until what holds it changes.
    nested.act(lambda tx: acts.pause(tx, "nested", None, None, ACTOR))
    nested.register(nested.package("p5", obs_unit="o1"))
    nested.act(reconcile)
    assert len(decided) == 4  # its scan, its flag, its map, and all; no covered unit
    decided.clear()
    nested.act(reconcile)
    assert decided == []
    nested.act(lambda tx: acts.resume(tx, "nested", None, None, ACTOR))
    nested.act(reconcile)
    assert len(decided) == 4


def test_packages_of_which_no_message_told_are_found_in_any_number(
    nested: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [nested.package(f"p{i}", obs_unit=f"o{i % 3}") for i in range(8)]
    nested.register(*packages[:3])
    nested.act(reconcile)
    nested.register(*packages[3:4])
    nested.act(reconcile)
    assert [r.members for r in nested.query("SELECT members FROM unit WHERE key = 'all'")] == [4]
    monkeypatch.setattr(reconciliation, "FEW", 2)
    nested.register(*packages[4:])
    nested.act(reconcile)
    assert [r.members for r in nested.query("SELECT members FROM unit WHERE key = 'all'")] == [8]
    # One unit alone that is not what it should be.
    nested.query("UPDATE unit SET digest = digest + 1 WHERE key = 'all' RETURNING 1")
    nested.query(
        "UPDATE unit_member m SET item = m.item + 1 FROM unit u, raw_data_package p WHERE u.id = m.unit_id"
        " AND u.key = 'all' AND p.id = m.package_id AND p.name = 'p2' RETURNING 1"
    )
    nested.act(reconcile)
    found = state(nested)
    nested.act(everything)
    assert state(nested) == found
    (unit,) = nested.query(
        "SELECT digest, (SELECT sum(item) % (2::numeric ^ 128) FROM raw_data_package) AS truth"
        " FROM unit WHERE key = 'all'"
    )
    assert unit.digest == unit.truth


def test_coverage_that_does_not_fit_its_runs_is_decided_again(nested: World) -> None:
    nested.register(nested.package("p0"))
    nested.act(reconcile)
    nested.act(let_succeed)
    nested.query("UPDATE coverage SET state = 'active', why = 'run' WHERE state = 'covered' RETURNING 1")
    nested.act(reconcile)
    assert len(nested.query("SELECT 1 FROM coverage WHERE state = 'covered'")) == 1
    # Its files are purged: it is no result any more.
    nested.query(
        "INSERT INTO task (location_id, kind, run_id, state) SELECT 1, 'purge', run_id, 'done' FROM coverage"
        " WHERE state = 'covered' RETURNING 1"
    )
    nested.act(reconcile)
    found = state(nested)
    nested.act(everything)
    assert state(nested) == found
    assert not nested.query("SELECT 1 FROM coverage WHERE state = 'covered'")


def test_what_an_older_run_left_open_is_found_when_its_end_was_not_heard(nested: World) -> None:
    nested.register(nested.package("p0"))
    nested.act(reconcile)
    (run,) = nested.query("SELECT id FROM run")
    nested.act(lambda tx: tx.move([Move(r, "build", ACTOR) for r in tx.lock_runs([run.id]).values()]))
    nested.query("UPDATE raw_data_package SET item = item + 1 RETURNING 1")
    nested.act(reconcile)
    assert [(c.state, c.why) for c in nested.query("SELECT * FROM coverage ORDER BY step_id LIMIT 1")] == [
        ("active", "newer_input")
    ]
    nested.act(let_succeed)
    nested.act(reconcile)
    assert [r.state for r in nested.runs()] == ["COMPLETED", "PENDING"]


def test_wrong_tallies_are_mended(nested: World) -> None:
    nested.register(*(nested.package(f"p{i}", obs_unit=f"o{i % 2}") for i in range(4)))
    nested.act(reconcile)
    nested.act(let_succeed)
    right = json.dumps(sorted(map(str, nested.query(TALLIES))))
    nested.query("UPDATE upstream_tally SET units = units + 1, digest = digest + 3 WHERE id % 2 = 0 RETURNING 1")
    nested.query("DELETE FROM upstream_tally WHERE id % 3 = 0 RETURNING 1")
    nested.query("UPDATE coverage_tally SET units = units + 1 WHERE state = 'covered' RETURNING 1")
    with nested.store.begin() as tx:
        wrong = views.coverage_summary(tx.conn, 1)
    assert nested.act(lambda tx: gaps.mend_tallies(tx, 1)) > 0
    assert json.dumps(sorted(map(str, nested.query(TALLIES)))) == right
    assert nested.act(lambda tx: gaps.mend_tallies(tx, 1)) == 0
    with nested.store.begin() as tx:
        assert views.coverage_summary(tx.conn, 1) != wrong
        counted = {(c.step, str(s)): n for c in views.coverage_summary(tx.conn, 1) for s, n in c.states.items() if n}
    rows = nested.query(
        "SELECT s.name, c.state, count(*) AS n FROM coverage c JOIN reduction_step s ON s.id = c.step_id GROUP BY 1, 2"
    )
    assert counted == {(r.name, r.state): r.n for r in rows}


TALLIES = """
SELECT upper_id, dims, step_id, sum(units), sum(covered), sum(blocked),
    mod(sum(digest), 2::numeric ^ 128)::numeric(39, 0)
FROM upstream_tally GROUP BY upper_id, dims, step_id HAVING (sum(units), sum(covered), sum(blocked)) <> (0, 0, 0)
"""
