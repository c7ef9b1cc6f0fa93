"""A new version or config never re-runs more than a limit unasked. By the command line."""

from __future__ import annotations

import json
import re

import pytest

from tests.acceptance.test_revoke import STEPS, WHY, covered, observe, other, product_of, release, rests_on
from tests.harness import World, wait_until
from tests.integration.test_cli import Cli
from wfm import gaps
from wfm.model import Actor, Role

LATEST = [{**s, "version_policy": "latest", "version": ""} for s in STEPS]


@pytest.fixture
def world(database, redis_url, tmp_path):
    world = World(tmp_path, database, redis_url, WFM_APPROVAL_UNITS="2")
    yield world
    world.close()


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def why(world):
    return {(s, u[0]): c.why for (s, u), c in world.coverage().items()}


def held(world, step):
    return {u for (s, u), reason in why(world).items() if s == step and reason == "held_for_approval"}


def test_a_release_waits_for_approval_and_new_data_do_not(world, cli):
    world.pipeline("p", LATEST)
    with world.roles():
        observe(world)
        first = covered(world)
        release(world, "2.0.0")
        # Three units of the first step are above the limit; one and two of the others are not.
        wait_until(lambda: held(world, "one") == {"a", "b", "c"}, what="held")
        wait_until(lambda: len(world.runs()) == 9, what="the small steps ran")
        world.rest()
        second = rests_on(world)
        assert second.keys() == first.keys() - {("one", u) for u in "abc"}
        assert {c.run_id for (s, _), c in world.coverage().items() if s == "one"} == {first["one", u] for u in "abc"}
        (line,) = cli.json("why", "p/one", world.runs()[0].unit)
        assert line["state"] == "held"
        assert re.match(r"3 units, (about \S+|less than 0\.01) core-hours, because ", line["reason"])
        assert line["reason"].endswith("because copy 2.0.0 is wanted; approve with `wfm approve p/one`")
        assert "its older result counts" in line["change"]
        (shown,) = cli.json("approve", "--list")
        assert (shown["step"], shown["units"], shown["wanted"]) == ("one", 3, "copy 2.0.0")
        assert "p/one" in cli("approve", "--list").stdout

        # New data run at once, with the new version, and what depends on them reads old and new results.
        world.register(world.package("d", obs_unit="y"))
        wait_until(lambda: len(world.runs()) == 12, what="three runs for the new data")
        world.rest()
        assert why(world)["one", "d"] == why(world)["all", "a"] == "covered"
        assert held(world, "one") == {"a", "b", "c"}  # also when the rest is below the limit
        world.register(world.package("c", "other content\n", obs_unit="y"))
        wait_until(lambda: held(world, "one") == {"a", "b"}, what="newer data of a held unit")
        world.rest()
        assert held(world, "one") == {"a", "b"}
        cli("trigger", "p")
        world.rest()
        assert held(world, "one") == {"a", "b"}  # asking for gaps is no approval

        n = len(world.runs())
        assert "reason" in cli("approve", "p/one", code=2).stderr
        said = cli("approve", "p/one", "--reason", "worth it").stdout
        assert said == "p/one: 2 units may run again with copy 2.0.0\n"
        wait_until(lambda: world.all_covered(7) and len(world.runs()) == n + 4, what="two units, and what reads them")
        world.rest()
        world.check()
        told = cli.json("events", "list", "--type", "pipeline.changed")["events"]
        assert told[-1]["reason"] == "approved: 2 units of one with copy 2.0.0: worth it"
        assert cli.json("approve", "--list") == []
        assert "nothing is held" in cli("approve", "p", "--reason", "x", code=1).stderr
        cli("approve", "nosuch", "--reason", "x", code=3)

        # A later release needs an approval of its own.
        release(world, "3.0.0")
        wait_until(lambda: len(held(world, "one")) == 4, what="held again")
        unit = next(u for s, u in world.coverage() if s == "one" and u[0] == "a")
        cli("trigger", "p/one", unit)
        wait_until(lambda: len(held(world, "one")) == 3, what="one unit alone")
        world.rest()
        assert why(world)["one", "a"] == "covered"
        # Where it goes back to what it was, the results of then count again.
        cli("revoke", "software", "copy", "3.0.0", *WHY, "--yes")
        wait_until(lambda: world.all_covered(7), what="covered by what was there")
        world.rest()
        world.check()


