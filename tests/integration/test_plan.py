"""`wfm plan`: what would run now and why, and how a grouping comes to its packages."""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

import pytest

from tests.harness import ACTOR, World
from tests.integration.test_cli import Cli
from wfm import gaps, views
from wfm.decide import MoveFacts
from wfm.model import Actor
from wfm.store import Move

SCAN = {"name": "scan", "group_by": ["raw_data_package"]}
MAP = {"name": "map", "depends_on": ["scan"], "group_by": ["source"]}


@pytest.fixture
def cli(world: World) -> Cli:
    return Cli(world.environ)


def look(world: World) -> None:
    """What the trigger-manager does when it compares everything."""
    with world.store.begin() as tx:
        gaps.reconcile(tx, 1, Actor("trigger-manager"))


def complete(world: World, *, hours: float = 1.0) -> None:
    """Every run that is there succeeds, after so many hours of its job."""
    with world.store.begin() as tx:
        runs = tx.lock_runs([r.id for r in tx.all("SELECT id FROM run WHERE finished_at IS NULL")])
        for trigger in ("build", "submit", "finish", "collect"):
            sets = {"wall_seconds": hours * 3600} if trigger == "finish" else {}
            moves = [Move(r, trigger, ACTOR, MoveFacts(exit_record=True), sets) for r in runs.values()]
            runs, _ = tx.move(moves)
    look(world)


def everything(world: World) -> Any:
    """What the database holds of the work, as one value."""
    tables = ("unit", "unit_member", "coverage", "run", "transition", "event", "task")
    return {t: sorted(map(str, world.query(f"SELECT * FROM {t}"))) for t in tables}


def of(plan: Any, step: str) -> list[tuple[str, str, bool, int]]:
    (found,) = [s for s in plan["steps"] if s["step"] == step]
    return [(g["state"], g["why"], g["starts"], g["units"]) for g in found["gaps"]]


def test_plan_says_what_would_run_now_and_why_and_changes_nothing(world: World, cli: Cli) -> None:
    world.pipeline("p", [SCAN, MAP])
    world.register(*(world.package(n) for n in "abc"))
    before = everything(world)
    plan = cli.json("plan")
    assert everything(world) == before
    assert of(plan, "scan") == [("active", "run", True, 3)]
    assert of(plan, "map") == [("waiting", "waiting_for_upstream", False, 1)]
    assert plan["starts"] == 3
    assert plan["cost"] == {"runs": 3, "unknown": 3, "core_hours": None}
    said = cli("plan").stdout
    assert "no result covers this unit yet" in said
    assert "3 runs would start in all; cost: unknown: no run of these steps has completed yet" in said

    look(world)
    plan = cli.json("plan", "p/scan")
    assert [s["step"] for s in plan["steps"]] == ["scan"]
    assert of(plan, "scan") == [("active", "run", False, 3)]
    assert plan["steps"][0]["gaps"][0]["run"] == "PENDING"
    assert plan["starts"] == 0


def test_plan_knows_the_cost_of_past_runs(world: World, cli: Cli) -> None:
    world.pipeline("p", [{**SCAN, "resources": {"cpu": 2}}, MAP])
    world.register(world.package("a"), world.package("b"))
    look(world)
    complete(world, hours=3)
    world.register(world.package("c"), world.package("b", content="other"))
    plan = cli.json("plan", "p")
    assert plan["steps"][0]["per_run"] == {"runs": 2, "wall_seconds": 10_800.0, "core_hours": 6.0}
    assert plan["steps"][0]["cost"] == {"runs": 2, "unknown": 0, "core_hours": 12.0}
    assert {g["reason"]: g["units"] for g in plan["steps"][0]["gaps"] if g["starts"]} == {
        "no result covers this unit yet": 1,
        "stale: newer input": 1,
    }
    assert of(plan, "scan")[2:] == [("covered", "covered", False, 1)]
    assert "p/scan: 2 runs would start; cost: about 12 core-hours" in cli("plan", "p").stdout


def test_plan_names_what_is_held_and_why(world: World, cli: Cli) -> None:
    world.pipeline("p", [SCAN, MAP], trigger="MANUAL")
    world.pipeline("q", [SCAN])
    world.register(world.package("a"))
    cli("pause", "q", "--reason", "a test")
    plan = cli.json("plan")
    assert [(s["pipeline"], s["step"], [g["why"] for g in s["gaps"]]) for s in plan["steps"]] == [
        ("p", "scan", ["manual_only"]),
        ("p", "map", ["waiting_for_upstream"]),
        ("q", "scan", ["paused"]),
    ]
    assert plan["starts"] == 0
    assert plan["cost"] == {"runs": 0, "unknown": 0, "core_hours": None}
    assert "0 runs would start in all; cost: nothing" in cli("plan").stdout


