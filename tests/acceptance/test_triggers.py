"""When gaps become runs: schedules, as people see them on the command line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.harness import World, wait_until
from tests.integration.test_cli import Cli
from wfm.decide import due_times
from wfm.grouping import unit_key
from wfm.model import Role, Schedule

STEPS = [
    {"name": "one", "group_by": ["executed_obs_unit"]},
    {"name": "two", "group_by": [], "depends_on": ["one"]},
]
NEW_YEAR = {"cron": "0 0 1 1 *", "timezone": "America/Santiago"}


@pytest.fixture
def cli(world: World) -> Cli:
    return Cli(world.environ)


def whys(cli: Cli, target: str) -> dict[tuple[str, str], str]:
    """By step and the beginning of the unit's name, why it is as it is."""
    return {(w["step"], w["unit"].split("-")[0]): w["why"] for w in cli.json("why", target)}


def fired(cli: Cli) -> list[dict[str, Any]]:
    return [e["body"] for e in cli.json("events", "list", "--type", "pipeline.fired")["events"]]


# --- CRON ---


def test_between_its_times_a_cron_pipeline_holds_and_says_when_it_is_due(world: World, cli: Cli) -> None:
    world.pipeline("p", STEPS, trigger="CRON", trigger_config=NEW_YEAR)
    with world.roles():
        world.register(world.package("a"))
        held = {("one", "a"): "not_due", ("two", "all"): "waiting_for_upstream"}
        wait_until(lambda: whys(cli, "p") == held)
        wait_until(lambda: world.query("SELECT 1 FROM schedule"))
        world.rest()
    assert cli.json("runs", "list") == []
    year = datetime.now(UTC).year
    (line,) = cli.json("pipelines")
    assert (line["trigger"], line["cron"], line["timezone"], line["fired_for"]) == ("CRON", *NEW_YEAR.values(), None)
    due = list(islice(due_times(Schedule(**NEW_YEAR), datetime.now(UTC)), 3))
    assert [datetime.fromisoformat(t["utc"]) for t in line["next"]] == due
    assert [t["local"] for t in line["next"]] == [f"{year + n}-01-01T00:00:00-03:00" for n in (1, 2, 3)]
    assert f"{year + 1}-01-01T03:00:00Z ({year + 1}-01-01T00:00:00-03:00); " in cli("pipelines", "p").stdout
    (why,) = cli.json("why", "p/one")
    when = f"{year + 1}-01-01 00:00 America/Santiago ({year + 1}-01-01 03:00 UTC)"
    assert why["reason"] == f"not due before {when}, cron 0 0 1 1 *"
    assert why["change"].startswith(f"the next time of its schedule: {when}, ")
    cli("pipelines", "q", code=3)


def test_one_firing_for_all_times_that_were_missed_whoever_sees_them(world: World, cli: Cli) -> None:
    world.pipeline("p", STEPS, trigger="CRON", trigger_config={"cron": "0 0 * * *"})
    world.register(*(world.package(n) for n in "ab"))
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: whys(cli, "p").get(("two", "all")) == "waiting_for_upstream")
        wait_until(lambda: world.query("SELECT 1 FROM schedule"))
    before = world.query("SELECT due_at FROM schedule")[0].due_at
    world.query("UPDATE schedule SET due_at = due_at - interval '3 days' RETURNING 1")
    with world.roles(Role.TRIGGER_MANAGER, copies=3):
        wait_until(lambda: fired(cli))
        with world.roles(Role.WORKFLOW_MANAGER, Role.WORKER, Role.RESULT_MANAGER):
            wait_until(lambda: world.all_covered(3))
            world.register(world.package("c"))
            wait_until(lambda: whys(cli, "p").get(("one", "c")) == "not_due")
            world.rest()
            assert whys(cli, "p")["two", "all"] == "waiting_for_upstream"
    events = fired(cli)
    assert len(events) == 1, "one firing"
    event = events[0]
    assert event["pipeline"] == "p"
    assert event["units"] == 3
    assert datetime.fromisoformat(event["window"]) == before - timedelta(days=3)
    assert datetime.fromisoformat(event["next"]) == before
    assert datetime.fromisoformat(cli.json("pipelines")[0]["fired_for"]) == before - timedelta(days=3)
    due = f"{before - timedelta(days=3):%Y-%m-%d %H:%M} UTC"
    for run in cli.json("runs", "list"):
        reason = cli.json("runs", "show", run["id"])["history"][0]["reason"]
        assert reason == f"no result covers this unit yet; due at {due}"


