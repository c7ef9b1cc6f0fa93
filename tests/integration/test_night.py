"""The certificate of a night, through the command line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from tests.harness import wait_until
from tests.integration.test_cli import Cli
from wfm import views
from wfm.decide import Capacity
from wfm.model import Role
from wfm.roles import TriggerManager
from wfm.whatif import _future

NIGHT = "2026-03-01"
EVENING = datetime(2026, 3, 1, 20, tzinfo=UTC)
ONE = [{"name": "one", "group_by": ["executed_obs_unit"]}]
TWO = [*ONE, {"name": "two", "depends_on": ["one"], "group_by": ["source"]}]


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def observed(world, name, at=EVENING, **more):
    """A package whose observation began at a certain time."""
    package = world.package(name, **more)
    observation = msgspec.structs.replace(package.executed_obs_unit, started_at=at)
    return msgspec.structs.replace(package, executed_obs_unit=observation)


def succeed(world):
    """The same as the roles would do, without their time: every run as if it had succeeded."""
    with world.store.begin() as tx:
        TriggerManager(world.settings).handle(tx, [])
        _future(tx, 1, None, Capacity(100), lambda: None)


def report(cli, code, *words):
    return cli.json("coverage", "report", NIGHT, *words, code=code)


def standings(found):
    return {p["name"]: p["standing"] for p in found["packages"]}


def test_a_night_whose_packages_are_all_covered_is_certified(world, cli):
    world.pipeline("p", TWO)
    noon, second = EVENING.replace(hour=12), timedelta(seconds=1)
    world.register(
        observed(world, "first", noon),
        observed(world, "last", noon + timedelta(days=1) - second),
        observed(world, "before", noon - second),
        observed(world, "after", noon + timedelta(days=1)),
    )
    found = report(cli, 1)
    assert standings(found) == {"first": "open", "last": "open"}
    assert found["unsorted"] == ["first", "last"]
    assert "not sorted into units yet: first, last" in cli("coverage", "report", NIGHT, code=1).stdout
    with world.roles():
        wait_until(lambda: world.all_covered(5))
    found = report(cli, 0)
    assert found["counts"] == {"covered": 2, "waived": 0, "explained": 0, "open": 0}
    assert "2 packages, nothing open" in cli("coverage", "report", NIGHT).stdout


def test_a_package_without_a_time_belongs_to_the_night_of_its_registration(world, cli):
    world.pipeline("p", ONE)
    world.register(world.package("a"))
    (now,) = world.query("SELECT now() AS now")
    night = (now.now - timedelta(hours=12)).date()
    assert standings(cli.json("coverage", "report", night, code=1)) == {"a": "open"}
    assert cli.json("coverage", "report")["night"] == str(night - timedelta(days=1))
    assert "is not a night" in cli("coverage", "report", "1st of May", code=2).stderr


def test_a_night_follows_the_clocks_of_the_site(world, cli):
    world.apply("kind: site\nname: chile\ntime_zone: America/Santiago\n---\nkind: instrument\nname: cam\nsite: chile")
    world.pipeline("p", ONE)
    noon = EVENING.replace(hour=15)  # 12:00 there
    second = timedelta(seconds=1)
    world.register(
        observed(world, "first", noon),
        observed(world, "last", noon + timedelta(days=1) - second),
        observed(world, "before", noon - second),
        observed(world, "after", noon + timedelta(days=1)),
    )
    for name, start in (("late", "2026-03-02T14:59:59Z"), ("next", "2026-03-02T15:00:00Z")):
        world.apply(
            f"kind: scheduled_observation\nname: {name}\nobs_unit: unit\nmodules: [mod1]\n"
            f"planned_start: {start}\nplanned_end: 2026-03-09T00:00:00Z"
        )
    found = report(cli, 1)
    assert standings(found) == {"first": "open", "last": "open"}
    assert [o["name"] for o in found["planned"]] == []


def test_what_failed_is_open_until_somebody_waives_it(world, cli):
    world.config("some", exit_for=[])
    world.pipeline("p", [{**ONE[0], "config": "some"}, TWO[1]])
    world.register(*(observed(world, n) for n in "abc"))
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: len(world.runs()) == 3)
    bad = next(r for r in world.runs() if r.unit.startswith("a-"))
    world.config("some", exit_for=[bad.unit])
    with world.roles():
        wait_until(
            lambda: (
                ("one", "FAILED") in world.states() and not world.query("SELECT 1 FROM run WHERE finished_at IS NULL")
            )
        )
        world.rest()
    found = report(cli, 1)
    # The map of the source waits for all of its scans: the other packages are not through either.
    assert standings(found) == {"a": "open", "b": "open", "c": "open"}
    by_step = {u["step"]: u for u in found["open"]}
    assert (by_step["one"]["packages"], by_step["two"]["packages"]) == (1, 3)
    assert by_step["one"]["why"] == "failed"
    assert "wfm runs retry" in by_step["one"]["change"]
    said = cli("coverage", "report", NIGHT, code=1).stdout
    assert "3 of 3 packages still open" in said
    assert "p/one" in said
    assert "upstream" in said

    cli("waive", "a", "--until", "14d", "--reason", "clouds")
    assert standings(report(cli, 1)) == {"a": "waived", "b": "open", "c": "open"}
    unit = by_step["two"]["unit"]
    # The digest at the end of a unit's key may be left out.
    assert cli.json("waive", "p/two", unit[:-17], "--until", "2999-01-01", "--reason", "later")["waivers"] == 1
    found = report(cli, 0)
    assert standings(found) == {"a": "waived", "b": "waived", "c": "waived"}
    assert [(w["package"], w["unit"], w["reason"]) for w in found["waivers"]] == [
        ("a", None, "clouds"),
        (None, unit, "later"),
    ]
    assert "user:" in cli("coverage", "report", NIGHT).stdout
    # Nothing but the certificate knows: the map still waits.
    assert cli.json("why", "p/two")[0]["why"] == "upstream_failed"
    told = cli.json("events", "list", "--type", "waiver.changed")["events"]
    assert [(e["body"].get("package"), e["body"].get("unit")) for e in told] == [("a", None), (None, unit)]


def test_a_waiver_ends_by_itself_or_by_hand(world, cli):
    world.pipeline("p", ONE)
    world.register(observed(world, "a"), observed(world, "b"))
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: len(world.runs()) == 2)
    cli("waive", "a", "b", "--until", "1d", "--reason", "so")
    report(cli, 0)
    with world.store.begin() as tx:  # its time is over
        tx.run("UPDATE waiver SET until = now() - interval '1 s'")
    assert standings(report(cli, 1)) == {"a": "open", "b": "open"}
    cli("waive", "a", "--end", "--reason", "too late", code=1)
    cli("waive", "a", "--until", "1d", "--reason", "again")
    cli("waive", "a", "--until", "2d", "--reason", "and again")
    assert standings(report(cli, 1)) == {"a": "waived", "b": "open"}
    cli("waive", "a", "--end", "--reason", "it is good")
    assert standings(report(cli, 1)) == {"a": "open", "b": "open"}
    states = [(w["package"], w["reason"], w["in_force"], w["ended_reason"]) for w in cli.json("waive", "--list")]
    assert states == [
        ("a", "and again", False, "it is good"),
        ("a", "again", False, "another waiver takes its place"),
        ("b", "so", False, ""),
        ("a", "so", False, "another waiver takes its place"),
    ]
    assert "over" in cli("waive", "--list").stdout


def test_what_is_waived_is_named_well(world, cli):
    world.pipeline("p", ONE)
    world.register(observed(world, "a"))
    succeed(world)
    said = cli("waive", "a", "x", "y", "--until", "1d", "--reason", "r", code=3).stderr
    assert "'x'" in said
    assert "'y'" in said
    assert "p/one has no unit 'zz'" in cli("waive", "p/one", "zz", "--until", "1d", "--reason", "r", code=3).stderr
    assert "is over already" in cli("waive", "a", "--until", "2020-01-01", "--reason", "r", code=2).stderr
    for words in (("a",), ("a", "--until", "1d"), ("--list", "a"), ("--until", "1d", "--reason", "r"), ("a", "--end")):
        cli("waive", *words, code=2)
    cli("waive", "a", "--end", "--reason", "r", code=1)
    assert cli.json("waive", "--list") == []


def test_what_the_definitions_do_not_ask_for_is_explained(world, cli):
    world.apply(
        "kind: grouping\nname: only-a\nrules: [{table: raw_data_package, column: name, operator: eq, value: a}]"
    )
    world.pipeline("auto", ONE, grouping="only-a")
    world.pipeline("asked", ONE, grouping="only-a", trigger="MANUAL")
    world.register(observed(world, "a"), observed(world, "b"))
    succeed(world)
    found = report(cli, 0)
    assert standings(found) == {"a": "explained", "b": "explained"}
    assert found["unselected"] == ["b"]
    assert [(u["pipeline"], u["why"]) for u in found["explained"]] == [("asked", "manual_only")]
    said = cli("coverage", "report", NIGHT).stdout
    assert "no enabled pipeline selects b" in said
    assert "wfm trigger asked/one" in said
    assert standings(report(cli, 0, "--pipeline", "auto")) == {"a": "covered", "b": "explained"}
    # Somebody asked for it: now it is open until it is done.
    cli("trigger", "asked")
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: any(c.requested is False and c.state == "active" for c in world.coverage().values()))
    assert standings(report(cli, 1))["a"] == "open"
    cli("pause", "auto", "--reason", "x")
    cli("disable", "asked")
    # A pause does not undo what is covered.
    assert standings(report(cli, 0)) == {"a": "covered", "b": "explained"}


def test_newer_content_is_open_until_it_was_sorted(world, cli):
    world.pipeline("p", ONE)
    world.register(observed(world, "a"))
    succeed(world)
    report(cli, 0)
    world.register(observed(world, "a", content="other\n"))
    assert report(cli, 1)["unsorted"] == ["a"]
    succeed(world)
    report(cli, 0)
    world.pipeline("newer", ONE)
    assert report(cli, 1)["unsorted"] == ["a"]


def test_a_night_is_asked_in_as_many_statements_whatever_its_size(world):
    world.pipeline("p", TWO)
    world.register(observed(world, "a"))
    succeed(world)

    def asked():
        from sqlalchemy import event

        with world.store.begin() as tx:
            seen = []
            event.listen(tx.conn, "before_cursor_execute", lambda *a: seen.append(a[2]))
            views.certificate(tx.conn, EVENING.date(), location_id=1)
            return len(seen)

    few = asked()
    world.register(*(observed(world, f"b{n}") for n in range(50)))
    succeed(world)
    assert asked() == few