def test_plan_leads_to_the_rule_that_no_package_passes(world: World, cli: Cli) -> None:
    world.register(world.package("a"))
    cli("apply", "-f", "-", stdin=dedent(RULES))
    world.pipeline("p", [SCAN, MAP], grouping="g")
    said = cli("plan").stdout
    assert said.count("p: no package fits; `wfm plan p --explain` counts what each rule lets through") == 1
    assert "rule 2 matches nothing; packages have: NGC253" in cli("plan", "p", "--explain").stdout


def test_wrong_usage_of_plan(world: World, cli: Cli) -> None:
    world.pipeline("p", [SCAN])
    assert "did you mean 'p'" not in cli("plan", "nosuch", code=3).stderr
    assert "unknown step 'scam', did you mean 'scan'?" in cli("plan", "p/scam", code=3).stderr
    assert "unknown pipeline" in cli("plan", "nosuch", "--explain", code=3).stderr
    assert "--explain needs a pipeline" in cli("plan", "--explain", code=2).stderr
    assert "-f goes with --explain" in cli("plan", "-f", "x.yaml", code=2).stderr


# --- explain ---

RULES = """
    kind: grouping
    name: g
    rules:
      - {table: raw_data_package, column: state, operator: eq, value: archived}
      - {table: source, column: name, operator: eq, value: NGC235}
      - any_of:
          - {table: raw_data_package, column: metadata, json_path: band, operator: in, value: [CO, CJ]}
          - {table: raw_data_package, column: size, operator: lt, value: 0}
      - {table: raw_data_package, column: name, operator: neq, value: a}
    """


def test_explain_counts_each_rule_alone_and_together(world: World, cli: Cli) -> None:
    world.register(
        world.package("a", metadata={"band": "CO"}),
        world.package("b", metadata={"band": "CI"}),
        world.package("c"),
        world.package("revoked"),
    )
    cli("revoke", "package", "revoked", "--reason", "a test", "--yes")
    cli("apply", "-f", "-", stdin=dedent(RULES).replace("NGC235", "NGC253"))
    world.pipeline("p", [SCAN], grouping="g")
    (found,) = cli.json("plan", "p", "--explain")
    assert (found["grouping"], found["packages"], found["selected"]) == ("g", 3, 0)
    assert [(r["number"], r["alone"], r["together"]) for r in found["rules"]] == [
        ("1", 3, 3),
        ("2", 3, 3),
        ("3", 1, 1),
        ("3.1", 1, None),
        ("3.2", 0, None),
        ("4", 2, 0),
    ]
    said = cli("plan", "p", "--explain").stdout
    assert "grouping g selects 0 of 3 packages in the catalogue" in said
    assert "each rule matches something, but rules 1 to 4 together match nothing" in said


def test_explain_says_what_a_rule_that_matches_nothing_could_have_meant(world: World, cli: Cli) -> None:
    world.register(world.package("a", metadata={"band": "CI"}), world.package("b", metadata={"band": 7}))
    (found,) = cli.json("plan", "--explain", "-f", "-", stdin=dedent(RULES))
    assert {r["number"]: r["values"] for r in found["rules"] if not r["alone"]} == {
        "2": ["NGC253"],
        "3": [],
        "3.1": ["CI", "7"],
        "3.2": [],
    }
    said = cli("plan", "--explain", "-f", "-", stdin=dedent(RULES)).stdout
    assert "rule 2 matches nothing; packages have: NGC253" in said
    assert "rule 3.2 matches nothing\n" in said
    assert "standard input:3" not in said
    assert cli.json("get", "grouping")[0]["name"] == "everything"
    broken = dedent(RULES).replace("source", "sorce")
    assert "rule 2: unknown table 'sorce'" in cli("plan", "--explain", "-f", "-", stdin=broken, code=2).stderr
    none = json.dumps({"kind": "site", "name": "x"})
    assert "there is no grouping in -" in cli("plan", "--explain", "-f", "-", stdin=none, code=2).stderr


def test_explain_asks_once_for_all_counts(world: World) -> None:
    world.register(world.package("a"))
    rule = {"table": "source", "column": "name", "operator": "eq", "value": "NGC253"}
    asked = []
    with world.store.begin() as tx:
        execute = tx.conn.execute
        tx.conn.execute = lambda *a, **k: asked.append(a) or execute(*a, **k)  # type: ignore[method-assign]
        found = views.explain(tx.conn, "g", [rule] * 20)
    assert [(r.alone, r.together) for r in found.rules] == [(1, 1)] * 20
    assert len(asked) == 1
