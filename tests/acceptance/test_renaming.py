"""Steps, pipelines and groupings get other names while they work, as people see it on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_editing import ONE, TWO, covered, effects, pipeline, whys
from tests.harness import World, wait_until
from tests.integration.test_cli import Cli
from wfm.model import Role

THREE = {"name": "three", "group_by": [], "depends_on": ["two"]}


@pytest.fixture
def cli(world: World) -> Cli:
    return Cli(world.environ)


def renamed(step: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {**step, "name": name, "renamed_from": step["name"], **more}


def rests_on(world: World) -> dict[tuple[int, int], tuple[Any, ...]]:
    """By unit of a step, what its coverage says, and since when."""
    return {
        (c.step_id, c.unit_id): (c.state, c.wanted, c.result, c.run_id, c.updated_at) for c in world.coverage().values()
    }


def manifest(cli: Cli, run: int) -> Any:
    return json.loads((Path(cli.json("runs", "show", run)["job"]["directory"]) / "config/manifest.json").read_text())


def products(cli: Cli, run: int) -> list[str]:
    shown = cli.json("runs", "show", run)
    assert shown["products"]
    paths = [Path(shown["job"]["directory"]) / p["path"] for p in shown["products"]]
    assert all(p.is_file() for p in paths)
    return [p["path"] for p in shown["products"] if p["type"] != "LOG"]


def is_new(cli: Cli, command: str, document: str) -> None:
    """Nothing is left to do by it."""
    (change,) = cli.json(command, "-f", "-", stdin=document)["changes"]
    assert (change["action"], change["differences"], change["renamed_steps"]) == ("unchanged", [], {})


def test_a_step_in_the_middle_gets_another_name_and_nothing_runs(world: World, cli: Cli) -> None:
    covered(world, ONE, TWO, THREE)
    before = rests_on(world)
    document = pipeline(ONE, renamed(TWO, "both"), {**THREE, "depends_on": ["both"]})
    said = cli("diff", "-f", "-", stdin=document).stdout
    assert said.splitlines()[:2] == ["pipeline p: would be updated", "  steps.both: renamed from two"]
    assert "STALE" not in said
    assert cli.json("get", "pipeline", "p")[0]["steps"][1]["name"] == "two", "diff changes nothing"
    assert effects(cli, document, "apply") == {}
    is_new(cli, "diff", document)
    is_new(cli, "apply", document)
    (got,) = cli.json("get", "pipeline", "p")
    assert [s["name"] for s in got["steps"]] == ["one", "both", "three"]
    assert "renamed_from" not in json.dumps(got)
    is_new(cli, "apply", json.dumps(got))
    is_new(cli, "apply", document)
    assert "is called 'both' now" in cli("runs", "list", "--step", "two", code=3).stderr
    assert "is called 'both' now" in cli("pause", "p/two", code=3).stderr
    assert [r["step"] for r in cli.json("runs", "list", "--step", "both")] == ["both"]
    with world.roles():
        world.rest()
        assert rests_on(world) == before
        assert world.states() == {("one", "COMPLETED"): 2, ("both", "COMPLETED"): 1, ("three", "COMPLETED"): 1}
        world.register(world.package("c"))
        wait_until(lambda: world.states()["three", "COMPLETED"] == 2)
        world.rest()
    world.check()
    *_, newest = sorted(r["id"] for r in cli.json("runs", "list", "--step", "three"))
    assert {p["step"] for p in manifest(cli, newest)["input_products"]} == {"both"}
    assert "/workspace/both/" in manifest(cli, newest)["input_products"][0]["path"]
    old, new = sorted(cli.json("runs", "list", "--step", "both"), key=lambda r: r["id"])
    for run, name in ((old, "two"), (new, "both")):
        assert f"/p/{name}/" in cli.json("runs", "show", run["id"])["job"]["directory"]
        assert products(cli, run["id"]) == [f"workspace/{name}/{run['unit']}.txt"]
        cli("runs", "logs", run["id"])
    assert "p/both" in cli("lineage", str(old["id"])).stdout


def test_a_run_that_is_under_way_comes_to_its_end(world: World, cli: Cli) -> None:
    """One runs, one waits for its slot, while step, pipeline and grouping get other names."""
    world.config("slow", seconds=2)
    slow = {**ONE, "config": "slow", "resources": {"cpu": 4}}
    world.pipeline("p", [slow, TWO])
    document = "\n---\n".join(
        [
            json.dumps({"kind": "grouping", "name": "all", "renamed_from": "everything", "rules": []}),
            pipeline(
                renamed(slow, "scan"), {**TWO, "depends_on": ["scan"]}, name="q", renamed_from="p", grouping="all"
            ),
        ]
    )
    with world.roles():
        world.register(*(world.package(n) for n in "ab"))
        wait_until(lambda: world.states() == {("one", "RUNNING"): 1, ("one", "PENDING"): 1})
        said = cli("apply", "-f", "-", stdin=document).stdout
        assert "grouping all: updated, renamed from everything\n" in said
        assert "pipeline q: updated, renamed from p\n  steps.scan: renamed from one\n" in said
        assert "STALE" not in said
        assert world.states()["scan", "RUNNING"] == 1
        wait_until(lambda: world.states() == {("scan", "COMPLETED"): 2, ("two", "COMPLETED"): 1})
        world.rest()
    world.check()
    for run in (1, 2):
        shown = cli.json("runs", "show", run)
        assert (shown["pipeline"], shown["step"]) == ("q", "scan")
        assert "/p/one/" in shown["job"]["directory"], "it lies where it was when it was made"
        (product,) = products(cli, run)
        # Inside, it is called as it was when the attempt was built: the second one was built later.
        assert product.startswith("workspace/one/" if run == 1 else "workspace/scan/")
        cli("runs", "logs", run)
    assert {p["step"] for p in manifest(cli, 3)["input_products"]} == {"scan"}
    assert "/q/two/" in cli.json("runs", "show", 3)["job"]["directory"]


def test_pipelines_and_groupings_keep_all_they_have(world: World, cli: Cli) -> None:
    covered(world, ONE)
    cli("pause", "p/one", "--reason", "a new beam")
    others = pipeline(ONE, name="other", enabled=False)
    cli("apply", "-f", "-", stdin=others)
    with world.roles(Role.TRIGGER_MANAGER):
        wait_until(lambda: set(whys(cli, "other").values()) == {"disabled"})
    before = rests_on(world)
    document = "\n---\n".join(
        [
            json.dumps({"kind": "grouping", "name": "all", "renamed_from": "everything", "rules": []}),
            pipeline(ONE, name="q", renamed_from="p", grouping="all"),
        ]
    )
    for command in ("diff", "apply"):
        assert effects(cli, document, command) == {}
    for command in ("diff", "apply"):
        assert [c["action"] for c in cli.json(command, "-f", "-", stdin=document)["changes"]] == ["unchanged"] * 2
    for kind in ("grouping", "pipeline"):
        got = cli.json("get", kind)
        assert "renamed_from" not in json.dumps(got)
        again = cli.json("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, got)))
        assert {c["action"] for c in again["changes"]} == {"unchanged"}
    assert {p["name"]: p["grouping"] for p in cli.json("get", "pipeline")} == {"other": "all", "q": "all"}
    assert rests_on(world) == before
    assert set(whys(cli, "q").values()) == {"covered"}
    assert "a new beam" in cli("status", code=None).stdout
    for words in (("why", "p"), ("trigger", "p"), ("pause", "p"), ("plan", "p"), ("runs", "list", "--pipeline", "p")):
        assert "unknown pipeline 'p': it is called 'q' now" in cli(*words, code=3).stderr, words
    for kind, old, new in (("pipeline", "p", "q"), ("grouping", "everything", "all")):
        for command in ("get", "delete"):
            assert f"unknown {kind} {old!r}: it is called {new!r} now" in cli(command, kind, old, code=3).stderr
    assert "it is called 'all' now" in cli("apply", "-f", "-", stdin=others, code=2).stderr
    told = cli.json("events", "list", "--pipeline", "q", "--limit", 1000)["events"]
    assert {e["body"]["pipeline"] for e in told} == {"p", "q"}, "events tell what was the case then, and are all found"
    assert {"pipeline.changed", "run.collected"} <= {e["type"] for e in told}
    cli("resume", "q/one")
    with world.roles():
        world.register(world.package("c"))
        wait_until(lambda: world.states() == {("one", "COMPLETED"): 3})
        world.rest()
    world.check()
    # Another pipeline may have the name now; it is another one.
    cli("apply", "-f", "-", stdin=pipeline(ONE, grouping="all", enabled=False))
    is_new(cli, "apply", pipeline(ONE, name="q", renamed_from="p", grouping="all"))
    assert len(cli.json("runs", "list", "--pipeline", "q")) == 3
    assert cli.json("runs", "list", "--pipeline", "p") == []
    told = cli.json("events", "list", "--pipeline", "p", "--limit", 1000)["events"]
    assert {e["type"] for e in told} == {"pipeline.changed"}


def test_two_steps_exchange_their_names(world: World, cli: Cli) -> None:
    """An attempt that is built afterwards finds what it reads beside what it makes, not in it."""
    world.config("slow", seconds=1)
    two = {**TWO, "config": "slow"}
    world.pipeline("p", [ONE, two])
    document = pipeline(renamed(ONE, "two"), renamed(two, "one", depends_on=["two"]))
    with world.roles():
        world.register(*(world.package(n) for n in "ab"))
        wait_until(lambda: world.states()["two", "RUNNING"] == 1)
        run = max(r.id for r in world.runs())
        world.cancel(run)
        wait_until(lambda: world.states()["two", "CANCELLED"] == 1)
        before = rests_on(world)
        assert effects(cli, document) == effects(cli, document, "apply") == {}
        is_new(cli, "apply", document)
        assert [s["name"] for s in cli.json("get", "pipeline", "p")[0]["steps"]] == ["two", "one"]
        world.rest()
        assert rests_on(world) == before
        world.retry(run)
        wait_until(lambda: world.states() == {("two", "COMPLETED"): 2, ("one", "COMPLETED"): 1})
        world.rest()
        world.check()
        directory = Path(cli.json("runs", "show", run)["job"]["directory"])
        assert directory.parts[-4:-2] == ("p", "two"), "all attempts of a run lie side by side"
        assert [p.name for p in sorted(directory.parent.iterdir())] == [f"r{run}-a1", f"r{run}-a2"]
        assert manifest(cli, run)["step"]["name"] == "one"
        assert {p["step"] for p in manifest(cli, run)["input_products"]} == {"two"}
        for attempt in (1, 2):
            cli("runs", "logs", run, "--attempt", attempt)
        world.register(world.package("c"))
        wait_until(lambda: world.states() == {("two", "COMPLETED"): 3, ("one", "COMPLETED"): 2})
        world.rest()
    world.check()
    is_new(cli, "apply", document)


def test_names_are_passed_on_and_the_first_is_given_to_another_step(world: World, cli: Cli) -> None:
    covered(world, ONE, TWO)
    before = rests_on(world)
    new = {"name": "one", "group_by": ["source"], "depends_on": ["two"]}
    document = pipeline(renamed(TWO, "three", depends_on=["two"]), renamed(ONE, "two"), new)
    assert effects(cli, document) == {"one": (0, 1, 0, 0)}
    with world.roles():
        assert effects(cli, document, "apply") == {"one": (0, 1, 0, 0)}
        wait_until(lambda: world.all_covered(4))
        world.rest()
    is_new(cli, "apply", document)
    after = rests_on(world)
    assert {k: after[k] for k in before} == before
    assert world.states() == {("two", "COMPLETED"): 2, ("three", "COMPLETED"): 1, ("one", "COMPLETED"): 1}
    digests = [(r.step, r.unit, r.result) for r in world.runs()]
    assert len({result for _, _, result in digests}) == len(digests)
    # And away again: the name of a step that was removed is not free.
    cli("apply", "-f", "-", stdin=pipeline(renamed(TWO, "three", depends_on=["two"]), renamed(ONE, "two")))
    said = cli("apply", "-f", "-", stdin=pipeline({**ONE, "name": "one", "renamed_from": "two"}), code=2).stderr
    assert "step 'two' cannot be called 'one': a step that was removed was called so" in said


def test_files_of_old_names_are_purged(world: World, cli: Cli) -> None:
    kept = {**ONE, "retention_days": 0}
    world.config("c", exit=3)
    world.pipeline("p", [{**kept, "config": "c"}])
    with world.roles(*set(Role) - {Role.WORKER}), world.roles(Role.WORKER) as (worker,):
        world.register(world.package("a"))
        wait_until(lambda: world.states() == {("one", "FAILED"): 1})
        cli("apply", "-f", "-", stdin=pipeline(renamed({**kept, "config": "c"}, "uno"), name="q", renamed_from="p"))
        cli("runs", "retry", 1)
        wait_until(lambda: world.runs()[0].attempt == 2 and world.states() == {("uno", "FAILED"): 1})
        world.rest()
        base = world.directory / "pipelines"
        assert len(list(base.glob("p/one/*/r1-a*"))) == 2
        assert "does not like its input" in cli("runs", "logs", 1, "--attempt", 1).stdout
        (line,) = cli.json("why", "q/uno", "a")
        assert {f["log"] for f in line["last_failures"]} == {"this software does not like its input"}
        worker._commit(next(s.work for s in worker._sweeps if s.name == "retention"))
        wait_until(lambda: not list(base.glob("p/one/*/r1-a*")), what="the attempts are purged")


def test_what_cannot_be_renamed_is_said_all_at_once(world: World, cli: Cli) -> None:
    world.pipeline("other", [ONE])
    world.pipeline("gone", [ONE])
    world.pipeline("p", [ONE, {**TWO, "name": "removed", "depends_on": []}])
    world.pipeline("p", [ONE, TWO, {"name": "four"}])
    cli("delete", "pipeline", "gone")
    documents = world.directory / "names.yaml"
    documents.write_text(
        """
