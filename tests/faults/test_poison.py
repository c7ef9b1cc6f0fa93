"""What cannot be handled falls out alone: its neighbours in the same batch go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness import wait_until
from wfm import kinds
from wfm.backends import runjob
from wfm.roles import TriggerManager
from wfm.service import open_bus

ONE = {"name": "one", "group_by": ["executed_obs_unit"]}


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        pytest.param({"node": "a\0b"}, "cannot be written down", id="text"),
        pytest.param({"failure": "exit", "exit_code": 2**40}, "cannot be written down", id="number"),
        pytest.param({"failure": "", "exit_code": 3}, "left with code 3", id="contradiction"),
    ],
)
def test_a_record_that_makes_no_sense_fails_its_run_alone(world, poison, message):
    """One question to the backend is about all jobs; what it says of one of them is against the database's rules."""
    world.config("long", seconds=600)
    world.pipeline("bad", [{**ONE, "name": "poisoned", "config": "long"}])
    world.pipeline("good", [ONE])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states() == {("poisoned", "RUNNING"): 1, ("one", "COMPLETED"): 1})
        (run,) = (r for r in world.runs() if r.step == "poisoned")
        record = {
            "name": run.job["name"],
            "node": "here",
            "exit_code": 0,
            "signal": None,
            "failure": "",
            "reason": "",
            "started_at": 0.0,
            "finished_at": 1.0,
            "wall_seconds": 1.0,
            "cpu_seconds": 1.0,
            "peak_memory_bytes": 1,
        }
        partial = Path(run.job["directory"], "exit.json.test")
        partial.write_text(json.dumps(record | poison))
        partial.rename(partial.with_name("exit.json"))
        world.pipeline("next", [{**ONE, "name": "two"}])
        wait_until(lambda: world.states()["two", "COMPLETED"] == 1, seconds=20)
        wait_until(lambda: world.states()["poisoned", "FAILED"] == 1, seconds=20)
        Path(run.job["directory"], runjob.CANCELLED).touch()  # the job itself still runs: let it end
        wait_until(lambda: not runjob.is_locked(run.job["directory"]))
    (run,) = (r for r in world.runs() if r.step == "poisoned")
    assert message in run.message


def test_inputs_that_are_gone_fail_their_run_alone(world):
    world.pipeline("p", [ONE])
    packages = [world.package(name) for name in "abc"]
    (world.archive / "b" / "raw.txt").unlink()
    world.register(*packages)
    with world.roles():
        wait_until(lambda: world.states() == {("one", "COMPLETED"): 2, ("one", "FAILED"): 1})
        world.check()
    (run,) = (r for r in world.runs() if r.state == "FAILED")
    assert run.failure == "input"


def test_an_outcome_that_cannot_be_written_fails_its_run_alone(world, monkeypatch):
    """Of the outcomes that are settled together one breaks the transaction, always."""
    world.pipeline("p", [ONE])
    world.environ |= {"WFM_MAX_TASK_TRIES": "1"}
    written = kinds.Collect.succeeded

    def breaks(self, tx, runs, outcomes):
        if any(runs[o.task.run_id].unit.startswith("b-") for o in outcomes):
            tx.run("SELECT 1 / 0")
        return written(self, tx, runs, outcomes)

    monkeypatch.setattr(kinds.Collect, "succeeded", breaks)
    world.register(*(world.package(name) for name in "abc"))
    with world.roles():
        wait_until(lambda: world.states() == {("one", "COMPLETED"): 2, ("one", "FAILED"): 1})
        world.check()
    (run,) = (r for r in world.runs() if r.state == "FAILED")
    assert run.unit.startswith("b-")
    assert "division by zero" in run.message


def test_a_message_that_cannot_be_handled_is_buried_alone(world, monkeypatch):
    """Of the messages that are handled together one breaks the transaction, always."""
    world.environ |= {"WFM_MAX_DELIVERIES": "1", "WFM_RECONCILE_SECONDS": "3600"}
    world.pipeline("p", [ONE])
    handle = TriggerManager.handle

    def breaks(self, tx, events):
        if any(getattr(e, "raw_data_package", "") == "poison" for e in events):
            tx.run("SELECT 1 / 0")
        return handle(self, tx, events)

    monkeypatch.setattr(TriggerManager, "handle", breaks)
    client = open_bus(world.settings).client
    client.xadd("wfm:{1}:data.arrived", {"event": b'{"raw_data_package": "poison"}'})
    world.register(*(world.package(name) for name in "ab"))
    with world.roles():
        wait_until(lambda: world.states() == {("one", "COMPLETED"): 2})
        world.check(dead_letters=1)
    client.close()
    (dead,) = world.query("SELECT reason FROM dead_letter")
    assert "division by zero" in dead.reason
