"""A unit that fails again and again stops, says why, and goes on when something changes. By the command line."""

from __future__ import annotations

import pytest

from tests.acceptance.test_revoke import STEPS, release
from tests.harness import World, wait_until
from tests.integration.test_cli import Cli

STEP = {**STEPS[0], "config": "c", "max_retries": 1}


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def blocked(world, failures):
    """Wait until the unit stops after so many failures."""
    wait_until(lambda: len(world.query("SELECT 1 FROM transition WHERE trigger = 'fail'")) == failures, what="failures")
    wait_until(lambda: {c.why for c in world.coverage().values()} == {"failed"}, what="blocked")
    world.rest()
    (unit,) = (u for _, u in world.coverage())
    return unit


def test_a_unit_that_fails_stops_and_says_why(world, cli):
    world.config("c", exit=3)
    world.pipeline("p", [STEP])
    with world.roles():
        world.register(world.package("a"))
        unit = blocked(world, 2)
        cli("pause", "p")
        cli("resume", "p")
        cli("trigger", "p")
    with world.roles():  # which compare with the whole catalogue when they start
        world.rest()
        (line,) = cli.json("why", "p/one", unit)
        assert (line["state"], line["why"], line["failures"]) == ("blocked", "failed", 2)
        assert line["reason"].endswith("(2 failures with the same input, version and config)")
        newest, first = line["last_failures"]
        assert (first["attempt"], newest["attempt"]) == (1, 2)
        assert (newest["failure"], newest["exit_code"]) == ("exit", 3)
        assert newest["message"] == "exit code 3"
        assert newest["log"] == first["log"] == "this software does not like its input"
        said = cli("why", "p/one", unit).stdout
        assert "p/one: 2 failures with the input, version and config that are wanted now; the last:" in said
        assert said.count("this software does not like its input") == 2

        (run,) = world.runs()
        cli("runs", "retry", run.id, "--reason", "once more")
        blocked(world, 4)
        (line,) = cli.json("why", "p/one", unit)
        assert line["failures"] == 4
        assert [f["attempt"] for f in line["last_failures"]] == [4, 3, 2]

        # Each of these is something else, and is tried as often as the first; what has failed is not tried again.
        world.register(world.package("a", "other content\n"))
        blocked(world, 6)
        assert cli.json("why", "p/one", unit)[0]["failures"] == 2
        release(world, "1.1.0")
        blocked(world, 8)
        world.config("c", exit=4)
        blocked(world, 10)
        world.config("c", exit=3)
        world.rest()
        blocked(world, 10)
        assert cli.json("why", "p/one", unit)[0]["last_failures"][0]["exit_code"] == 3
        world.config("c", exit=0)
        wait_until(lambda: world.all_covered(1), what="covered")
        world.rest()
        assert cli.json("why", "p/one", unit)[0]["failures"] == 0
        assert cli.json("events", "verify")["faults"] == []


def test_what_goes_back_and_forth_makes_no_endless_retries(database, redis_url, tmp_path):
    world = World(tmp_path, database, redis_url, WFM_RETRY_BACKOFF_SECONDS="3600")
    try:
        world.config("c", exit=3)
        world.pipeline("p", [STEP])
        with world.roles():
            world.register(world.package("a"))
            wait_until(lambda: [r.state for r in world.runs()] == ["RETRY_WAIT"], what="another attempt")
            world.config("c", exit=0)
            wait_until(lambda: world.all_covered(1), what="covered with the other config")
            world.config("c", exit=3)
            blocked(world, 2)
            assert [(r.state, r.failures) for r in world.runs()] == [("CANCELLED", 1), ("COMPLETED", 0), ("FAILED", 2)]
    finally:
        world.close()
