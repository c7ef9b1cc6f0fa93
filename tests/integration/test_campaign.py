"""Campaigns through the command line: what was frozen stays as it was."""

from __future__ import annotations

import json

import pytest

from tests.harness import wait_until
from tests.integration.test_cli import Cli
from wfm.decide import Capacity
from wfm.model import Role
from wfm.roles import TriggerManager
from wfm.whatif import _future

STEPS = [
    {"name": "one", "group_by": ["executed_obs_unit"], "config": "some", "version_policy": "latest"},
    {"name": "two", "depends_on": ["one"], "group_by": ["source"]},
]


@pytest.fixture
def cli(world):
    world.config("some", depth=1)
    world.pipeline("p", STEPS)
    return Cli(world.environ)


def succeed(world):
    """The same as the roles would do, without their time: every run as if it had succeeded."""
    with world.store.begin() as tx:
        TriggerManager(world.settings).handle(tx, [])
        _future(tx, 1, None, Capacity(100), lambda: None)


def release(world, version):
    versions = [{"version": v, "command": ["python", str(world.program)]} for v in ("1.0.0", version)]
    world.apply(json.dumps({"kind": "software", "name": "copy", "versions": versions}))


def frozen(world):
    """All that a campaign's coverage wants, and of which packages."""
    return sorted(
        tuple(r)
        for r in world.query(
            """
            SELECT s.name, u.key, u.members, u.digest, u.generation, c.state, c.wanted FROM coverage c
            JOIN reduction_step s ON s.id = c.step_id JOIN unit u ON u.id = c.unit_id
            JOIN pipeline p ON p.id = s.pipeline_id WHERE p.name = 'dr1'
            """
        )
    )


def test_a_campaign_is_processed_and_nothing_that_comes_later_changes_it(world, cli):
    world.register(*(world.package(n) for n in "abc"))
    succeed(world)
    made = cli.json("campaign", "create", "dr1", "--pipeline", "p", "--reason", "release 1")
    assert made == {"name": "dr1", "packages": 3, "versions": {"one": "1.0.0", "two": "1.0.0"}}
    assert cli.json("campaign", "show", "dr1")["covered"] == 0
    with world.roles():
        wait_until(lambda: cli.json("campaign", "show", "dr1")["complete"])
        world.rest()
    before = frozen(world)
    assert len(before) == 4
    (line,) = cli.json("campaign", "list")
    assert (line["template"], line["packages"], line["units"], line["covered"]) == ("p", 3, 4, 4)
    assert "100 % covered (4 of 4 units)" in cli("campaign", "show", "dr1").stdout
    products = cli.json("campaign", "products", "dr1", "--type", "SCIENCE")
    assert [p["step"] for p in products] == ["two"]

    # New data, new content, a new version, a new config, and an entry of the catalogue that is another.
    release(world, "1.1.0")
    world.config("some", depth=2)
    world.apply("kind: source\nname: NGC253\nmetadata: {ra: 1}")
    world.register(world.package("d"), world.package("a", "other\n"))
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(
            lambda: not world.query("SELECT 1 FROM event WHERE recipient = 'trigger-manager' AND done_at IS NULL")
        )
        wait_until(lambda: len([r for r in world.runs() if r.state == "PENDING"]) == 4)  # of the template
    assert frozen(world) == before
    assert cli.json("campaign", "show", "dr1")["complete"]
    assert "this campaign was frozen without it" in cli("why", "--package", "d").stdout


def test_a_campaign_says_what_is_missing(world, cli):
    world.register(*(world.package(n) for n in "abc"))
    succeed(world)
    bad = next(r.unit for r in world.runs() if r.unit.startswith("a-"))
    world.config("some", exit_for=[bad])
    cli("campaign", "create", "dr1", "--pipeline", "p", "--reason", "r")
    with world.roles():
        wait_until(lambda: any(m["why"] == "failed" for m in cli.json("campaign", "show", "dr1")["missing"]))
        world.rest()
    found = cli.json("campaign", "show", "dr1")
    assert not found["complete"]
    assert {(m["step"], m["why"], m["units"]) for m in found["missing"]} == {
        ("one", "failed", 1),
        ("two", "upstream_failed", 1),
    }
    said = cli("campaign", "show", "dr1").stdout
    assert "50 % covered (2 of 4 units)" in said
    assert "wfm runs retry" in said
    # A mended config is a newer one: it is another campaign's.
    world.config("some", exit_for=[])
    assert {m["why"] for m in cli.json("campaign", "show", "dr1")["missing"]} == {"failed", "upstream_failed"}


