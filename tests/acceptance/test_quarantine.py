"""A coarse unit that fails on data: the guilty member is found by halves, left out with evidence, the rest is run.

By the command line, with real jobs; the software fails as long as certain files are among its inputs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import ACTOR, wait_until
from tests.integration.test_cli import Cli
from wfm import gaps


@pytest.fixture
def cli(world):
    return Cli(world.environ)


def release(world, version):
    versions = [{"version": version, "command": ["python", str(world.program)]}]
    world.apply(json.dumps({"kind": "software", "name": "copy", "versions": versions}))


def observe(world, n, **bad):
    """Packages p1 to pn, with ids in this order; those named have this content."""
    for i in range(1, n + 1):
        world.register(world.package(f"p{i}", bad.get(f"p{i}", "")))


MAP = {"name": "map", "config": "c", "quarantine_at_most": 1}
POISON = {"POISON": 1}


def covered(world, n=1):
    wait_until(lambda: world.all_covered(n), what="covered")
    world.rest()


def blocked(world, text):
    def stopped():
        return [c for c in world.coverage().values() if c.state == "blocked" and text in c.reason]

    (c,) = wait_until(stopped, what=f"blocked: {text}")
    world.rest()
    return c


def result(world, run):
    (r,) = world.query("SELECT job FROM run WHERE id = :i", i=run)
    return json.loads(Path(r.job["directory"], "config/manifest.json").read_text())


def read(world, run):
    return {f["package"] for f in result(world, run)["input_files"]}


def in_quarantine(cli):
    return {q["member"] for q in cli.json("quarantine")}


def probes(world):
    return [r for r in world.runs() if r.probe_of is not None]


def real(world):
    return [r for r in world.runs() if r.probe_of is None]


def test_the_guilty_package_is_found_and_left_out(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP])
    observe(world, 8, p6="POISON\n")
    with world.roles():
        covered(world)
        first, *tried, rest = world.runs()
        assert first.state == "FAILED"
        assert [(p.probe_of, p.probe["first"], p.probe["last"], p.state) for p in tried] == [
            (first.id, 1, 4, "COMPLETED"),
            (first.id, 5, 6, "FAILED"),
            (first.id, 5, 5, "COMPLETED"),
            (first.id, 6, 6, "FAILED"),
        ]
        assert (rest.probe_of, rest.state) == (None, "COMPLETED")
        assert {f["package"] for f in result(world, rest.id)["input_files"]} == {f"p{i}" for i in (1, 2, 3, 4, 5, 7, 8)}
        assert {f["package"] for f in result(world, tried[1].id)["input_files"]} == {"p5", "p6"}
        # What a part of the unit gave counts for nothing.
        assert {d.run_id for d in world.query("SELECT run_id FROM data_product")} == {rest.id}

        (line,) = cli.json("why", "p/map", "all")
        assert (line["state"], line["accepted"]) == ("covered", rest.id)
        assert line["reason"] == f"run {rest.id} without 1 quarantined: p6"
        assert [q["member"] for q in line["quarantined"]] == ["p6"]
        assert "in quarantine, it is run without these" in cli("why", "p/map", "all").stdout
        (entry,) = cli.json("quarantine")
        assert (entry["member"], entry["kind"], entry["run"], entry["probe"]) == (
            "p6",
            "package",
            first.id,
            tried[3].id,
        )
        assert (entry["error"], entry["in_force"]) == ("exit code 3", True)
        assert "package p6" in cli("quarantine").stdout
        (quarantined,) = result(world, rest.id)["quarantined"]
        assert quarantined["member"] == "p6"
        assert f"run {first.id} failed, and so did run {tried[3].id} with it alone" in quarantined["reason"]
        assert result(world, tried[1].id)["probe"] == {
            "run_id": first.id,
            "number": 2,
            "first": 5,
            "last": 6,
            "members": 8,
        }
        shown = cli("runs", "show", rest.id).stdout
        assert "p6: run" in shown
        assert f"run {first.id}: probe 2, members 5 to 6 of 8" in cli("runs", "show", tried[1].id).stdout
        assert cli.json("runs", "show", rest.id)["packages_total"] == 7
        (told,) = world.query("SELECT body, actor, reason FROM event WHERE type = 'data.quarantined'")
        assert (told.body["member"], told.body["run"], told.body["probe"]) == ("p6", first.id, tried[3].id)
        assert told.actor == "trigger-manager"

        # The package is not covered by this step.
        about = cli.json("why", "--package", "p6")
        assert [(u["state"], u["why"]) for u in about["units"]] == [("blocked", "quarantined")]
        assert f"run {tried[3].id} with it alone" in about["units"][0]["reason"]
        assert [u["why"] for u in cli.json("why", "--package", "p5")["units"]] == ["covered"]
        assert "p6" not in cli("lineage", rest.id).stdout
        assert cli.json("events", "verify")["faults"] == []
        world.check()


def test_released_by_hand_by_a_version_and_by_new_content(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP])
    observe(world, 4, p2="POISON\n")
    with world.roles():
        covered(world)
        first, n = real(world)[0].id, len(world.runs())
        assert in_quarantine(cli) == {"p2"}

        # By hand: the whole is tried again, and fails again: a new search finds the same.
        assert "Missing option '--reason'" in cli("quarantine", "release", "p/map", "all", code=2).stderr
        assert "p3" in cli("quarantine", "release", "p/map", "all", "p3", "--reason", "x", code=3).stderr
        assert "names no step" in cli("quarantine", "release", "p", "all", "--reason", "x", code=2).stderr
        assert "it is blank" in cli("quarantine", "release", "p/map", "all", "--reason", "  ", code=2).stderr
        done = cli.json("quarantine", "release", "p/map", "all", "p2", "--reason", "it may be good")
        assert done == {"members": ["p2"], "retried": first, "refused": ""}
        wait_until(lambda: len(probes(world)) == 2 * (n - 2), what="another search")
        covered(world)
        assert in_quarantine(cli) == {"p2"}
        assert len(real(world)) == 2, "the rest was done already"
        old = next(q for q in cli.json("quarantine", "--all") if not q["in_force"])
        assert (old["released_reason"], old["released_by"][:5]) == ("it may be good", "user:")
        (told,) = world.query("SELECT body, reason FROM event WHERE type = 'data.released'")
        assert (told.body["member"], told.reason) == ("p2", "it may be good")
        rest = real(world)[-1].id

        # Another config: nothing is left out that was not tried with it. It goes back: the search stands.
        world.config("c", chokes_on={})
        wait_until(lambda: world.coverage()["map", "all"].run_id != rest, what="another run")
        covered(world)
        assert read(world, real(world)[-1].id) == {"p1", "p2", "p3", "p4"}
        assert in_quarantine(cli) == set()
        assert cli.json("quarantine", "--all")[0]["released_at"] is None
        n = len(world.runs())
        world.config("c", chokes_on=POISON)
        wait_until(lambda: world.coverage()["map", "all"].run_id == rest, what="the rest counts again")
        covered(world)
        assert (len(world.runs()), in_quarantine(cli)) == (n, {"p2"})

        # Another version, which fails in the same way: it is searched for with that one.
        release(world, "1.1.0")
        wait_until(lambda: len(world.runs()) > n, what="a run of the new version")
        covered(world)
        assert {q["version"] for q in cli.json("quarantine")} == {"1.1.0"}

        # New content of it.
        n = len(world.runs())
        world.register(world.package("p2", "wholesome\n"))
        wait_until(lambda: len(world.runs()) > n, what="a run with the new content")
        covered(world)
        assert len(world.runs()) == n + 1
        assert read(world, real(world)[-1].id) == {"p1", "p2", "p3", "p4"}
        assert in_quarantine(cli) == set()
        assert (
            "nothing of p/map all is in quarantine"
            in cli("quarantine", "release", "p/map", "all", "--reason", "x", code=1).stderr
        )
        assert cli.json("events", "verify")["faults"] == []


def test_two_guilty_packages(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [{**MAP, "quarantine_at_most": 2}])
    observe(world, 8, p1="POISON\n", p5="POISON!\n")
    with world.roles():
        covered(world)
        assert in_quarantine(cli) == {"p1", "p5"}
        assert read(world, real(world)[-1].id) == {f"p{i}" for i in (2, 3, 4, 6, 7, 8)}
        assert [r.state for r in real(world)] == ["FAILED", "FAILED", "COMPLETED"]
        assert cli.json("why", "p/map", "all")[0]["reason"].endswith("without 2 quarantined: p1, p5")

        # Fewer are allowed: the first one counts.
        world.pipeline("p", [MAP])
        c = blocked(world, "without 1 quarantined: p1: exit code 3; not bisected: not more than 1 may be in quarantine")
        assert c.why == "failed"
        assert in_quarantine(cli) == {"p1"}
        world.check()


def test_more_are_guilty_than_may_be_left_out(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP])
    observe(world, 8, p3="POISON\n", p6="POISON!\n")
    with world.roles():
        c = blocked(world, "bisected: it still fails without p3: no other member may be left out")
        first, rest = real(world)
        assert c.reason.startswith(f"run {first.id}: exit code 3")
        assert (first.state, rest.state) == ("FAILED", "FAILED")
        assert in_quarantine(cli) == set()
        (told,) = world.query("SELECT body, reason FROM event WHERE type = 'data.released'")
        assert told.body["member"] == "p3"
        n = len(world.runs())
        cli("trigger", "p")
        world.rest()
        with_restart = len(world.runs())
        assert with_restart == n
        # Somebody retries the whole: it is looked at anew.
        world.retry(first.id)
        wait_until(lambda: len(probes(world)) == 2 * (n - 2), what="another search")
        blocked(world, "bisected: it still fails without p3")
        world.check()
    with world.roles():  # which compare with the whole catalogue when they start
        n = len(world.runs())
        world.rest()
        assert len(world.runs()) == n


def test_software_that_fails_on_everything(world, cli):
    world.config("c", exit=3)
    world.pipeline("p", [{**MAP, "quarantine_at_most": 2}])
    observe(world, 8)
    with world.roles():
        blocked(world, "bisected in 5 probes: nothing passed, and 3 of its members fail by themselves")
        assert len(world.runs()) == 6
        assert not cli.json("quarantine", "--all")
        # A probe is no run of the unit: its failures are not counted as such, nor can it be repeated.
        (said,) = cli.json("why", "p/map", "all")
        assert (said["failures"], [f["run"] for f in said["last_failures"]]) == (1, [1])
        probe = probes(world)[0].id
        assert "is a probe of run 1" in cli("runs", "retry", probe, code=1).stderr
        world.check()


def test_members_that_fail_only_together(world, cli):
    world.config("c", chokes_on={"SALT": 2})
    world.pipeline("p", [MAP])
    observe(world, 4, p2="SALT\n", p3="SALT!\n")
    with world.roles():
        blocked(world, "its members fail together, but none fails by itself")
        assert not cli.json("quarantine", "--all")
        world.check()


def test_where_none_is_looked_for_it_is_said_that_one_could_be(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline(
        "p", [{**MAP, "quarantine_at_most": 0}, {"name": "one", "config": "c", "group_by": ["executed_obs_unit"]}]
    )
    observe(world, 2, p1="POISON\n")
    with world.roles():
        wait_until(lambda: len([r for r in world.runs() if r.state == "FAILED"]) == 2, what="both fail")
        world.rest()
        change = {line["step"]: line["change"] for line in cli.json("why", "p") if line["state"] == "blocked"}
        assert "with `quarantine_at_most: 1`, map looks for the member" in change["map"]
        assert "quarantine_at_most" not in change["one"]
        # Said later, it is done with what had failed.
        world.pipeline("p", [MAP])
        wait_until(lambda: world.coverage()["map", "all"].state == "covered", what="covered")
        world.rest()
        assert in_quarantine(cli) == {"p1"}
        # A probe of the other one wanted the same, and passed; but it is no result.
        rest, passed = real(world)[-1], probes(world)[-1]
        assert (passed.wanted, passed.state) == (rest.wanted, "COMPLETED")
        assert world.coverage()["map", "all"].run_id == rest.id


def test_what_fails_in_a_probe_is_not_repeated(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [{**MAP, "max_retries": 1}])
    observe(world, 2, p2="POISON\n")
    with world.roles():
        covered(world)
        assert [(r.state, r.attempt) for r in world.runs()] == [
            ("FAILED", 2),
            ("COMPLETED", 1),
            ("FAILED", 1),
            ("COMPLETED", 1),
        ]
        assert in_quarantine(cli) == {"p2"}
        world.check()


def test_reconciliation_finds_what_was_released(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP])
    observe(world, 2, p2="POISON\n")
    with world.roles():
        covered(world)
    # By somebody who told nobody.
    world.query("UPDATE quarantine SET released_at = now(), released_reason = 'no reason' RETURNING id")
    with world.roles():  # which compare with the whole catalogue when they start
        blocked(world, "run 1: exit code 3; bisected: no reason")
        assert in_quarantine(cli) == set()


SCANS = [
    {"name": "scan", "group_by": ["executed_obs_unit"]},
    {"name": "twice", "group_by": ["executed_obs_unit"], "depends_on": ["scan"]},
    {"name": "map", "config": "c", "quarantine_at_most": 1, "group_by": ["source"], "depends_on": ["scan", "twice"]},
    {"name": "all", "depends_on": ["map"]},
]


@pytest.mark.parametrize("fan_in", ["all", "any"])
def test_a_step_that_reads_results_leaves_a_finer_unit_out(world, cli, fan_in):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [*SCANS[:2], {**SCANS[2], "fan_in": fan_in, "settle_seconds": 1.0}, SCANS[3]])
    observe(world, 5, p4="POISON\n")
    with world.roles():
        covered(world, 12)
        (aside,) = cli.json("quarantine")
        assert (aside["step"], aside["kind"], aside["member"][:2]) == ("map", "unit", "p4")
        rest = world.coverage()["map", aside["unit"]].run_id
        products = result(world, rest)["input_products"]
        assert {(p["step"], p["unit"][:2]) for p in products} == {
            (step, f"p{i}") for step in ("scan", "twice") for i in (1, 2, 3, 5)
        }
        assert [q["member"] for q in result(world, rest)["quarantined"]] == [aside["member"]]
        assert "p4" not in cli("lineage", rest).stdout
        about = {u["step"]: u["why"] for u in cli.json("why", "--package", "p4")["units"]}
        assert about == {"scan": "covered", "twice": "covered", "map": "quarantined", "all": "covered"}

        # Its content is another: it is read again, at once where it is not needed and later where it is.
        world.register(world.package("p4", "wholesome\n"))
        wait_until(lambda: not in_quarantine(cli) and world.all_covered(12), what="all of it")
        world.rest()
        products = result(world, world.coverage()["map", aside["unit"]].run_id)["input_products"]
        assert {p["unit"][:2] for p in products} == {f"p{i}" for i in range(1, 6)}
        assert cli.json("events", "verify")["faults"] == []


def test_the_certificate_and_a_campaign_miss_it(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP])
    observe(world, 3, p2="POISON\n")
    with world.roles():
        covered(world)
        (night,) = world.query(
            "SELECT (registered_at - interval '12 h')::date::text AS n FROM raw_data_package LIMIT 1"
        )
        found = json.loads(cli("coverage", "report", night.n, "--json", code=1).stdout)
        assert found["counts"] == {"covered": 2, "waived": 0, "explained": 0, "open": 1}
        (unit,) = found["open"]
        assert (unit["why"], unit["packages"], unit["example"]) == ("quarantined", 1, "p2")
        assert "wfm quarantine release p/map all p2" in unit["change"]
        cli("waive", "p2", "--until", "1d", "--reason", "cloud")
        found = cli.json("coverage", "report", night.n)
        assert found["counts"] == {"covered": 2, "waived": 1, "explained": 0, "open": 0}
        cli("waive", "p2", "--end", "--reason", "no cloud")
        cli("waive", "p/map", "all", "--until", "1d", "--reason", "cloud")
        assert cli.json("coverage", "report", night.n)["counts"]["open"] == 0

        cli("campaign", "create", "dr1", "--pipeline", "p", "--reason", "a release")
        wait_until(lambda: len(real(world)) == 4, what="the rest of the campaign")
        world.rest()
        found = cli.json("campaign", "show", "dr1")
        assert (found["complete"], [(m["why"], m["units"]) for m in found["missing"]]) == (False, [("quarantined", 1)])
        assert "p2" in found["missing"][0]["example"]["reason"]


def test_on_request_only_the_search_and_the_rest_belong_to_what_was_asked(world, cli):
    world.config("c", chokes_on=POISON)
    world.pipeline("p", [MAP], trigger="MANUAL")
    observe(world, 4, p2="POISON\n")
    with world.roles():
        wait_until(lambda: {c.why for c in world.coverage().values()} == {"manual_only"}, what="held")
        cli("trigger", "p", "--reason", "tonight")
        covered(world)
        assert "run 1 without p2" in cli.json("runs", "show", real(world)[-1].id)["history"][0]["reason"]
        n = len(world.runs())
        world.register(world.package("p5"))
        wait_until(lambda: {c.why for c in world.coverage().values()} == {"manual_only"}, what="held")
        world.rest()
        assert len(world.runs()) == n


def test_a_search_is_paused_and_gives_way_to_new_data(world, cli):
    world.config("c", chokes_on=POISON, seconds=1)
    world.pipeline("p", [MAP])
    observe(world, 4, p2="POISON\n")
    with world.roles():
        wait_until(lambda: [r.state for r in world.runs()] == ["RUNNING"], what="it runs")
        cli("pause", "p")
        blocked(world, "bisecting waits: pipeline paused by")
        assert len(world.runs()) == 1
        cli("resume", "p")
        wait_until(lambda: probes(world), what="a probe")
        (first,) = probes(world)
        assert first.finished_at is None
        # Looked at once more, it is still what the unit needs.
        world.act(lambda tx: gaps.evaluate(tx, [(first.step_id, first.unit_id)], ACTOR))
        (line,) = cli.json("why", "p/map", "all")
        assert (line["state"], line["why"]) == ("active", "bisecting")
        assert line["reason"] == f"run {first.id}: probe 1, members 1 to 2 of 4, because run 1 failed: exit code 3"
        world.register(world.package("p5"))
        covered(world)
        assert read(world, real(world)[-1].id) == {"p1", "p3", "p4", "p5"}
        assert all(p.probe["members"] == 5 for p in probes(world) if p.id > first.id)
        world.check()


def test_a_cancelled_probe_ends_the_search(world, cli):
    world.config("c", chokes_on=POISON, seconds=0.5)
    world.pipeline("p", [MAP])
    observe(world, 4, p2="POISON\n")
    with world.roles():
        wait_until(lambda: [r.state for r in probes(world)] == ["RUNNING"], what="it searches")
        (probe,) = probes(world)
        world.cancel(probe.id)
        c = blocked(world, "bisected in 1 probe: run")
        assert f"run {probe.id} says nothing of its members: cancelled by" in c.reason
        world.retry(1)
        covered(world)
        assert in_quarantine(cli) == {"p2"}
        world.check()