def test_somebody_may_ask_between_the_times(world: World, cli: Cli) -> None:
    world.pipeline("p", STEPS, trigger="CRON", trigger_config=NEW_YEAR)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: whys(cli, "p").get(("one", "a")) == "not_due")
        cli("trigger", "p", "--reason", "referee wants it")
        wait_until(lambda: world.all_covered(2))
        world.rest()
    run = cli.json("runs", "list", "--step", "two")[0]
    reason = cli.json("runs", "show", run["id"])["history"][0]["reason"]
    assert reason.startswith("no result covers this unit yet; asked for by user:")
    assert reason.endswith(": referee wants it")
    assert fired(cli) == []


def test_a_schedule_counts_from_when_it_is_given_and_only_while_it_is_enabled(world: World, cli: Cli) -> None:
    def due() -> Any:
        return [r.due_at for r in world.query("SELECT due_at FROM schedule")]

    world.pipeline("p", STEPS, trigger="CRON", trigger_config={"cron": "0 0 * * *"})
    world.register(world.package("a"))
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(due)
        cli("disable", "p")
        wait_until(lambda: not due())
        assert cli.json("pipelines")[0]["next"] == []
        cli("enable", "p")
        wait_until(due)
        (first,) = due()
        world.query("UPDATE schedule SET due_at = due_at - interval '1 hour' RETURNING 1")
        world.pipeline("p", STEPS, trigger="CRON", trigger_config={"cron": "0 0 * * *", "timezone": "Asia/Tokyo"})
        wait_until(lambda: due() not in ([first], [first - timedelta(hours=1)]))
        world.pipeline("p", STEPS)
        wait_until(lambda: not due())
        wait_until(lambda: world.states()["one", "PENDING"] == 1)
    assert fired(cli) == []


def test_faults_of_schedules_come_together(world: World, cli: Cli) -> None:
    steps = "grouping: everything\nsteps: [{name: a, software: copy}]\n"
    cron = {
        "twice": "trigger: CRON\ntrigger_config:\n  cron: 0 25 * * *\n  timezone: America/Santigo",
        "none": "trigger: CRON",
        "manual": "trigger: MANUAL\ntrigger_config:\n  cron: 0 6 * * *",
        "slip": "trigger: CRON\ntrigger_config:\n  cron: 0 6 * * *\n  zone: UTC",
    }
    text = "---\n".join(f"kind: pipeline\nname: {name}\n{more}\n{steps}" for name, more in cron.items())
    said = cli("apply", "-f", "-", stdin=text, code=2).output.splitlines()
    assert [line.split("input:", 1)[1] for line in said if "standard input:" in line] == [
        "5: trigger_config: cron '0 25 * * *' is not a cron expression: bad hour",
        "6: trigger_config: timezone 'America/Santigo' is not a time zone, did you mean 'America/Santiago'?",
        '12: trigger: CRON needs a cron expression: trigger_config: {cron: "0 6 * * *", timezone: America/Santiago}',
        "20: trigger_config: cron belongs to trigger: CRON, and this one is MANUAL",
        "29: trigger_config: unknown key 'zone', did you mean 'timezone'?; allowed: cron, timezone",
    ]


# --- cooldown and settle ---


ALL = [{"name": "map", "group_by": []}]
HOUR = 3600


def pending(world: World) -> int:
    return world.states()["map", "PENDING"]


def reasons(cli: Cli) -> list[str]:
    """Why each run was made, the oldest first."""
    runs = sorted(r["id"] for r in cli.json("runs", "list"))
    return [cli.json("runs", "show", i)["history"][0]["reason"] for i in runs]


def hours_pass(world: World, table: str, column: str, hours: int) -> None:
    """As if something had happened earlier; and whoever waits for a time looks now."""
    world.query(f"UPDATE {table} SET {column} = {column} - interval '{hours} hours' RETURNING 1")
    world.query("UPDATE coverage SET due_at = now() WHERE due_at IS NOT NULL RETURNING 1")