def test_a_campaign_of_some_packages_and_a_chosen_version(world, cli):
    release(world, "1.1.0")
    world.register(*(world.package(n, obs_unit=f"unit-{n}") for n in "abc"))
    succeed(world)
    made = cli.json(
        *("campaign", "create", "old", "--pipeline", "p", "--version", "one=1.0.0"),
        *("--packages", "-", "--priority", "-5"),
        stdin="a\nb\n",
    )
    assert made == {"name": "old", "packages": 2, "versions": {"one": "1.0.0", "two": "1.1.0"}}
    assert cli.json("get", "pipeline", "old")[0]["priority"] == -5
    rule = {"table": "raw_data_package", "column": "name", "operator": "eq", "value": "c"}
    made = cli.json("campaign", "create", "c-only", "--pipeline", "p", "--rule", json.dumps(rule))
    assert (made["packages"], made["versions"]["one"]) == (1, "1.1.0")
    assert [c["name"] for c in cli.json("campaign", "list")] == ["c-only", "old"]
    succeed(world)
    shown = cli.json("campaign", "show", "old")
    assert shown["complete"]
    assert [(s["step"], s["version"], s["config_revision"]) for s in shown["steps"]] == [
        ("one", "1.0.0", 1),
        ("two", "1.1.0", None),
    ]


def test_what_a_campaign_refuses(world, cli):
    create = ("campaign", "create", "dr1", "--pipeline")
    assert "nothing to freeze" in cli(*create, "p", code=2).stderr
    world.register(world.package("a"))
    assert (
        "did you mean" in cli(*create, "pp", code=3).stderr or "unknown pipeline" in cli(*create, "pp", code=3).stderr
    )
    said = cli(*create, "p", "--version", "one=9.9", "--version", "tow=1.0.0", code=2).stderr
    assert "did you mean 'two'" in said
    assert "9.9 does not exist" in said
    said = cli(*create, "p", "--package", "x", "--package", "y", code=3).stderr
    assert "'x'" in said
    assert "'y'" in said
    assert "STEP=VERSION" in cli(*create, "p", "--version", "one", code=2).stderr
    assert "unknown table" in cli(*create, "p", "--rule", '{"table": "x"}', code=2).stderr
    assert cli.json("campaign", "list") == []
    cli(*create, "p")
    assert "name the campaign otherwise" in cli(*create, "p", code=1).stderr
    (document,) = cli.json("get", "pipeline", "dr1")
    assert "unchanged" in cli("apply", "-f", "-", stdin=json.dumps(document)).stdout
    document["steps"][0]["version"] = "1.0.1"
    document["grouping"] = "everything"
    said = cli("apply", "-f", "-", stdin=json.dumps(document), code=2).stderr
    assert "'dr1' is a campaign: its steps cannot change any more" in said
    cli("pause", "dr1", "--reason", "later")
    cli("delete", "pipeline", "dr1")
    cli("campaign", "show", "dr1", code=3)


def test_a_campaign_is_no_part_of_a_nights_certificate(world, cli):
    world.register(world.package("a"))
    succeed(world)
    cli("campaign", "create", "dr1", "--pipeline", "p")
    cli("coverage", "report", world.query("SELECT now() - interval '12 h' AS at")[0].at.date())
    world.register(world.package("b"))
    succeed(world)
    cli("coverage", "report", world.query("SELECT now() - interval '12 h' AS at")[0].at.date())


def test_a_campaign_tells_of_packages_that_were_revoked_since(world, cli):
    world.register(*(world.package(n) for n in "ab"))
    succeed(world)
    cli("campaign", "create", "dr1", "--pipeline", "p", "--reason", "release 1")
    succeed(world)
    assert cli.json("campaign", "show", "dr1")["complete"]
    cli("revoke", "package", "b", "--yes", "--reason", "bad disk")
    succeed(world)
    shown = cli.json("campaign", "show", "dr1")
    assert ([(r["package"], r["reason"]) for r in shown["revoked"]], shown["complete"]) == ([("b", "bad disk")], False)
    assert "warning: package b in it was revoked" in cli("campaign", "show", "dr1").stdout
    assert "it is still in dr1" in cli("why", "--package", "b").stdout
