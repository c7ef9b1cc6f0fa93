"""`wfm backfill`, through the command line, with real roles and real jobs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from msgspec import structs

from tests.harness import World, wait_until
from tests.integration.test_cli import Cli
from tests.integration.test_limits import flying, gated, let_end, take_place_of, waits_for
from wfm.backfill import feeder
from wfm.model import Role

COPY = [{"name": "one", "group_by": ["raw_data_package"]}]
TWO = [*COPY, {"name": "two", "depends_on": ["one"], "group_by": []}]
GATED = [{"name": "one", "software": "gated", "group_by": ["raw_data_package"]}]


@pytest.fixture
def cli(world: World) -> Cli:
    return gated(world)


def observed(world: World, n: int, first: int = 1) -> None:
    """Packages a01, a02, ..., each observed on that day of a month."""
    made = [world.package(f"a{day:02}") for day in range(first, first + n)]
    world.register(
        *(
            structs.replace(
                p, executed_obs_unit=structs.replace(p.executed_obs_unit, started_at=datetime(2026, 1, day, tzinfo=UTC))
            )
            for day, p in enumerate(made, first)
        )
    )


def known(world: World, units: int) -> None:
    wait_until(lambda: len(world.coverage()) == units and {c.state for c in world.coverage().values()} != {"waiting"})


def begin(cli: Cli, *words: object) -> str:
    return cli.json("backfill", *words, "--yes")["name"]


def status(cli: Cli, name: str) -> Any:
    (found,) = cli.json("backfill", "status", name)
    return found


def watch(cli: Cli, name: str, code: int = 0) -> Any:
    said = cli("backfill", "status", name, "--watch", code=code).stdout
    assert said.splitlines()[-1].startswith(f"{name} is done: ")
    return status(cli, name)


def in_turn(world: World, trigger: str = "build") -> list[str]:
    """The first three letters of units, in the order in which their runs made a move."""
    return [
        r.unit
        for r in world.query(
            "SELECT left(u.key, 3) AS unit FROM transition t JOIN run r ON r.id = t.run_id"
            " JOIN unit u ON u.id = r.unit_id WHERE t.trigger = :trigger ORDER BY t.at, r.id",
            trigger=trigger,
        )
    ]


def test_what_is_missing_is_run_in_its_order_within_its_limit(world, cli):
    world.pipeline("p", TWO, trigger="MANUAL", priority=3)
    with world.roles():
        observed(world, 5)
        known(world, 6)
        found = cli.json("backfill", "p", "--missing", "--dry-run")
        assert found["name"] is None
        assert {s["step"]: (s["units"], s["core_hours"]) for s in found["preview"]["steps"]} == {
            "one": (5, None),
            "two": (1, None),
        }
        assert not world.runs()
        assert "begin it?" in cli("backfill", "p", "--missing", code=1, stdin="n\n").stdout
        assert not cli.json("backfill", "status")

        name = begin(cli, "p", "--missing", "--order", "newest", "--limit", 1, "--reason", "a new season")
        done = watch(cli, name)
        assert (done["state"], done["units"], done["done"]) == ("done", 6, 6)
        assert world.all_covered(6)
        assert in_turn(world) == ["a05", "a04", "a03", "a02", "a01", "all"]
        assert {(r.priority, r.attempt) for r in world.runs()} == {(2, 1)}
        # One at a time: nobody was admitted before the job of the one before him had ended.
        moves = world.query(
            "SELECT trigger FROM transition WHERE trigger IN ('build', 'finish') ORDER BY at, trigger DESC"
        )
        assert [m.trigger for m in moves] == ["build", "finish"] * 6
        (reason,) = {r.reason for r in world.query("SELECT reason FROM transition WHERE trigger = 'create'")}
        assert reason == f"no result covers this unit yet; backfill {name}"
        said = cli("backfill", "p", "--missing").stdout
        assert said == "nothing of p is missing\n"
        world.check()


def test_a_range_and_a_pattern_choose_units(world, cli):
    world.pipeline("p", COPY, trigger="MANUAL")
    with world.roles(Role.TRIGGER_MANAGER):
        observed(world, 9)
        known(world, 9)

    def units(*words: object) -> int:
        found = cli.json("backfill", "p/one", "--missing", "--dry-run", *words)["preview"]["steps"]
        return sum(s["units"] for s in found)

    assert units() == 9
    assert units("--since", "2026-01-03T00:00") == 7
    assert units("--since", "2026-01-03T00:00", "--until", "2026-01-05T00:00") == 2
    assert units("--units", "a0[3]") == 0
    assert units("--units", "A0?") == 9
    assert units("--units", "*4") == 1
    assert units("--units", "a0?", "--until", "2026-01-02T00:00") == 1


def test_it_is_paused_resumed_and_cancelled_and_survives_a_restart(world, cli):
    world.pipeline("p", GATED, trigger="MANUAL")
    with world.roles():
        observed(world, 7)
        known(world, 7)
        name = begin(cli, "p", "--missing", "--limit", 2, "--name", "winter")
        assert (
            "there is a backfill 'winter' already"
            in cli("backfill", "p", "--missing", "--name", "winter", "--yes", code=1).stderr
        )
        wait_until(lambda: len(flying(cli)) == 2)
        wait_until(lambda: waits_for(cli, "p") == {"backfill winter may have 2 runs in flight, and has"})
        cli("backfill", "pause", name, "--reason", "slow archive")
        let_end(world, *(r["id"] for r in flying(cli)))
        wait_until(lambda: status(cli, name)["done"] == 2)
        wait_until(lambda: [w[:22] for w in waits_for(cli, "p")] == ["backfill winter paused"])
        assert not flying(cli)
        waiting = cli.json("runs", "list", "--state", "PENDING")[0]["unit"]
        assert cli.json("why", "p", waiting)[0]["change"] == "`wfm backfill resume winter`"
        assert [p["what"] for p in cli.json("status", code=None)["counts"]["paused"]] == ["backfill winter"]
    with world.roles():
        cli("backfill", "resume", name)
        wait_until(lambda: len(flying(cli)) == 2)
        wait_until(lambda: status(cli, name)["pending"] == 2)
        cli("backfill", "cancel", name)
        assert len(cli.json("runs", "list", "--active")) == 2, "what has no slot is withdrawn at once"
        let_end(world, *(r["id"] for r in flying(cli)))
        wait_until(lambda: not cli.json("runs", "list", "--active"))
        seen = status(cli, name)
        assert (seen["state"], seen["waiting"], seen["skipped"]) == ("cancelled", 1, 2)
        assert "is cancelled" in cli("backfill", "resume", name, code=1).stderr
        wait_until(lambda: {c.why for c in world.coverage().values()} == {"covered", "manual_only"})
        assert cli.json("backfill", "p", "--missing", "--dry-run")["preview"]["steps"][0]["units"] == 3
        name = begin(cli, "p", "--missing", "--limit", 1)
        cli("backfill", "pause", name)
        cli("runs", "cancel", "--pipeline", "p")
        wait_until(lambda: not cli.json("runs", "list", "--active"))
        cli("delete", "pipeline", "p")
        assert status(cli, name)["state"] == "cancelled"
    assert set(world.executions().values()) <= {1}


def test_what_failed_has_another_attempt(world, cli, tmp_path):
    flag = tmp_path / "broken"
    flag.touch()
    script = f'[ -e {flag} ] && exit 3; : > "$WORKFLOW_OUTPUT_DIR/science/x"'
    world.apply(
        f"""
        kind: software
        name: shaky
        versions:
          - version: 1.0.0
            command: [/bin/sh, -c, '{script}']
        """
    )
    world.pipeline("p", [{**COPY[0], "software": "shaky"}])
    with world.roles():
        observed(world, 3)
        wait_until(lambda: [c.state for c in world.coverage().values()] == ["blocked"] * 3)
        before = {r.id for r in world.runs()}
        name = begin(cli, "p", "--failed")
        seen = watch(cli, name, code=1)
        assert (seen["failed"], seen["notes"][0]["units"]) == (3, 1)
        flag.unlink()
        seen = watch(cli, begin(cli, "p", "--failed", "--limit", 1))
        assert (seen["done"], seen["failed"]) == (3, 0)
    assert {(r.id, r.attempt, r.state) for r in world.runs()} == {(i, 3, "COMPLETED") for i in before}


def test_what_is_stale_is_run_and_what_is_covered_is_done_again(world, cli):
    world.config("c", a=1)
    steps = [{**s, "config": "c"} for s in TWO]
    world.pipeline("p", steps, trigger="MANUAL")
    with world.roles():
        observed(world, 3)
        known(world, 4)
        watch(cli, begin(cli, "p", "--missing"))
        assert cli("backfill", "p", "--stale").stdout == "nothing of p is stale\n"
        found = cli.json("backfill", "p", "--all", "--dry-run")["preview"]
        assert sum(s["units"] for s in found["steps"]) == 4
        assert found["cost"]["core_hours"] > 0

        world.config("c", a=2)
        wait_until(lambda: {c.state for c in world.coverage().values()} == {"held", "waiting"})
        assert cli("backfill", "p", "--missing").stdout == "nothing of p is missing\n"
        seen = watch(cli, begin(cli, "p", "--stale"))
        assert (seen["units"], seen["done"]) == (4, 4)
        assert len(world.runs()) == 8
        world.check()

        name = begin(cli, "p", "--all", "--limit", 2)
        assert watch(cli, name)["done"] == 4
        assert world.all_covered(4)
    runs = world.runs()
    assert [r.attempt for r in runs] == [1, 1, 1, 1, 2, 2, 2, 2]
    # What reads others is done again after them.
    again = world.query(
        "SELECT s.name AS step, t.trigger FROM transition t JOIN run r ON r.id = t.run_id"
        " JOIN reduction_step s ON s.id = r.step_id WHERE t.attempt = 2 AND t.trigger IN ('redrive', 'collect')"
        " ORDER BY t.at, t.trigger"
    )
    assert [(r.step, r.trigger) for r in again[-2:]] == [("two", "redrive"), ("two", "collect")]


def test_a_run_that_is_on_its_way_is_not_doubled(world, cli):
    world.pipeline("p", COPY, trigger="MANUAL")
    with world.roles(Role.TRIGGER_MANAGER):
        observed(world, 4)
        known(world, 4)
    name = begin(cli, "p", "--missing")
    cli("trigger", "p")
    with world.roles(copies=2):
        assert watch(cli, name)["done"] == 4
        world.check()
    assert len(world.runs()) == 4
    assert set(world.executions().values()) == {1}


def test_new_data_goes_before_a_backfill_of_its_own_pipeline(world, cli):
    world.environ["WFM_MAX_IN_FLIGHT"] = "2"
    world.pipeline("p", GATED, trigger="MANUAL")
    with world.roles():
        observed(world, 9)
        known(world, 9)
        begin(cli, "p", "--missing")
        wait_until(lambda: len(flying(cli)) == 2)
        world.pipeline("p", GATED)  # from now on what comes runs by itself
        observed(world, 1, first=20)
        wait_until(lambda: [r for r in cli.json("runs", "list", "--state", "PENDING") if r["unit"].startswith("a20")])
        assert take_place_of(world, cli, flying(cli)[0])["unit"].startswith("a20")
        cli("runs", "cancel", "--pipeline", "p")
        wait_until(lambda: not cli.json("runs", "list", "--active"))


def test_what_does_not_go_together_is_said_at_once(world, cli):
    world.pipeline("p", COPY)
    said = cli(
        *("backfill", "p", "--missing", "--stale", "--since", "2026-02-01T00:00", "--until", "2026-01-01T00:00"),
        *("--name", "a\tb", "--dry-run", "--yes"),
        code=2,
    ).stderr
    assert said.count("error: ") == 1
    for part in ("one of --missing, --failed, --stale, --all, not --missing and --stale", "is not before --until"):
        assert part in said
    assert "--name 'a\\tb' is not" in said
    assert "give one of them" in said
    assert "say what is to run" in cli("backfill", "p", code=2).stderr
    assert "add --yes, or --dry-run" in cli("backfill", "p", "--all", "--json", code=2).stderr
    cli("backfill", "q", "--all", "--yes", code=3)
    cli("backfill", "p/two", "--all", "--yes", code=3)
    for command in ("pause", "resume", "cancel", "status"):
        assert "unknown backfill 'nosuch'" in cli("backfill", command, "nosuch", code=3).stderr
    assert "no backfill goes on" in cli("backfill", "status", "--watch", code=2).stderr


@pytest.mark.parametrize("kind", ["missing", "failed", "stale", "all"])
def test_every_kind_is_offered(kind, cli):
    assert f"--{kind}" in cli("backfill", "start", "--help").stdout


def test_a_unit_whose_coverage_is_late_is_not_taken_for_done(world, cli):
    """Its upstream is there again, and the trigger-manager has not said so yet when its turn comes."""
    world.pipeline("p", TWO)
    with world.roles():
        observed(world, 1)
        wait_until(lambda: world.all_covered(2))
    begin(cli, "p/two", "--all")
    with world.store.begin() as tx:
        tx.run("UPDATE coverage SET state = 'waiting', why = 'waiting_for_upstream' WHERE run_id = :id", id=2)
    for _ in range(2):
        with world.store.begin() as tx:
            feeder(1)(tx)
    assert [(r.step, r.state, r.attempt) for r in world.runs()] == [("one", "COMPLETED", 1), ("two", "PENDING", 2)]
