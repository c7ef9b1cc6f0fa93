"""What is revoked makes exactly what rests on it stale; undone, the first results count again. By the command line."""

from __future__ import annotations

import json

import pytest

from tests.harness import wait_until
from tests.integration.test_cli import Cli
from wfm.model import Role
from wfm.service import open_bus

STEPS = [
    {"name": "one", "group_by": ["executed_obs_unit"]},
    {"name": "two", "group_by": ["obs_unit"], "depends_on": ["one"]},
    {"name": "all", "depends_on": ["two"]},
]
WHY = ("--reason", "bad flats")


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def release(world, *versions):
    for version in versions:
        document = {"kind": "software", "name": "copy"}
        document["versions"] = [{"version": version, "command": ["python", str(world.program)]}]
        world.apply(json.dumps(document))


def observe(world):
    """Two packages of one observation unit, one of another: three, two and one units."""
    world.register(world.package("a", obs_unit="x"), world.package("b", obs_unit="x"), world.package("c", obs_unit="y"))


def rests_on(world):
    """By step and beginning of the unit's key, the run that covers it."""
    return {(s, u[0]): c.run_id for (s, u), c in world.coverage().items() if c.state == "covered"}


def covered(world, n=6):
    wait_until(lambda: world.all_covered(n), what="all covered")
    world.rest()
    return rests_on(world)


def other(before, after):
    return {key for key in before if before[key] != after[key]}


def effects(plan):
    return {(s["step"], s["effect"].split(":")[0]): s["units"] for s in plan["steps"]}


def product_of(world, run):
    rows = world.query("SELECT id FROM data_product WHERE run_id = :r AND type <> 'LOG' ORDER BY id", r=run)
    return rows[0].id


def test_a_product(world, cli):
    world.pipeline("p", STEPS)
    with world.roles():
        observe(world)
        first = covered(world)
        bad = product_of(world, first["one", "a"])
        n = len(world.runs())

        shown = cli.json("revoke", "product", bad, "--plan")
        assert effects(shown["plan"]) == {("one", "runs again"): 1, ("two", "follows"): 1, ("all", "follows"): 1}
        assert shown["plan"]["cost"]["runs"] == 3
        assert not shown["done"]
        assert (rests_on(world), len(world.runs())) == (first, n)

        assert "Missing option '--reason'" in cli("revoke", "product", bad, "--yes", code=2).stderr
        assert "Aborted" in cli("revoke", "product", bad, *WHY, code=1, stdin="n\n").stderr
        assert rests_on(world) == first
        cli("revoke", "product", bad, *WHY, stdin="y\n")
        wait_until(lambda: len(world.runs()) == n + 3, what="three more runs")
        second = covered(world)
        assert other(first, second) == {("one", "a"), ("two", "x"), ("all", "a")}
        assert "revoked by user:" in cli("lineage", first["all", "a"]).stdout
        assert "bad flats" in cli("lineage", first["two", "x"]).stdout
        world.check()

        # Its successor is bad, too; then it turns out that the first was not.
        cli("revoke", "product", product_of(world, second["one", "a"]), *WHY, "--yes")
        wait_until(lambda: len(world.runs()) == n + 6, what="three more runs")
        third = covered(world)
        assert other(second, third) == other(first, third) == {("one", "a"), ("two", "x"), ("all", "a")}
        plan = cli.json("revoke", "product", bad, "--restore", "--plan")["plan"]
        assert effects(plan) == {(s, "covered by an earlier result"): 1 for s in ("one", "two", "all")}
        cli("revoke", "product", bad, "--restore", *WHY, "--yes")
        wait_until(lambda: rests_on(world) == first, what="the first results count again")
        cli("revoke", "product", bad, *WHY, "--yes")
        wait_until(lambda: rests_on(world) == third, what="those in their place, again")
        assert len(world.runs()) == n + 6
        told = cli.json("events", "list", "--type", "run.revoked")
        assert all(e["reason"].endswith(": bad flats") and e["actor"].startswith("user:") for e in told["events"])
        world.rest()
        world.check()
    assert "already" in cli("revoke", "product", bad, *WHY, "--yes").stdout
    cli("revoke", "product", 999999, *WHY, "--yes", code=3)


