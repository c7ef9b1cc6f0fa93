"""Limits and order, through the command line: priority, fair share, limits of pipelines and steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event as sa_event

from tests.harness import World, wait_until
from tests.integration.test_cli import Cli
from wfm.model import Role
from wfm.roles import CANDIDATES
from wfm.service import build

ONE = {"name": "one", "software": "gated", "group_by": ["raw_data_package"]}


@pytest.fixture
def cli(world: World) -> Cli:
    return gated(world)


def gated(world: World) -> Cli:
    """A system whose jobs end when a test lets them, with a grouping for each of the obs units old and new."""
    script = 'until [ -e "$WORKFLOW_ATTEMPT_DIRECTORY/go" ]; do sleep 0.05; done; : > "$WORKFLOW_OUTPUT_DIR/science/x"'
    version = {"version": "1.0.0", "command": ["/bin/sh", "-c", script]}
    world.apply(json.dumps({"kind": "software", "name": "gated", "versions": [version]}))
    for name in ("old", "new"):
        rule = {"table": "obs_unit", "column": "name", "operator": "eq", "value": name}
        world.apply(json.dumps({"kind": "grouping", "name": name, "rules": [rule]}))
    world.environ |= {"WFM_LOCAL_CPU": "64", "WFM_LOCAL_MEMORY_GB": "64"}
    return Cli(world.environ)


def flying(cli: Cli) -> list[dict[str, Any]]:
    return [r for r in cli.json("runs", "list", "--active", "--limit", 1000) if r["state"] == "RUNNING"]


def waits_for(cli: Cli, pipeline: str) -> set[str]:
    found = cli.json("runs", "list", "--pipeline", pipeline, "--state", "PENDING", "--limit", 1000)
    return {r["waiting_for"] for r in found}


def let_end(world: World, *runs: int) -> None:
    for r in world.query("SELECT job FROM run WHERE id = ANY(:ids)", ids=list(runs)):
        (Path(r.job["directory"]) / "go").touch()


def packages(world: World, kind: str, n: int) -> list[Any]:
    return [world.package(f"{kind}{i:02}", obs_unit=kind) for i in range(n)]


def take_place_of(world: World, cli: Cli, run: dict[str, Any]) -> dict[str, Any]:
    """Let a run end; returns the one that takes its slot."""
    before = {r["id"] for r in flying(cli)}
    let_end(world, run["id"])
    wait_until(lambda: {r["id"] for r in flying(cli)} - before and run["id"] not in {r["id"] for r in flying(cli)})
    (after,) = (r for r in flying(cli) if r["id"] not in before)
    return after


def busy(world: World, cli: Cli, slots: int, priority: int = 0) -> list[dict[str, Any]]:
    """All slots taken by a backlog longer than what an admission looks at, and three runs of new data behind it."""
    world.pipeline("backlog", [ONE], grouping="old", priority=priority)
    world.pipeline("tonight", [ONE], grouping="new")
    world.register(*packages(world, "old", 30))
    wait_until(lambda: len(flying(cli)) == slots, what="the backlog is at work")
    world.register(*packages(world, "new", 3))
    wait_until(lambda: waits_for(cli, "tonight") == {f"a free slot: {slots} of {slots} runs are in flight"})
    return flying(cli)


def end_all(cli: Cli) -> None:
    cli("runs", "cancel", *(r["id"] for r in cli.json("runs", "list", "--active", "--limit", 1000)))
    wait_until(lambda: not cli.json("runs", "list", "--active"))


def test_a_backlog_of_equal_priority_delays_new_data_by_one_slot(world, cli, monkeypatch):
    monkeypatch.setattr("wfm.roles.CANDIDATES", 10)
    world.environ["WFM_MAX_IN_FLIGHT"] = "2"
    with world.roles():
        one, two = busy(world, cli, 2)
        new = take_place_of(world, cli, one)
        assert new["pipeline"] == "tonight"
        # From now on each of them has its half.
        assert take_place_of(world, cli, new)["pipeline"] == "tonight"
        assert take_place_of(world, cli, two)["pipeline"] == "backlog"
        end_all(cli)


def test_of_a_single_slot_pipelines_take_turns(world, cli, monkeypatch):
    monkeypatch.setattr("wfm.roles.CANDIDATES", 10)
    world.environ["WFM_MAX_IN_FLIGHT"] = "1"
    with world.roles():
        (last,) = busy(world, cli, 1)
        for expected in ("tonight", "backlog") * 2:
            last = take_place_of(world, cli, last)
            assert last["pipeline"] == expected
        end_all(cli)


def test_new_data_of_higher_priority_has_every_slot_that_frees(world, cli, monkeypatch):
    monkeypatch.setattr("wfm.roles.CANDIDATES", 10)
    world.environ["WFM_MAX_IN_FLIGHT"] = "2"
    with world.roles():
        one, two = busy(world, cli, 2, priority=-1)
        new = [take_place_of(world, cli, old) for old in (one, two)]
        new.append(take_place_of(world, cli, new[0]))
        assert [r["pipeline"] for r in new] == ["tonight"] * 3
        assert take_place_of(world, cli, new[1])["pipeline"] == "backlog"
        end_all(cli)


def test_who_is_at_a_limit_of_its_own_says_so_and_stops_nobody(world, cli):
    two = {**ONE, "name": "two", "max_in_flight": 1}
    world.pipeline("maps", [ONE], grouping="old", priority=9, max_in_flight=2)
    world.pipeline("fits", [ONE, two], grouping="new")
    with world.roles():
        world.register(*packages(world, "old", 5), *packages(world, "new", 2))
        wait_until(lambda: len(flying(cli)) == 5)
        assert waits_for(cli, "maps") == {"pipeline maps may have 2 runs in flight, and has"}
        assert waits_for(cli, "fits") == {"step fits/two may have 1 run in flight, and has"}
        (line, *_) = (w for w in cli.json("why", "maps") if w["active"]["state"] == "PENDING")
        assert "it waits: pipeline maps may have 2 runs in flight, and has" in line["change"]
        # Without the limits all of them are at work.
        world.pipeline("maps", [ONE], grouping="old", priority=9)
        world.pipeline("fits", [ONE, {**two, "max_in_flight": 2}], grouping="new")
        wait_until(lambda: len(flying(cli)) == 9)
        let_end(world, *(r["id"] for r in flying(cli)))
        wait_until(lambda: world.all_covered(9))


def test_a_pipeline_at_its_limit_hides_nobody_however_long_its_backlog(world, cli, monkeypatch):
    monkeypatch.setattr("wfm.roles.CANDIDATES", 4)
    world.pipeline("maps", [ONE], grouping="old", priority=9, max_in_flight=1)
    world.pipeline("fits", [ONE], grouping="new")
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(*packages(world, "old", 20), *packages(world, "new", 2))
        wait_until(lambda: len(cli.json("runs", "list", "--state", "PENDING")) == 22)
    with world.roles():
        wait_until(lambda: {r["pipeline"] for r in flying(cli)} == {"maps", "fits"})
        end_all(cli)


def test_shares_and_limits_are_checked_when_they_are_applied(cli, tmp_path):
    file = tmp_path / "p.yaml"
    step = "{name: one, software: gated, max_in_flight: 0}"
    file.write_text(f"kind: pipeline\nname: p\ngrouping: old\nweight: 0\nmax_in_flight: 1.5\nsteps: [{step}]\n")
    said = cli("apply", "-f", file, code=2).stderr
    assert said.count("error: ") == 3
    assert "p.yaml:4: weight: expected a number above 0 and up to 1000000, got '0'" in said
    assert "p.yaml:5: max_in_flight: expected a whole number from 1 to 1000000" in said
    assert "p.yaml:6: steps[0].max_in_flight: expected a whole number from 1 to 1000000" in said


# --- pauses ---


def test_a_paused_unit_lets_others_pass_until_it_is_resumed(world, cli):
    world.environ["WFM_MAX_IN_FLIGHT"] = "1"
    world.pipeline("maps", [ONE], grouping="old")
    assert "unknown unit 'old01'" in cli("pause", "maps", "old01", code=3).stderr
    with world.roles():
        world.register(*packages(world, "old", 3))
        wait_until(lambda: len(flying(cli)) == 1 and len(waits_for(cli, "maps")) == 1)
        (first,) = flying(cli)
        waiting = cli.json("runs", "list", "--state", "PENDING")
        key = min(r["unit"] for r in waiting)
        name = key[:5]
        assert f"did you mean '{name}'" in cli("pause", "maps", f"{name}x", code=3).stderr
        said = cli("pause", "maps/one", name, "--reason", "bad weather").stdout
        assert said == f"maps/one {key} is paused; `wfm resume maps/one {key}` lets it go on\n"
        next_ = take_place_of(world, cli, first)
        assert next_["unit"] != key
        let_end(world, next_["id"])
        wait_until(lambda: "unit paused by" in "".join(waits_for(cli, "maps")) and not flying(cli))
        (why,) = cli.json("why", "maps", name)
        assert why["change"] == f"`wfm resume maps/one {key}`"
        (paused,) = cli.json("status", code=None)["counts"]["paused"]
        assert (paused["what"], paused["units"], paused["reason"]) == ("units of maps/one", 1, "bad weather")

        # The run gives way to newer input, and the pause stays.
        world.register(world.package(name, "changed", obs_unit="old"))
        wait_until(lambda: cli.json("why", "maps", name)[0]["state"] == "held")
        (why,) = cli.json("why", "maps", name)
        assert (why["why"], why["change"]) == ("paused", f"`wfm resume maps/one {key}`")
        assert why["reason"].endswith(": bad weather")

        assert cli("resume", "maps", name).stdout == f"maps {key} goes on\n"
        wait_until(lambda: len(flying(cli)) == 1)
        let_end(world, *(r["id"] for r in flying(cli)))
        wait_until(lambda: world.all_covered(3))
        assert "was not paused" in cli("resume", "maps", name).stdout
        assert "was not paused" in cli("resume", "maps").stdout
        assert cli.json("status", code=None)["counts"]["paused"] == []


@pytest.mark.parametrize("analyzed", [False, True])
def test_an_admission_reads_the_front_of_a_backlog_only(world, cli, analyzed):
    world.pipeline("maps", [ONE], grouping="old")
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(*packages(world, "old", 1))
        wait_until(world.runs)
    columns = (
        "location_id, pipeline_id, pipeline_name, step_id, step_name, generation, wanted, result, software_version_id,"
        " cpu, memory_gb, state, chart_version"
    )
    with world.store.begin() as tx:
        tx.run(
            "INSERT INTO unit (pipeline_id, dims, key)"
            " SELECT pipeline_id, dims, 'u' || generate_series(1, 20000) FROM unit"
        )
        tx.run(
            "INSERT INTO coverage (step_id, unit_id, state, why) SELECT 1, id, 'active', 'run' FROM unit WHERE id > 1"
        )
        tx.run(
            f"INSERT INTO run (unit_id, {columns})"
            f" SELECT u.id, r.* FROM (SELECT {columns} FROM run) r, unit u WHERE u.id > 1"
        )
        if analyzed:
            tx.run("ANALYZE")
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "front AS" in statement:
            asked.append((statement, parameters))

    work = build(world.settings, Role.WORKFLOW_MANAGER).work
    sa_event.listen(world.store.engine, "before_cursor_execute", note)
    with world.store.begin() as tx:
        assert len(work._candidates(tx, [])) == CANDIDATES
        (statement, parameters), *_ = asked
        plan = tx.conn.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()
    read = [node["Actual Rows"] * node["Actual Loops"] for node in nodes(plan[0]["Plan"]) if node.get("Alias") == "r"]
    assert sum(read) <= CANDIDATES, "the whole backlog was read"


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All nodes of a query plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)