kind: pipeline
name: other
renamed_from: p
grouping: everything
steps:
  - {name: one, software: copy, version: 1.0.0}
---
kind: grouping
name: everything
renamed_from: everything
---
kind: pipeline
name: p
grouping: everything
steps:
  - {name: one, software: copy, version: 1.0.0}
  - name: two
    renamed_from: one
    software: copy
    version: 1.0.0
  - name: removed
    renamed_from: four
    software: copy
    version: 1.0.0
  - {name: five, renamed_from: two, software: nothing, version: 1.0.0}
  - {name: six, renamed_from: two, software: copy, version: 1.0.0}
"""
    )
    before = cli.json("get", "pipeline")
    said = cli("apply", "-f", documents, code=2).stderr.replace(f"{documents}:", "")
    assert [line.removeprefix("error: ") for line in said.splitlines()] == [
        "4: pipeline 'other' cannot be renamed_from 'p': there are both, and they stay two. Leave renamed_from out, or"
        " give 'p' a name that is free",
        "11: grouping 'everything': renamed_from is its own name; leave it out",
        "23: step 'four' cannot be called 'removed': a step that was removed was called so, and its history keeps the"
        " name. Give it another one",
        "26: unknown software 'nothing'; allowed: copy",
        "27: step 'six' and step 'five' are both renamed_from 'two': only one can be it",
    ]
    assert cli.json("get", "pipeline") == before
    said = cli("apply", "-f", "-", stdin=pipeline(ONE, name="gone", renamed_from="p"), code=2).stderr
    assert "pipeline 'p' cannot be called 'gone': a pipeline that was removed was called so" in said


def test_where_there_is_nothing_to_rename_things_are_new(world: World, cli: Cli) -> None:
    """A file that was written for another deployment, which had them under other names."""
    document = pipeline(renamed(ONE, "scan"), {**TWO, "depends_on": ["scan"]}, name="q", renamed_from="p")
    (change,) = cli.json("apply", "-f", "-", stdin=document)["changes"]
    assert (change["action"], change["renamed_from"], change["renamed_steps"]) == ("create", "", {})
    is_new(cli, "apply", document)
    # What is called so later is another one, also for the old file.
    later = pipeline(renamed(ONE, "scan"), {**TWO, "depends_on": ["scan"]}, ONE, name="q", renamed_from="p")
    cli("apply", "-f", "-", stdin=later)
    cli("apply", "-f", "-", stdin=pipeline(ONE))
    is_new(cli, "apply", later)
    assert [p["name"] for p in cli.json("get", "pipeline")] == ["p", "q"]