def test_a_unit_runs_when_what_it_reads_has_been_quiet(world: World, cli: Cli) -> None:
    world.pipeline("p", [{**ALL[0], "settle_seconds": HOUR}])
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "settling"})
        world.query("UPDATE coverage SET wanted_since = wanted_since - interval '1 hour' RETURNING 1")
        world.register(world.package("b"))
        wait_until(lambda: world.query("SELECT members FROM unit")[0].members == 2)
        hours_pass(world, "coverage", "wanted_since", 0)
        wait_until(lambda: world.query("SELECT 1 FROM coverage WHERE due_at > now() OR due_at IS NULL"))
        assert pending(world) == 0
        (why,) = cli.json("why", "p")
        assert why["reason"] == "until its input is quiet for 3600 s, 36000 s at most"
        assert why["change"].startswith("it runs at 20")
        hours_pass(world, "coverage", "wanted_since", 1)
        wait_until(lambda: pending(world) == 1)
    assert reasons(cli) == ["no result covers this unit yet"]


def test_endless_arrivals_do_not_keep_a_unit_from_running(world: World, cli: Cli) -> None:
    world.pipeline("p", [{**ALL[0], "settle_seconds": HOUR, "settle_at_most_seconds": 2 * HOUR}])
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "settling"})
        hours_pass(world, "coverage", "settling_since", 1)
        world.register(world.package("b"))
        wait_until(lambda: world.query("SELECT members FROM unit")[0].members == 2)
        assert pending(world) == 0
        hours_pass(world, "coverage", "settling_since", 1)
        wait_until(lambda: pending(world) == 1)
        # what comes now has a wait of its own
        world.register(world.package("c"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "settling"})
    assert world.states() == {("map", "CANCELLED"): 1}


def test_the_cause_names_all_that_changed_since_the_last_result(world: World, cli: Cli) -> None:
    world.config("c", level=1)
    world.pipeline("p", [{**ALL[0], "config": "c"}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        world.rest()
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("b"))
        wait_until(lambda: pending(world) == 1)
        command = f"[python, {world.program}]"
        world.apply(f"{{kind: software, name: copy, versions: [{{version: 1.4.0, command: {command}}}]}}")
        wait_until(lambda: len(world.runs()) == 3)
        world.config("c", level=2)
        wait_until(lambda: len(world.runs()) == 4)
    assert reasons(cli) == [
        "no result covers this unit yet",
        "stale: newer input",
        "stale: newer input; copy 1.4.0 is wanted now",
        "stale: newer input; copy 1.4.0 is wanted now; the config has a newer revision",
    ]


def test_a_cooldown_counts_from_runs_that_had_a_chance(world: World, cli: Cli) -> None:
    world.pipeline("p", [{**ALL[0], "cooldown_seconds": HOUR}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        world.rest()
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("b"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "cooling_down"})
        assert cli.json("why", "p")[0]["change"].startswith("a new run may start at 20")
        hours_pass(world, "run", "created_at", 1)
        wait_until(lambda: pending(world) == 1)
        world.register(world.package("c"))
        wait_until(lambda: len(world.runs()) == 3)
        assert pending(world) == 1
    assert reasons(cli)[1:] == ["stale: newer input"] * 2


def test_what_was_asked_for_is_not_forgotten_when_newer_input_comes_before_it_starts(world: World, cli: Cli) -> None:
    world.pipeline("p", ALL, trigger="MANUAL")
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "manual_only"})
        cli("trigger", "p", "--reason", "for the referee")
        wait_until(lambda: pending(world) == 1)
        world.register(world.package("b"))
        wait_until(lambda: len(world.runs()) == 2)
        cli("pause", "p")
        world.register(world.package("c"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "paused"})
        cli("resume", "p")
        wait_until(lambda: len(world.runs()) == 3)
    assert all(reason.endswith(": for the referee") for reason in reasons(cli))
    with world.roles():
        wait_until(lambda: world.all_covered(1))
        world.register(world.package("d"))
        wait_until(lambda: whys(cli, "p") == {("map", "all"): "manual_only"})


# --- fan-in ---


SCANS_AND_MAP = [
    {"name": "scan", "group_by": ["executed_obs_unit"], "config": "c"},
    {"name": "map", "group_by": [], "depends_on": ["scan"], "fan_in": "any"},
]


def key(name: str) -> str:
    return unit_key({"executed_obs_unit": name})