def test_a_version(world, cli):
    release(world, "1.1.0")
    world.pipeline("new", STEPS)
    world.pipeline("old", [{**STEPS[0], "version_policy": "pinned"}])
    with world.roles():
        observe(world)
        wait_until(lambda: len(world.runs()) == 9, what="nine runs")
        world.rest()
        n = len(world.runs())
        plan = cli.json("revoke", "software", "copy", "1.1.0", "--plan")["plan"]
        assert {s["pipeline"] for s in plan["steps"]} == {"new"}
        assert effects(plan) == {("one", "runs again"): 3, ("two", "follows"): 2, ("all", "follows"): 1}
        assert plan["cost"]["unknown"] == 0
        assert plan["cost"]["core_hours"] > 0
        cli("revoke", "software", "copy", "1.1.0", *WHY, "--yes")
        wait_until(lambda: len(world.runs()) == n + 6, what="six more runs")
        world.rest()
        assert "copy 1.1.0 (revoked)" in cli("lineage", world.runs()[0].id).stdout + cli("lineage", 9).stdout
        # Where nothing can take its place, and where a deprecated version is pinned.
        assert effects(cli.json("revoke", "software", "copy", "1.0.0", "--plan")["plan"])["one", "blocked"] == 3
        plan = cli.json("revoke", "software", "copy", "1.0.0", "--deprecate", "--plan")["plan"]
        assert {s["pipeline"] for s in plan["steps"]} == {"new"}
        cli("revoke", "software", "copy", "1.1.0", "--restore", *WHY, "--yes")
        wait_until(lambda: world.all_covered(6) and len(world.runs()) == n + 6, what="covered without a run")
        cli("revoke", "software", "copy", "1.0.0", "--deprecate", *WHY, "--yes")
        world.rest()
        assert world.all_covered(6)
        world.check()
    assert "did you mean" in cli("revoke", "software", "copi", "1.0.0", *WHY, "--yes", code=3).stderr
    cli("revoke", "software", "copy", "9.9.9", *WHY, "--yes", code=3)


def test_a_config(world, cli):
    world.config("c", mark=1)
    world.pipeline("p", [{**STEPS[0], "config": "c"}])
    with world.roles():
        observe(world)
        first = covered(world, 3)
        world.config("c", mark=2)
        wait_until(lambda: len(world.runs()) == 6, what="three more runs")
        covered(world, 3)
        assert effects(cli.json("revoke", "config", "c", "--plan")["plan"]) == {
            ("one", "covered by an earlier result"): 3
        }
        cli("revoke", "config", "c", *WHY, "--yes")
        wait_until(lambda: rests_on(world) == first, what="the first results count again")
        assert cli.json("get", "config", "c")[0]["parameters"] == {"mark": 1}
        again = world.directory / "again.yaml"
        again.write_text("kind: config\nname: c\nparameters: {mark: 2}\n")
        said = cli("apply", "-f", again, code=2).stderr
        assert f"{again}:3" in said
        assert "revision 2, revoked by user:" in said
        cli("revoke", "config", "c", *WHY, "--yes")
        wait_until(lambda: {c.why for c in world.coverage().values()} == {"no_usable_config"}, what="blocked")
        why = cli.json("why", "p")
        assert {w["state"] for w in why} == {"blocked"}
        assert "wfm revoke config" in why[0]["change"]
        cli("revoke", "config", "c", "2", "--restore", *WHY, "--yes")
        wait_until(lambda: world.all_covered(3), what="covered again")
        assert len(world.runs()) == 6
        assert other(first, rests_on(world)) == set(first)
        world.rest()
        world.check()


