"""What the observing plan expects, and what is absent, through the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from tests.harness import wait_until
from tests.integration.test_cli import Cli
from wfm.model import Role
from wfm.roles import TriggerManager

NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def planned(cli, name, start, end, **more):
    document = {"kind": "scheduled_observation", "name": name, "obs_unit": "unit", **more}
    document |= {"planned_start": start.isoformat(), "planned_end": end.isoformat()}
    return cli("apply", "-f", "-", stdin="kind: obs_unit\nname: unit\nsource: NGC253\n---\n" + json.dumps(document))


@pytest.fixture(autouse=True)
def catalogue(cli):
    cli(
        *("apply", "-f", "-"),
        stdin="kind: source\nname: NGC253\n---\nkind: instrument\nname: cam\n---\n"
        "kind: module\nname: mod1\ninstrument: cam\n---\nkind: module\nname: mod2\ninstrument: cam\n",
    )


def observed(world, name, at=None, scheduled=None, **more):
    package = world.package(name, **more)
    seen = msgspec.structs.replace(package.executed_obs_unit, started_at=at, scheduled=scheduled)
    return msgspec.structs.replace(package, executed_obs_unit=seen)


def states(cli):
    return {o["name"]: (o["state"], o["executed_by"], o["missing"]) for o in cli.json("data", "plan")}


def notice(world):
    world.act(lambda tx: TriggerManager(world.settings).notice_absence(tx))


def told(cli, *types):
    return [
        (e["type"], e["body"].get("module") or e["body"]["scheduled_observation"])
        for t in types
        for e in cli.json("events", "list", "--type", t)["events"]
    ]


def test_what_was_planned_is_found_by_name_or_by_time(world, cli):
    planned(cli, "by-time", NOW - 3 * HOUR, NOW - 2 * HOUR)
    planned(cli, "by-name", NOW - 3 * HOUR, NOW - 2 * HOUR, modules=["mod1", "mod2"])
    planned(cli, "to-come", NOW + HOUR, NOW + 2 * HOUR)
    planned(cli, "nothing", NOW - 30 * HOUR, NOW - 29 * HOUR)
    assert states(cli)["nothing"] == ("late", [], [])
    world.register(
        observed(world, "a", NOW - 2.5 * HOUR),
        observed(world, "b", NOW - 9 * HOUR, scheduled="by-name"),
        observed(world, "c", NOW - 2 * HOUR),  # after its end
    )
    assert states(cli) == {
        "nothing": ("late", [], []),
        "by-name": ("planned", ["b"], ["mod2"]),
        "by-time": ("executed", ["a"], []),
        "to-come": ("planned", [], []),
    }
    second = observed(world, "b2", None)
    second = msgspec.structs.replace(
        second, module="mod2", executed_obs_unit=msgspec.structs.replace(second.executed_obs_unit, name="b")
    )
    world.register(second)
    assert states(cli)["by-name"] == ("executed", ["b"], [])
    said = cli("data", "plan", "--since", "1d").stdout
    assert "by-time" in said
    assert "nothing" not in said


def test_applying_the_same_plan_changes_nothing_and_loss_stays(cli):
    planned(cli, "o", NOW, NOW + HOUR)
    cli("data", "lost", "o", "--reason", "dome was closed")
    assert "unchanged" in planned(cli, "o", NOW, NOW + HOUR).stdout
    assert states(cli)["o"][0] == "lost"
    assert "dome was closed" in cli("data", "plan").stdout
    assert told(cli, "observation.lost") == [("observation.lost", "o")]
    (document,) = cli.json("get", "scheduled_observation", "o")
    assert document["state"] == "lost"
    assert "updated" in planned(cli, "o", NOW, NOW + HOUR, state="planned").stdout
    assert states(cli)["o"][0] == "planned"
    cli("delete", "scheduled_observation", "o")


def test_faults_of_a_plan(cli):
    document = {"kind": "scheduled_observation", "name": "o", "obs_unit": "unti", "modules": ["mod1", "mod3"]}
    document |= {"planned_start": NOW.isoformat(), "planned_end": NOW.isoformat()}
    said = cli("apply", "-f", "-", stdin="kind: obs_unit\nname: unit\n---\n" + json.dumps(document), code=2).stderr
    assert "did you mean 'unit'" in said
    assert "unknown module 'mod3'" in said
    assert "does not lie after planned_start" in said
    said = cli("data", "lost", "a", "b", "--reason", "x", code=3).stderr
    assert "'a'" in said
    assert "'b'" in said


def test_a_night_is_not_certified_while_a_planned_observation_is_missing(world, cli):
    start = datetime(2026, 3, 1, 22, tzinfo=UTC)
    planned(cli, "o", start, start + HOUR)
    found = cli.json("coverage", "report", "2026-03-01", code=1)
    assert [(o["name"], o["state"]) for o in found["planned"]] == [("o", "late")]
    assert "1 planned observation missing" in cli("coverage", "report", "2026-03-01", code=1).stdout
    assert cli.json("coverage", "report", "2026-03-02")["planned"] == []
    cli("data", "lost", "o", "--reason", "clouds")
    assert cli.json("coverage", "report", "2026-03-01")["planned"] == []


def test_absence_is_told_once_for_all_copies_and_so_is_its_end(world, cli):
    cli("apply", "-f", "-", stdin="kind: module\nname: mod1\ninstrument: cam\nexpect_every_hours: 2\n")
    planned(cli, "o", NOW - 9 * HOUR, NOW - 8 * HOUR, late_after_hours=1)
    planned(cli, "may-come", NOW - 9 * HOUR, NOW - 8 * HOUR)
    world.register(observed(world, "a"))
    notice(world)
    assert told(cli, "data.absent") == [("data.absent", "o")]
    with world.store.begin() as tx:  # time passes
        tx.run("UPDATE raw_data_package SET registered_at = now() - interval '3 h'")
    with world.roles(Role.TRIGGER_MANAGER, copies=3):
        wait_until(lambda: len(told(cli, "data.absent")) == 2)
        notice(world)
    assert sorted(told(cli, "data.absent")) == [("data.absent", "mod1"), ("data.absent", "o")]
    assert told(cli, "data.back") == []
    absent = cli.json("status", code=1)["absent"]
    assert [a["reason"] for a in absent] == [
        "scheduled observation o was not carried out within 1 h after its planned end",
        "no data from module mod1 for more than 2 h",
    ]
    assert "no data from module mod1" in cli("status", code=1).stdout
    world.register(observed(world, "b", NOW - 8.5 * HOUR))
    notice(world)
    notice(world)
    assert sorted(told(cli, "data.back")) == [("data.back", "mod1"), ("data.back", "o")]
    assert cli.json("status", code=1)["absent"] == []
    # The next time is another absence.
    with world.store.begin() as tx:
        tx.run("UPDATE raw_data_package SET registered_at = now() - interval '3 h'")
    notice(world)
    assert len(told(cli, "data.absent")) == 3


def test_what_is_lost_is_no_absence(world, cli):
    planned(cli, "o", NOW - 9 * HOUR, NOW - 8 * HOUR, late_after_hours=1)
    notice(world)
    cli("data", "lost", "o", "--reason", "clouds")
    notice(world)
    assert told(cli, "data.absent", "data.back") == [("data.absent", "o"), ("data.back", "o")]


# --- fan-in: complete ---

MAP = {"name": "map", "group_by": ["source", "line"], "fan_in": "complete", "fan_in_deadline_hours": 24}


def coverage(cli, target="p/map"):
    return {w["unit"].rsplit("-", 1)[0]: (w["state"], w["why"], w["reason"]) for w in cli.json("why", target)}


def test_a_unit_waits_for_what_is_planned_until_it_came_or_is_lost(world, cli):
    scan = {"name": "scan", "group_by": ["executed_obs_unit"]}
    world.pipeline("p", [scan, {**MAP, "group_by": ["source"], "depends_on": ["scan"]}])
    for name, hours in (("one", 5), ("two", 4), ("three", 3)):
        planned(cli, name, NOW - hours * HOUR, NOW - (hours - 1) * HOUR)
    cli("apply", "-f", "-", stdin="kind: obs_unit\nname: elsewhere\n")
    planned(cli, "other-source", NOW - 5 * HOUR, NOW - 4 * HOUR, obs_unit="elsewhere")
    with world.roles():
        world.register(observed(world, "a", NOW - 4.5 * HOUR))
        wait_until(
            lambda: coverage(cli).get("ngc253", ("",))[0] == "waiting" and coverage(cli, "p/scan")["a"][0] == "covered"
        )
        wait_until(lambda: coverage(cli)["ngc253"][1] == "group_not_complete")
        reason = coverage(cli)["ngc253"][2]
        deadline = f"{NOW - 2 * HOUR + timedelta(hours=24):%Y-%m-%d %H:%M} UTC"
        assert reason == (
            "2 of 3 scheduled observations have not arrived: three, two; runs without them from " + deadline + " on"
        )
        assert "wfm data lost" in cli("why", "p/map").stdout
        world.register(observed(world, "b", NOW - 3.5 * HOUR))
        wait_until(lambda: coverage(cli)["ngc253"][2].startswith("1 of 3"))
        assert world.states()["map", "COMPLETED"] == 0
        cli("data", "lost", "three", "--reason", "clouds")
        wait_until(lambda: coverage(cli)["ngc253"][0] == "covered")
        world.rest()
    assert world.states()["map", "COMPLETED"] == 1
    assert "without" not in coverage(cli)["ngc253"][2]


def test_after_the_deadline_it_runs_with_what_is_there_and_says_what_is_missing(world, cli):
    world.pipeline("p", [MAP])
    planned(cli, "one", NOW - 5 * HOUR, NOW - 4 * HOUR)
    planned(cli, "two", NOW - 4 * HOUR, NOW - 3 * HOUR)
    with world.roles():
        world.register(observed(world, "a", NOW - 4.5 * HOUR))
        wait_until(lambda: coverage(cli).get("ngc253", ("", ""))[1] == "group_not_complete")
        (due,) = world.query("SELECT due_at > now() + interval '200 s' AS later FROM coverage")
        assert due.later
        world.pipeline("p", [{**MAP, "fan_in_deadline_hours": 2}])
        wait_until(lambda: coverage(cli)["ngc253"][0] == "covered")
        world.rest()
        (run,) = world.runs()
        assert coverage(cli)["ngc253"][2] == f"run {run.id}, without two"
        assert "without two" in cli("runs", "show", run.id).stdout
        manifest = json.loads((world.directory / run.job["directory"] / "config" / "manifest.json").read_text())
        assert manifest["missing_observations"] == ["two"]
        # It comes after all: newer input, as ever.
        world.register(observed(world, "b", NOW - 3.5 * HOUR))
        wait_until(lambda: world.states()["map", "COMPLETED"] == 2)
        wait_until(lambda: coverage(cli)["ngc253"][0] == "covered")
    assert "without" not in coverage(cli)["ngc253"][2]


def test_a_planned_observation_falls_into_units_by_its_values_and_the_rules(world, cli):
    rules = [
        {"table": "obs_unit", "column": "line", "operator": "neq", "value": "CI"},
        {"table": "raw_data_package", "column": "size", "operator": "gt", "value": 0},
    ]
    world.apply(json.dumps({"kind": "grouping", "name": "not-ci", "rules": rules}))
    step = {**MAP, "group_by": ["source", "instrument_module"]}
    world.pipeline("p", [step], grouping="not-ci")
    cli("apply", "-f", "-", stdin="kind: obs_unit\nname: ci\nsource: NGC253\nline: CI\n")
    planned(cli, "one", NOW - 2 * HOUR, NOW - HOUR, modules=["mod1"])
    planned(cli, "second-module", NOW - 3 * HOUR, NOW - 2 * HOUR, modules=["mod2"])
    planned(cli, "any-module", NOW - 4 * HOUR, NOW - 3 * HOUR)
    planned(cli, "other-line", NOW - 4 * HOUR, NOW - 3 * HOUR, obs_unit="ci")
    world.register(observed(world, "a", NOW - 1.5 * HOUR))
    world.act(lambda tx: TriggerManager(world.settings).handle(tx, []))
    ((_, _, reason),) = coverage(cli).values()
    assert reason.startswith("1 of 2 scheduled observations have not arrived: any-module;")


def test_what_complete_needs(world, cli):
    steps = [
        {**MAP, "name": "a", "fan_in_deadline_hours": None},
        {**MAP, "name": "b", "fan_in": "all"},
        {**MAP, "name": "c", "group_by": ["raw_data_package"]},
    ]
    document = {"kind": "pipeline", "name": "p", "grouping": "everything"}
    document["steps"] = [{"software": "copy", "version": "1.0.0", **s} for s in steps]
    said = cli("apply", "-f", "-", stdin=json.dumps(document), code=2).stderr
    assert said.count("only together") == 2
    assert "the observing plan says nothing of raw_data_package" in said
