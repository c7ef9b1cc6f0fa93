"""Another attempt of ended runs: what counts meanwhile and afterwards, what is refused, and runs of an older chart."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.harness import ACTOR, wait_until
from wfm import acts, gaps, views
from wfm.kinds import open_purges
from wfm.model import Actor, Role, RunState
from wfm.service import load_charts
from wfm.store import Store
from wfm.views import LineageKind

ONE = [{"name": "one", "group_by": ["executed_obs_unit"]}]
TWO = [*ONE, {"name": "two", "depends_on": ["one"], "group_by": []}]
PENDING, COLLECTING = RunState.PENDING, RunState.COLLECTING_RESULTS


def redrive(world, run, begin=PENDING):
    """The moved run, or the reason why not."""
    done = world.act(lambda tx: acts.redrive_runs(tx, [run.id], begin, ACTOR))
    return str(done.refused[run.id]) if done.refused else done.moved[run.id]


def verified(world):
    with world.store.begin() as tx:
        report = views.verify(tx.conn, world.store.charts)
    return report.faults


def products(world, run):
    rows = world.query(
        "SELECT d.*, c.path AS place, c.status FROM data_product d JOIN physical_copy c ON c.product_id = d.id"
        " WHERE run_id = :id AND type <> 'LOG' ORDER BY d.id",
        id=run.id,
    )
    return [(d.attempt, d.superseded_by, Path(d.place).read_text()) for d in rows]


def history(world, run):
    rows = world.query("SELECT * FROM transition WHERE run_id = :id ORDER BY version", id=run.id)
    return [(t.trigger, t.dest, t.attempt, t.chart_version) for t in rows], rows[-1]


def stray(world, **more):
    """A step whose job ends well, and whose result cannot be collected until somebody takes a file away."""
    world.apply(
        """
        kind: software
        name: untidy
        versions:
          - version: 1.0.0
            command: [sh, -c, 'cd "$WORKFLOW_OUTPUT_DIR"; echo good > science/good.txt; echo odd > odd.txt']
        """
    )
    world.pipeline("p", [{**ONE[0], "software": "untidy", **more}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "FAILED"] == 1)
    (run,) = world.runs()
    assert run.exit_code == 0
    return run


def test_a_completed_run_computes_again_and_its_old_products_count_until_the_new_are_there(world):
    world.pipeline("p", TWO)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(2))
        first, second = world.runs()
        assert redrive(world, first).attempt == 2
        assert products(world, first)[0][1] is None
        wait_until(lambda: world.runs()[0].state == "COMPLETED")
        wait_until(lambda: world.all_covered(2))
        world.rest()
    assert len(world.runs()) == 2, "a repeated result of the same inputs makes nothing stale"
    assert products(world, first) == [(1, first.id, "data of a\n"), (2, None, "data of a\n")]
    assert sorted(world.executions().values()) == [1, 1, 1]
    moves, _ = history(world, first)
    assert ("redrive", "PENDING", 2, 2) in moves
    reason = world.query("SELECT actor, reason FROM transition WHERE trigger = 'redrive'")
    assert [tuple(r) for r in reason] == [(ACTOR.name, ACTOR.reason)]
    assert verified(world) == []
    with world.store.begin() as tx:
        node = views.lineage(tx.conn, LineageKind.RUN, second.id)
    assert [(n.details["attempt"], n.note.rpartition(", ")[2]) for n in node.upstream] == [
        (1, "superseded by a later attempt")
    ], "the map was made from the first attempt's product"

    # Computed again, it reads the newer one.
    with world.roles():
        redrive(world, second)
        wait_until(lambda: world.runs()[1].attempt == 2 and world.all_covered(2))
    with world.store.begin() as tx:
        node = views.lineage(tx.conn, LineageKind.RUN, second.id)
    assert [n.details["attempt"] for n in node.upstream] == [2]
    assert verified(world) == []


def test_a_run_goes_on_with_the_products_that_it_pinned(world):
    """The upstream run computes again while the one that reads its result waits to be staged."""
    world.pipeline("p", TWO)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(2))
    first, second = world.runs()
    redrive(world, second)
    with world.roles(Role.WORKFLOW_MANAGER):
        wait_until(lambda: world.runs()[1].state == "STAGING_DATA")
    redrive(world, first)
    with world.roles(Role.WORKER, Role.RESULT_MANAGER):
        wait_until(lambda: world.runs()[1].state == "COMPLETED")
    assert products(world, second)[-1] == (2, None, "data of a\n")


def test_only_the_collection_is_repeated(world):
    run = stray(world)
    (Path(run.job["directory"]) / "output" / "odd.txt").unlink()
    with world.roles():
        assert redrive(world, run, COLLECTING).state is COLLECTING
        wait_until(lambda: world.all_covered(1))
        world.rest()
    assert products(world, run) == [(2, None, "good\n")]
    assert history(world, run)[0][-2:] == [
        ("recollect", "COLLECTING_RESULTS", 2, 2),
        ("collect", "COMPLETED", 2, 2),
    ]
    assert world.query("SELECT 1 FROM task WHERE kind = 'submit'") == [(1,)]
    # Of a result that is there, too: it is then the one that counts.
    with world.roles():
        redrive(world, world.runs()[0], COLLECTING)
        assert world.coverage()["one", world.runs()[0].unit].state == "active"
        wait_until(lambda: world.all_covered(1))
    assert products(world, run) == [(2, run.id, "good\n"), (3, None, "good\n")]
    assert verified(world) == []


def test_what_is_no_longer_wanted_or_not_there_is_refused(world):
    world.config("c", exit_for=[])
    world.pipeline("p", [{**ONE[0], "config": "c"}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        (old,) = world.runs()
        world.register(world.package("a", "changed\n"))
        wait_until(lambda: len(world.runs()) == 2 and world.all_covered(1))
    new = world.runs()[1]
    assert "no longer the newest" in redrive(world, old)
    assert redrive(world, new).state is PENDING
    assert f"run {new.id} of the same unit is on its way" in redrive(world, old)
    assert "'redrive' refused in PENDING" in redrive(world, new)
    world.act(lambda tx: acts.cancel_runs(tx, [new.id], ACTOR))
    assert "left no exit record" in redrive(world, new, COLLECTING)
    world.query("UPDATE run SET exit_code = 3 WHERE id = :id RETURNING 1", id=new.id)
    assert "left with code 3" in redrive(world, new, COLLECTING)
    world.query("UPDATE reduction_step SET active = false RETURNING 1")
    assert "no longer part of its pipeline" in redrive(world, new)
    assert verified(world) == []


def test_what_was_purged_is_computed_again_but_not_collected(world):
    run = stray(world, retention_days=1e-9)
    with world.store.begin() as tx:
        open_purges(tx, 1)
    assert "purged" in redrive(world, run, COLLECTING)
    with world.roles(Role.WORKER):
        wait_until(lambda: not Path(run.job["directory"]).exists())
        world.rest()
    assert "purged" in redrive(world, run, COLLECTING)
    with world.roles():
        assert redrive(world, run).attempt == 2
        wait_until(lambda: world.states()["one", "FAILED"] == 1)
    # What the new attempt left is purged in its turn.
    with world.store.begin() as tx:
        open_purges(tx, 1)
    assert world.query("SELECT attempt FROM task WHERE kind = 'purge' ORDER BY id") == [(1,), (2,)]


def test_nothing_is_purged_that_somebody_is_about_to_collect(world):
    run = stray(world, retention_days=1e-9)

    def purge():
        with world.store.begin() as tx:
            open_purges(tx, 1)

    with world.store.begin() as tx:
        acts.redrive_runs(tx, [run.id], COLLECTING, ACTOR)
        other = threading.Thread(target=purge)
        other.start()
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        wait_until(lambda: world.query(waiting) or not other.is_alive())
    other.join()
    assert not world.query("SELECT 1 FROM task WHERE kind = 'purge'")


@pytest.fixture
def chart_1(world):
    """A store of an installation that knows only the first chart."""
    store = Store(world.settings.database_url, "wfm", {1: load_charts()[1]})
    yield store
    store.close()


def test_a_run_that_began_under_chart_1_goes_on_under_it_and_a_new_attempt_begins_under_the_newest(world, chart_1):
    world.pipeline("p", ONE)
    world.register(world.package("a"), world.package("b"))
    with chart_1.begin() as tx:
        ids = [r.id for r in tx.all("SELECT id FROM raw_data_package")]
        gaps.evaluate(tx, gaps.fold(tx, 1, ids), Actor("trigger-manager"))
    assert [r.chart_version for r in world.runs()] == [1, 1]
    with world.roles():
        wait_until(lambda: world.all_covered(2))
        first, second = world.runs()
        assert {v for run in (first, second) for _, _, _, v in history(world, run)[0]} == {1}
        redrive(world, first)
        wait_until(lambda: world.all_covered(2))
        world.rest()
    assert [r.chart_version for r in world.runs()] == [2, 1]
    charts = [v for *_, v in history(world, first)[0]]
    assert charts == [1] * charts.count(1) + [2] * charts.count(2)
    assert min(charts.count(1), charts.count(2)) >= 5  # a short job is never seen running
    assert verified(world) == []


def changed_and_changed_back(world):
    """Two runs, of which the first has the result that is wanted again."""
    with world.roles():
        for n, content in enumerate(("data of a\n", "changed\n"), 1):
            world.register(world.package("a", content))
            wait_until(lambda n=n: len(world.runs()) == n and world.all_covered(1))
    return world.runs()


def test_data_that_changes_back_is_covered_by_its_first_result_whose_products_count_again(world):
    world.pipeline("p", ONE)
    first, second = changed_and_changed_back(world)
    assert [x[1] for run in (first, second) for x in products(world, run)] == [second.id, None]
    with world.roles():
        world.register(world.package("a", "data of a\n"))
        wait_until(lambda: world.coverage()["one", first.unit].run_id == first.id)
        world.rest()
    assert [x[1] for run in (first, second) for x in products(world, run)] == [None, first.id]
    assert len(world.runs()) == 2
    # And once more, with two attempts of the first.
    with world.roles():
        redrive(world, first)
        wait_until(lambda: world.runs()[0].attempt == 2 and world.all_covered(1))
        world.register(world.package("a", "changed\n"))
        wait_until(lambda: world.coverage()["one", first.unit].run_id == second.id)
        world.register(world.package("a", "data of a\n"))
        wait_until(lambda: world.coverage()["one", first.unit].run_id == first.id)
        world.rest()
    assert [x[1] for x in products(world, first)] == [first.id, None]
    assert verified(world) == []


def test_data_that_changes_back_after_its_result_was_purged_is_computed_again(world):
    world.pipeline("p", [{**ONE[0], "retention_days": 1e-9}])
    first, _ = changed_and_changed_back(world)
    with world.store.begin() as tx:
        open_purges(tx, 1)
    with world.roles():
        world.register(world.package("a", "data of a\n"))
        wait_until(lambda: len(world.runs()) == 3 and world.all_covered(1))
        world.rest()
    assert not Path(first.job["directory"]).exists()
    assert products(world, world.runs()[2]) == [(1, None, "data of a\n")]
    assert world.coverage()["one", first.unit].run_id == world.runs()[2].id