def read_by_map(world: World, cli: Cli) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest run of the map, and its manifest."""
    run = cli.json("runs", "show", cli.json("runs", "list", "--step", "map")[0]["id"])
    return run, json.loads((Path(run["job"]["directory"]) / "config/manifest.json").read_text())


def test_a_map_of_any_scans_says_which_are_missing_and_is_made_again_when_they_come(world: World, cli: Cli) -> None:
    world.config("c", exit_for=[key("b"), key("d")])
    world.pipeline("p", SCANS_AND_MAP)
    with world.roles():
        world.register(*(world.package(n) for n in "abc"))
        done = {("scan", "a"): "covered", ("scan", "b"): "failed", ("scan", "c"): "covered", ("map", "all"): "covered"}
        wait_until(lambda: whys(cli, "p") == done)
        world.rest()
    run, manifest = read_by_map(world, cli)
    assert manifest["upstream"] == [{"step": "scan", "units": 3, "read": 2, "missing": [key("b")]}]
    assert [p["unit"] for p in manifest["input_products"]] == [key("a"), key("c")]
    assert run["partial"] == manifest["upstream"]
    assert f" 1 of 3 units of scan: {key('b')}\n" in cli("runs", "show", run["id"]).stdout
    (why,) = cli.json("why", "p/map")
    assert why["reason"] == f"run {run['id']} without 1 of 3 units of scan"

    with world.roles():
        world.register(world.package("d"))
        wait_until(lambda: whys(cli, "p").get(("scan", "d")) == "failed")
        wait_until(lambda: "without 2 of 4" in cli.json("why", "p/map")[0]["reason"])
        world.rest()
    assert read_by_map(world, cli)[0]["id"] == run["id"], "data without a result is no reason to run"

    world.config("c", exit_for=[])
    with world.roles():
        wait_until(lambda: world.all_covered(5))
        wait_until(lambda: cli.json("why", "p/map")[0]["reason"] == f"run {read_by_map(world, cli)[0]['id']}")
        world.rest()
    run, manifest = read_by_map(world, cli)
    assert manifest["upstream"] == [{"step": "scan", "units": 4, "read": 4, "missing": []}]
    assert len(manifest["input_products"]) == 4
    assert run["history"][0]["reason"] == "stale: newer input"


def test_many_scans_make_one_map_when_it_settles(world: World, cli: Cli) -> None:
    world.config("c")
    world.pipeline("p", [SCANS_AND_MAP[0], {**SCANS_AND_MAP[1], "settle_seconds": HOUR}])
    with world.roles():
        for n in "abcd":
            world.register(world.package(n))
        wait_until(lambda: world.states()["scan", "COMPLETED"] == 4)
        wait_until(lambda: whys(cli, "p")["map", "all"] == "settling")
        world.rest()
        hours_pass(world, "coverage", "wanted_since", 1)
        wait_until(lambda: world.all_covered(5))
    assert world.states() == {("scan", "COMPLETED"): 4, ("map", "COMPLETED"): 1}
    assert len(read_by_map(world, cli)[1]["input_products"]) == 4


def test_a_whole_map_is_not_replaced_by_a_part_while_scans_are_made_again(world: World, cli: Cli) -> None:
    world.config("c", version=1)
    world.pipeline("p", SCANS_AND_MAP)
    with world.roles():
        world.register(*(world.package(n) for n in "abc"))
        wait_until(lambda: world.all_covered(4))
        world.rest()
        before = world.states()["map", "COMPLETED"]
        world.config("c", version=2)
        wait_until(lambda: world.states()["scan", "COMPLETED"] == 6)
        wait_until(lambda: world.all_covered(4))
        world.rest()
    assert world.states()["map", "COMPLETED"] == before + 1
    assert read_by_map(world, cli)[0]["partial"] == [{"step": "scan", "units": 3, "read": 3, "missing": []}]


def test_what_a_map_reads_is_checked_against_what_it_was_made_for(world: World, cli: Cli) -> None:
    world.config("c")
    world.pipeline("p", SCANS_AND_MAP)
    cli("pause", "p/map")
    with world.roles():
        world.register(*(world.package(n) for n in "ab"))
        wait_until(lambda: world.states()["scan", "COMPLETED"] == 2)
        wait_until(lambda: whys(cli, "p")["map", "all"] == "paused")
        world.rest()
    cli("resume", "p/map")
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: pending(world) == 1)
    world.query(
        "UPDATE coverage SET state = 'waiting' WHERE unit_id = (SELECT id FROM unit WHERE key = :key) RETURNING 1",
        key=key("a"),
    )
    with world.roles(Role.WORKFLOW_MANAGER):
        wait_until(lambda: world.states()["map", "CANCELLED"] == 1)
    (run,) = cli.json("runs", "list", "--step", "map")
    assert run["message"] == "its inputs, or its pipeline, changed before it was built"
