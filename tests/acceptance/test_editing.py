"""Pipelines that are changed while they work, as people see it on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness import STEP_DEFAULTS, World, wait_until
from tests.integration.test_cli import Cli
from wfm.model import Role

ONE = {"name": "one", "group_by": ["executed_obs_unit"]}
TWO = {"name": "two", "group_by": [], "depends_on": ["one"]}


@pytest.fixture
def cli(world: World) -> Cli:
    return Cli(world.environ)


def pipeline(*steps: dict[str, Any], **more: Any) -> str:
    body = {"kind": "pipeline", "name": "p", "grouping": "everything", **more}
    return json.dumps({**body, "steps": [{**STEP_DEFAULTS, **s} for s in steps]})


def effects(cli: Cli, document: str, command: str = "diff") -> dict[str, tuple[int, int, int, int]]:
    """By step: units stale, new, orphaned, and runs affected."""
    said = cli.json(command, "-f", "-", stdin=document)["steps"]
    return {s["step"]: (s["stale"], s["new"], s["orphaned"], s["runs"]) for s in said}


def whys(cli: Cli, target: str = "p") -> dict[tuple[str, str], str]:
    return {(w["step"], w["unit"].split("-")[0]): w["why"] for w in cli.json("why", target)}


def covered(world: World, *steps: dict[str, Any], packages: str = "ab") -> None:
    """A pipeline that has worked on some packages."""
    world.pipeline("p", steps)
    with world.roles():
        world.register(*(world.package(n) for n in packages))
        wait_until(lambda: {c.state for c in world.coverage().values()} == {"covered"})
        world.rest()


def test_runs_of_a_step_that_is_removed(world: World, cli: Cli) -> None:
    world.config("slow", seconds=600)
    slow = {"name": "slow", "group_by": ["executed_obs_unit"], "config": "slow", "resources": {"cpu": 4}}
    world.pipeline("p", [slow])
    without = pipeline(ONE)
    with world.roles():
        world.register(*(world.package(n) for n in "ab"))
        wait_until(lambda: world.states() == {("slow", "RUNNING"): 1, ("slow", "PENDING"): 1})
        assert effects(cli, without) == {"slow": (0, 0, 2, 2), "one": (0, 2, 0, 0)}
        said = cli("diff", "-f", "-", stdin=without).stdout
        assert [line.split() for line in said.splitlines() if line.startswith("p/slow  ")] == [["p/slow", *"0022"]]
        assert world.states() == {("slow", "RUNNING"): 1, ("slow", "PENDING"): 1}, "diff changes nothing"
        assert effects(cli, without, "apply") == {"slow": (0, 0, 2, 2), "one": (0, 2, 0, 0)}
        wait_until(lambda: world.states()["slow", "CANCELLED"] == 1)
        assert world.states()["slow", "RUNNING"] == 1, "what runs goes on"
        running, withdrawn = sorted(cli.json("runs", "list", "--step", "slow"), key=lambda r: r["state"], reverse=True)
        assert withdrawn["message"] == "its step or unit is no longer part of its pipeline"
        cli("runs", "cancel", running["id"])
        wait_until(lambda: world.states()["slow", "CANCELLED"] == 2)
        wait_until(lambda: world.states()["one", "COMPLETED"] == 2)
        world.rest()
    assert cli.json("runs", "show", running["id"])["step"] == "slow"
    assert {w["why"] for w in cli.json("why", "p/slow")} == {"disabled"}
    assert set(whys(cli).values()) == {"covered"}, "a step that is gone is no gap"
    steps = {e["body"].get("step") for e in cli.json("events", "list", "--limit", 1000)["events"]}
    assert {"one", "slow"} <= steps
    assert [(c["step"], c["units"]) for c in cli.json("status", code=None)["coverage"]] == [("one", 2)]


def test_a_run_that_was_admitted_before_anybody_saw_the_change_is_not_built(world: World, cli: Cli) -> None:
    world.pipeline("p", [ONE])
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: world.states() == {("one", "PENDING"): 1})

    cli("apply", "-f", "-", stdin=pipeline({"name": "other"}))
    with world.roles(Role.WORKFLOW_MANAGER):
        wait_until(lambda: world.states() == {("one", "CANCELLED"): 1})


def test_a_step_that_is_grouped_otherwise_orphans_its_units_and_takes_them_back(world: World, cli: Cli) -> None:
    covered(world, ONE)
    by_source = pipeline({**ONE, "group_by": ["source"]})
    assert effects(cli, by_source) == {"one": (0, 1, 2, 0)}
    with world.roles():
        cli("apply", "-f", "-", stdin=by_source)
        gone = {("one", "a"): "orphaned", ("one", "b"): "orphaned"}
        wait_until(lambda: whys(cli) == {("one", "ngc253"): "covered", **gone})
        world.rest()
        assert [w["unit"].split("-")[0] for w in cli.json("why", "p")] == ["ngc253", "a", "b"]
        assert cli.json("why", "p")[2]["reason"] == "its step is grouped by source now"
        assert [c["units"] for c in cli.json("status", code=None)["coverage"]] == [1]
        assert effects(cli, pipeline(ONE), "apply") == {"one": (0, 2, 1, 0)}
        wait_until(
            lambda: whys(cli) == {("one", "a"): "covered", ("one", "b"): "covered", ("one", "ngc253"): "orphaned"}
        )
        world.rest()
    assert world.states() == {("one", "COMPLETED"): 3}, "what has a result is not run again"


def test_a_step_that_is_no_longer_the_last_one_while_it_runs(world: World, cli: Cli) -> None:
    """Its job leaves its results as those of a final step; they are looked for there, and read from there."""
    world.config("c", seconds=3)
    world.pipeline("p", [{**ONE, "config": "c"}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states() == {("one", "RUNNING"): 1})
        effect = effects(cli, pipeline({**ONE, "config": "c"}, TWO), "apply")
        assert effect == {"two": (0, 1, 0, 0)}
        wait_until(lambda: world.all_covered(2))
        world.rest()
    assert world.states() == {("one", "COMPLETED"): 1, ("two", "COMPLETED"): 1}
    one, two = (cli.json("runs", "show", i) for i in (1, 2))
    assert [p["path"].split("/")[:2] for p in one["products"] if p["type"] != "LOG"] == [["output", "science"]]
    manifest = json.loads((Path(two["job"]["directory"]) / "config/manifest.json").read_text())
    assert [p["name"] for p in manifest["input_products"]] == [f"science/{one['unit']}.txt"]
    (result,) = (p["path"] for p in two["products"] if p["type"] != "LOG")
    assert (Path(two["job"]["directory"]) / result).read_text() == "data of a\n"
    assert "data of a" not in cli("lineage", "2").stdout
    assert "one" in cli("lineage", "2").stdout


def test_rules_and_versions_say_what_they_make_stale(world: World, cli: Cli) -> None:
    covered(world, ONE, TWO)
    rule = {"table": "raw_data_package", "column": "name", "operator": "neq", "value": "b"}
    narrower = json.dumps({"kind": "grouping", "name": "everything", "rules": [rule]})
    assert effects(cli, narrower) == {"one": (0, 0, 1, 0), "two": (1, 0, 0, 0)}
    versions = [{"version": "1.1.0", "command": ["python", str(world.program)]}]
    newer = json.dumps({"kind": "software", "name": "copy", "versions": versions})
    assert effects(cli, newer) == {"one": (2, 0, 0, 0), "two": (1, 0, 0, 0)}
    assert effects(cli, pipeline(ONE, TWO, enabled=False)) == {}
    assert effects(cli, pipeline(ONE, TWO)) == {}
    assert set(whys(cli).values()) == {"covered"}


def test_a_count_that_takes_too_long_is_left_out(world: World, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    covered(world, ONE)
    monkeypatch.setattr("wfm.whatif.EFFECT_SECONDS", 0.0)
    said = cli("apply", "-f", "-", stdin=pipeline({**ONE, "group_by": ["source"]}))
    assert "what becomes of units was not counted: gave up after 0 s" in said.stderr
    assert cli.json("get", "pipeline", "p")[0]["steps"][0]["group_by"] == ["source"]