def test_a_package(world, cli):
    world.pipeline("p", STEPS)
    with world.roles():
        observe(world)
        first = covered(world)
        plan = cli.json("revoke", "package", "a", "--plan")["plan"]
        assert effects(plan) == {
            ("one", "has no raw data any more"): 1,
            ("two", "runs again"): 1,
            ("all", "follows"): 1,
        }
        cli("revoke", "package", "a", *WHY, "--yes")
        wait_until(lambda: len(world.runs()) == 8, what="two more runs")
        world.rest()
        assert {(s, u[0]): c.state for (s, u), c in world.coverage().items() if c.state != "covered"} == {
            ("one", "a"): "empty"
        }
        assert other(rests_on(world), first) == {("two", "x"), ("all", "a")}
        why = cli.json("why", "--package", "a")
        assert why["state"] == "revoked"
        assert "bad flats" in why["summary"]
        world.register(world.package("a", obs_unit="x"))  # whoever registers it again does not know
        world.rest()
        assert cli.json("why", "--package", "a")["units"] == []
        cli("revoke", "package", "a", "--restore", *WHY, "--yes")
        wait_until(lambda: world.all_covered(6) and rests_on(world) == first, what="the first results count again")
        assert len(world.runs()) == 8
        world.rest()
        world.check()
    cli("revoke", "package", "nosuch", *WHY, "--yes", code=3)


def test_runs_on_their_way(world, cli):
    """One that has not begun is withdrawn; one that has begun ends, and does not count."""
    release(world, "1.1.0")
    world.config("slow", seconds=2)
    world.pipeline("p", [{**STEPS[0], "config": "slow"}])
    with world.roles(Role.TRIGGER_MANAGER):
        observe(world)
        wait_until(lambda: len(world.runs()) == 3, what="three runs")
        cli("revoke", "software", "copy", "1.1.0", *WHY, "--yes")
        wait_until(lambda: len(world.runs()) == 6, what="three others")
    assert [r.state for r in world.runs()] == ["CANCELLED"] * 3 + ["PENDING"] * 3
    assert {r.failure for r in world.runs()[:3]} == {"withdrawn"}
    with world.roles():
        wait_until(lambda: {r.state for r in world.runs()[3:]} <= {"RUNNING"}, what="running")
        cli("revoke", "software", "copy", "1.1.0", "--restore", *WHY, "--yes")
        wait_until(lambda: len(world.runs()) == 9, what="three more")
        covered(world, 3)
        assert {r.state for r in world.runs()[3:]} == {"COMPLETED"}
        assert set(rests_on(world).values()) == {r.id for r in world.runs()[6:]}
        world.check()


def test_a_run_is_not_built_with_what_was_revoked_meanwhile(world, cli):
    """Also where the trigger-manager has not looked yet."""
    release(world, "1.1.0")
    world.pipeline("p", STEPS[:1])
    with world.roles(Role.TRIGGER_MANAGER):
        observe(world)
        wait_until(lambda: len(world.runs()) == 3, what="three runs")
    cli("revoke", "software", "copy", "1.1.0", *WHY, "--yes")
    with world.roles(Role.WORKFLOW_MANAGER):
        wait_until(lambda: {r.state for r in world.runs()} == {"CANCELLED"}, what="withdrawn")


def test_wrong_usage(world, cli):
    said = cli("revoke", "software", "copy", "1.0.0", "--restore", "--deprecate", "--plan", "--yes", code=2).stderr
    assert "--restore and --deprecate" in said
    assert "--plan changes nothing" in said
    assert "--json does not ask" in cli("revoke", "package", "a", *WHY, "--json", code=2).stderr


@pytest.mark.parametrize("what", ["product", "package", "config", "software"])
def test_a_revocation_that_nobody_tells_of_is_found(world, cli, what):
    """By the comparison with everything at the start of a trigger-manager."""
    release(world, "1.1.0")
    world.config("c", mark=1)
    world.config("c", mark=2)
    world.pipeline("p", [{**STEPS[0], "config": "c"}, STEPS[1]])
    with world.roles():
        observe(world)
        first = covered(world, 5)
    which = {"product": (product_of(world, first["one", "a"]),), "package": ("a",), "software": ("copy", "1.1.0")}
    cli("revoke", what, *which.get(what, ("c",)), *WHY, "--yes")
    world.query("DELETE FROM event WHERE done_at IS NULL RETURNING id")
    bus = open_bus(world.settings)
    bus.client.flushdb()
    bus.client.close()
    some = {("one", "a"), ("two", "x")}
    expected = {"product": some, "package": some, "config": set(first), "software": set(first)}[what]
    left = 5 - (what == "package")
    with world.roles():
        wait_until(lambda: first.items() - rests_on(world).items() == {(k, first[k]) for k in expected}, what="stale")
        wait_until(lambda: len(rests_on(world)) == left, what="covered again")