def test_what_was_revoked_does_not_count_while_it_is_held(world, cli):
    release(world, "2.0.0")
    world.pipeline("p", LATEST)
    with world.roles():
        observe(world)
        first = covered(world)
        plan = cli.json("revoke", "software", "copy", "2.0.0", "--plan")["plan"]
        assert {(s["step"], s["effect"][:7], s["units"]) for s in plan["steps"]} == {
            ("one", "held", 3),
            ("two", "follows", 2),
            ("all", "follows", 1),
        }
        cli("revoke", "software", "copy", "2.0.0", *WHY, "--yes")
        wait_until(lambda: why(world)["one", "a"] == "revoked_and_held_for_approval", what="held")
        world.rest()
        assert why(world)["two", "x"] == why(world)["all", "a"] == "waiting_for_upstream"
        assert cli.json("approve", "--list")[0]["revoked"] == 3
        cli("approve", "p", "--reason", "yes")
        second = covered(world)
        assert other(first, second) == set(first)
        world.check()


def test_a_step_that_always_asks(world, cli):
    world.config("c", mark=1)
    world.pipeline("p", [{**STEPS[0], "on_stale": "hold", "config": "c"}])
    with world.roles():
        world.register(world.package("a"))
        first = covered(world, 1)
        world.config("c", mark=2)
        wait_until(lambda: held(world, "one") == {"a"}, what="held")
        (line,) = cli.json("why", "p")
        assert "because config c revision 2 is wanted" in line["reason"]
        cli("approve", "p", "--reason", "yes")
        wait_until(lambda: rests_on(world).get(("one", "a"), 0) > first["one", "a"], what="run again")
        world.rest()
        cli("revoke", "product", product_of(world, rests_on(world)["one", "a"]), *WHY, "--yes")
        wait_until(lambda: why(world)["one", "a"] == "revoked_and_held_for_approval", what="held")
        assert "its result was revoked" in cli.json("why", "p")[0]["reason"]
        cli("approve", "p", "--reason", "yes")
        wait_until(lambda: world.all_covered(1) and len(world.runs()) == 3, what="run again")
        world.rest()
        world.check()


def test_the_limits_of_a_step_go_before_those_of_the_settings(world, cli):
    world.pipeline("p", [{**LATEST[0], "approval_units": 3}])
    with world.roles():
        observe(world)
        covered(world, 3)
        release(world, "2.0.0")
        wait_until(lambda: len(world.runs()) == 6, what="run again")
        covered(world, 3)
        world.pipeline("p", [{**LATEST[0], "approval_units": 3, "approval_core_hours": 0}])
        release(world, "3.0.0")
        wait_until(lambda: len(held(world, "one")) == 3, what="held")


@pytest.mark.parametrize("chunk", [1, 2, 1000])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_evaluation_decides_nothing(world, monkeypatch, chunk, backwards):
    monkeypatch.setattr("wfm.gaps.membership.CHUNK", chunk)
    world.pipeline("p", LATEST[:1])
    with world.roles():
        observe(world)
        covered(world, 3)
    document = {"kind": "software", "name": "copy"}
    document["versions"] = [{"version": "2.0.0", "command": ["python", str(world.program)]}]
    world.apply(json.dumps(document))
    for pair in sorted(((r.step_id, r.unit_id) for r in world.query("SELECT * FROM coverage")), reverse=backwards):
        world.act(lambda tx, pair=pair: gaps.evaluate(tx, [pair], Actor(Role.TRIGGER_MANAGER)))
    assert held(world, "one") == {"a", "b", "c"}
    assert len(world.runs()) == 3


def test_runs_for_data_that_have_a_result_have_a_priority_of_their_own(world):
    world.pipeline("p", LATEST[:1], priority=5, stale_priority=-5)
    with world.roles():
        world.register(world.package("a"))
        covered(world, 1)
    with world.roles(Role.TRIGGER_MANAGER):
        release(world, "2.0.0")
        world.register(world.package("b"))
        wait_until(lambda: len(world.runs()) == 3, what="three runs")
    assert {(r.unit[0], r.id > 1, r.priority) for r in world.runs()} == {
        ("a", False, 5),
        ("a", True, -5),
        ("b", True, 5),
    }
