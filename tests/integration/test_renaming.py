"""What a rename must not touch: decisions, what a job reads and where it leaves its results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from tests.acceptance.test_editing import ONE, TWO, covered, pipeline
from tests.acceptance.test_renaming import THREE, renamed
from tests.harness import ACTOR, World, wait_until
from wfm import campaign, documents, gaps, jobs, views
from wfm.backends.local import LocalBackend
from wfm.decide import Capacity
from wfm.errors import DocumentError
from wfm.gaps import evaluation
from wfm.kinds import Stage, link_upstream
from wfm.model import Role
from wfm.store import TaskRow, Tx, result_hash
from wfm.whatif import WhatIf, what_if

OTHERS = pipeline(
    renamed(ONE, "uno"), renamed(TWO, "due", depends_on=["uno"]), renamed(THREE, "tre", depends_on=["due"])
)


def reconciled(world: World, monkeypatch: pytest.MonkeyPatch) -> list[gaps.Pair]:
    """The pairs that a reconciliation decides again."""
    seen: list[gaps.Pair] = []
    evaluate = evaluation.evaluate_chunk
    with monkeypatch.context() as patch, world.store.begin() as tx:
        patch.setattr(
            evaluation, "evaluate_chunk", lambda tx, pairs, *a: (seen.extend(pairs), evaluate(tx, pairs, *a))[1]
        )
        gaps.reconcile(tx, 1, ACTOR)
    return seen


def test_nothing_that_is_covered_is_decided_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    covered(world, ONE, TWO, THREE)
    assert reconciled(world, monkeypatch) == []
    world.apply(OTHERS)
    assert {s for s, _ in world.states()} == {"uno", "due", "tre"}
    assert reconciled(world, monkeypatch) == []


def test_the_reason_of_a_unit_tells_the_name_of_today(world: World) -> None:
    world.pipeline("p", [ONE, TWO])
    world.register(world.package("a"))
    with world.store.begin() as tx:
        gaps.reconcile(tx, 1, ACTOR)
    assert world.coverage()["two", "all"].reason == "0 of 1 units of one are covered"
    world.apply(pipeline(renamed(ONE, "uno"), {**TWO, "depends_on": ["uno"]}))
    with world.store.begin() as tx:
        gaps.reconcile(tx, 1, ACTOR)
    assert world.coverage()["two", "all"].reason == "0 of 1 units of uno are covered"


def test_no_step_gets_another_name_while_a_job_is_built(world: World) -> None:
    """What it reads and where it leaves its results is asked for in several statements."""
    covered(world, ONE, TWO)

    def apply(document: str) -> None:
        read = documents.load([("test.yaml", document)])
        with world.store.begin() as tx:
            tx.run("SET LOCAL lock_timeout TO '200ms'")
            documents.apply(tx.conn, read, location_id=1, actor="test")

    (run,) = (r.id for r in world.runs() if r.step == "two")
    swap = pipeline(renamed(ONE, "two"), renamed(TWO, "one", depends_on=["two"]))
    with world.store.begin() as tx:
        link_upstream(tx, [run])
        apply(pipeline(ONE, {**TWO, "description": "all other changes go on"}))
        with pytest.raises(OperationalError, match="lock timeout"):
            apply(swap)
    apply(swap)


def test_a_result_is_the_same_whatever_its_step_is_called(world: World) -> None:
    """What reads it goes by its digest: made again, it must have the same."""
    covered(world, ONE, TWO)
    world.apply(pipeline(renamed(ONE, "two"), renamed(TWO, "one", depends_on=["two"])))
    with world.roles():
        world.register(world.package("c"))
        wait_until(lambda: world.states() == {("two", "COMPLETED"): 3, ("one", "COMPLETED"): 2})
        world.rest()
    identity = {s.id: s.identity for s in world.query("SELECT id, identity FROM reduction_step")}
    assert sorted(identity.values()) == ["one", "two"]
    for r in world.runs():
        assert r.result == result_hash(identity[r.step_id], r.unit, r.wanted)


def test_where_there_is_a_fault_nothing_is_renamed(world: World) -> None:
    """Also for who goes on in the same transaction."""
    world.pipeline("p", [ONE])
    read = documents.load([("x", pipeline(renamed(ONE, "uno", software="nothing"), name="q", renamed_from="p"))])
    with world.store.begin() as tx:
        with pytest.raises(DocumentError, match="unknown software 'nothing'"):
            documents.apply(tx.conn, read, location_id=1, actor="test")
        assert [p["name"] for p in documents.get(tx.conn, "pipeline")] == ["p"]


def test_an_attempt_that_is_staged_once_more_is_the_same(world: World) -> None:
    """Whoever stages it after a worker died finds the same names, else the job would find other inputs."""
    covered(world, ONE)
    world.pipeline("p", [ONE, TWO])
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        wait_until(lambda: world.states()["two", "STAGING_DATA"] == 1)

    def staged(tx: Tx) -> Any:
        kind = Stage(world.settings, LocalBackend(), 1)
        task = TaskRow(id=1, kind="stage", run_id=run, attempt=1, epoch=1, tries=0, payload={})
        plan = kind.prepare(tx, [task])[1]
        return jobs.manifest(plan), jobs.inputs(plan), plan.spec, jobs.directories(plan.facts.step)

    run = max(r.id for r in world.runs())
    with world.store.begin() as tx:
        before = staged(tx)
    world.apply(pipeline(renamed(ONE, "two"), renamed(TWO, "one", depends_on=["two"]), name="q", renamed_from="p"))
    with world.store.begin() as tx:
        assert staged(tx) == before
    assert {p["step"] for p in before[0]["input_products"]} == {"one"}
    with world.roles():
        wait_until(lambda: world.states() == {("two", "COMPLETED"): 2, ("one", "COMPLETED"): 1})
        world.rest()
    world.check()


def test_the_future_is_the_same_under_other_names(world: World) -> None:
    covered(world, ONE)
    world.pipeline("p", [ONE, TWO])

    def asked(two: dict[str, Any]) -> WhatIf:
        document = pipeline(renamed(ONE, "uno"), renamed({**two, "depends_on": ["uno"]}, "due"))
        return what_if(world.store, documents.load([("x", document)]), 1, limits=(Capacity(100), Capacity(100)))

    found = asked(TWO)
    assert (found.added, found.gone, found.shifts) == ([], [], [])
    assert [c.renamed_steps for c in found.changes] == [{"uno": "one", "due": "two"}]
    found = asked({**TWO, "group_by": ["source"]})
    assert [(r.step, r.unit.split("-")[0]) for r in found.added] == [("due", "ngc253")]
    assert [(r.step, r.unit) for r in found.gone] == [("two", "all")]
    assert {(s.step, s.units) for s in found.shifts} == {("due", 1)}


def test_a_campaign_keeps_its_steps_but_not_its_name_nor_that_of_its_template(world: World) -> None:
    covered(world, ONE)
    with world.store.begin() as tx:
        campaign.create(tx, "dr1", "p", location_id=1, actor=ACTOR)
    world.apply(pipeline(ONE, name="q", renamed_from="p"))
    with world.store.begin() as tx:
        (document,) = documents.get(tx.conn, "pipeline", "dr1")
    del document["kind"]
    world.apply(json.dumps({"kind": "pipeline", **document, "name": "release-1", "renamed_from": "dr1"}))
    with world.store.begin() as tx:
        (line,) = views.campaigns(tx.conn, 1)
    assert (line.name, line.template) == ("release-1", "q")
    (step,) = document["steps"]
    document |= {"name": "release-1", "steps": [{**step, "name": "uno", "renamed_from": "one"}]}
    with pytest.raises(DocumentError, match="is a campaign: its steps cannot change"):
        world.apply(json.dumps({"kind": "pipeline", **document}))
