"""The main path on real Postgres, real Valkey, real processes: gaps become runs, runs become products."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness import ACTOR, wait_until
from wfm import acts, views
from wfm.model import Role

ONE = [{"name": "one", "group_by": ["executed_obs_unit"], "config": None}]
TWO = [
    {"name": "one", "group_by": ["executed_obs_unit"]},
    {"name": "two", "depends_on": ["one"], "group_by": []},
]


def done_once(world):
    """Every execution that the jobs themselves wrote down happened exactly once."""
    counts = world.executions()
    assert set(counts.values()) == {1}, counts
    return len(counts)


def test_a_package_becomes_a_product(world):
    world.pipeline("p", ONE)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1), what="covered")
        world.check()
    (run,) = world.runs()
    assert (run.state, run.attempt, run.exit_code) == ("COMPLETED", 1, 0)
    products = world.query("SELECT * FROM data_product WHERE type = 'SCIENCE'")
    path = os.path.join(run.job["directory"], products[0].path)
    assert Path(path).read_text() == "data of a\n"
    assert done_once(world) == 1


def test_two_steps_fan_in_runs_once_for_a_registration_and_late_data_reruns_what_it_touches(world):
    world.pipeline("p", TWO)
    with world.roles():
        world.register(*(world.package(f"a{i:02}") for i in range(12)))
        wait_until(lambda: world.all_covered(13), what="all covered")
        assert world.states() == {("one", "COMPLETED"): 12, ("two", "COMPLETED"): 1}
        first = next(r for r in world.runs() if r.step == "two")
        world.register(world.package("late"))
        wait_until(lambda: world.all_covered(14), what="all covered again")
        assert world.states() == {("one", "COMPLETED"): 13, ("two", "COMPLETED"): 2}
        world.check()
    second = [r for r in world.runs() if r.step == "two"][-1]
    old = world.query("SELECT superseded_by FROM data_product WHERE run_id = :id", id=first.id)
    assert {p.superseded_by for p in old} == {second.id}
    inputs = world.query("SELECT 1 FROM run_input WHERE run_id = :id", id=second.id)
    assert len(inputs) == 13
    assert done_once(world) == 15


def test_what_one_transaction_registers_is_decided_on_as_a_whole(world):
    """Messages come in batches of two; a unit over all packages must not run with two of ten."""
    world.environ |= {"WFM_BATCH_SIZE": "2"}
    world.pipeline("p", [{"name": "one", "group_by": []}])
    with world.roles(Role.TRIGGER_MANAGER) as services:
        wait_until(lambda: world.query("SELECT 1 FROM task WHERE kind = 'reconcile' AND due_at > now()"))
        world.check()
        world.register(*(world.package(f"a{i}") for i in range(10)))
        wait_until(world.runs)
        wait_until(lambda: services[0].bus.backlog(["data.arrived"])["data.arrived"] == 0)
    assert [r.state for r in world.runs()] == ["PENDING"]


def test_a_registration_while_nobody_works_is_found_at_start_and_again_by_reconciliation(world):
    world.pipeline("p", ONE)
    world.register(world.package("a"))
    # A catalogue entry that no event tells of:
    world.register(world.package("b"))
    world.query(
        "DELETE FROM event WHERE body ->> 'raw_data_package' = (SELECT max(id)::text FROM raw_data_package) RETURNING 1"
    )
    with world.roles():
        wait_until(lambda: world.all_covered(2))
    assert done_once(world) == 2


def test_the_door_for_other_systems_takes_names_and_ids_and_repetition(world):
    world.pipeline("p", ONE)
    with world.roles() as services:
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        client = services[0].bus.client
        for body in (b'{"raw_data_package": "a"}', b'{"raw_data_package": 1}', b'{"raw_data_package": "nobody"}'):
            client.xadd("wfm:{1}:data.arrived", {"event": body})
        wait_until(lambda: client.xlen("wfm:{1}:data.arrived") == 0)
        world.check()
    assert len(world.runs()) == 1


def test_new_software_new_config_and_changed_data_make_exactly_the_units_stale(world):
    world.config("c", seconds=0)
    world.pipeline("p", [{**ONE[0], "config": "c"}])
    with world.roles():
        world.register(world.package("a"), world.package("b"))
        wait_until(lambda: world.all_covered(2))
        world.register(world.package("a", "changed\n"))
        wait_until(lambda: len(world.runs()) == 3 and world.all_covered(2))
        world.config("c", seconds=0.001)
        wait_until(lambda: len(world.runs()) == 5 and world.all_covered(2))
        world.apply(
            f"""
            kind: software
            name: copy
            versions:
              - version: 1.1.0
                command: [python, {world.program}]
            """
        )
        wait_until(lambda: len(world.runs()) == 7 and world.all_covered(2))
        world.check()
    reasons = [r.reason for r in world.query("SELECT reason FROM transition WHERE trigger = 'create' ORDER BY run_id")]
    assert reasons[2] == "stale: newer input"
    assert reasons[3] == "stale: the config has a newer revision"
    assert reasons[5] == "stale: copy 1.1.0 is wanted now"


# --- what goes wrong ---


def test_a_step_that_exits_3_fails_for_its_unit_and_blocks_what_depends_on_it(world):
    world.config("c", exit=3, seconds=0)
    world.pipeline("p", [{**TWO[0], "config": "c"}, TWO[1]])
    world.pipeline("healthy", ONE)
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "FAILED"] == 1 and world.states()["one", "COMPLETED"] == 1)
        wait_until(lambda: world.coverage()["two", "all"].why == "upstream_failed")
    run = next(r for r in world.runs() if r.state == "FAILED")
    assert run.exit_code == 3
    assert "3" in run.message
    assert "blocked" in world.coverage()["two", "all"].reason


def test_a_failed_attempt_is_repeated_as_often_as_allowed_and_again_when_asked(world):
    world.config("c", exit=3)
    world.pipeline("p", [{**ONE[0], "config": "c", "max_retries": 2}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "FAILED"] == 1)
        (run,) = world.runs()
        assert run.attempt == 3
        result = world.retry(run.id)
        assert not result.refused
        wait_until(lambda: world.runs()[0].attempt == 6 and world.runs()[0].state == "FAILED")
        world.check()
    assert done_once(world) == 6


def test_a_run_that_waits_for_its_next_attempt_says_what_went_wrong(world):
    world.environ |= {"WFM_RETRY_BACKOFF_SECONDS": "600"}
    world.config("c", exit=3)
    world.pipeline("p", [{**ONE[0], "config": "c", "max_retries": 1}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "RETRY_WAIT"] == 1)
        (run,) = world.runs()
        assert "another attempt" in run.waiting_for
        assert "3" in run.waiting_for
        world.cancel(run.id)
        wait_until(lambda: world.states()["one", "CANCELLED"] == 1)
    assert world.runs()[0].waiting_for == ""


def test_a_missing_file_a_wrong_checksum_and_a_missing_command_fail_with_a_clear_message_and_stop_nothing_else(world):
    world.apply(
        """
        kind: software
        name: nowhere
        versions:
          - version: 1.0.0
            command: [/does/not/exist]
        """
    )
    world.pipeline("p", [{**ONE[0], "max_retries": 2}])
    world.pipeline("q", [{"name": "gone", "software": "nowhere", "max_retries": 2}])
    missing = world.package("missing")
    (world.archive / "missing" / "raw.txt").unlink()
    with world.roles():
        world.register(world.package("good"), missing, world.package("bad", checksum="sha256:" + "0" * 64))
        wait_until(lambda: world.states()["one", "FAILED"] == 2 and world.states()["one", "COMPLETED"] == 1)
        wait_until(lambda: world.states()["gone", "FAILED"] == 1)
        world.check()
    messages = {(r.step, r.unit.split("-")[0]): r.message for r in world.runs() if r.state == "FAILED"}
    assert "raw.txt" in messages["one", "missing"]
    assert "instead of sha256:0000" in messages["one", "bad"]
    gone = next(r for r in world.runs() if r.step == "gone")
    assert gone.failure == "input" or "/does/not/exist" in gone.message
    assert world.coverage()["one", next(r.unit for r in world.runs() if r.unit.startswith("bad"))].why == "failed"


def test_a_location_that_is_away_holds_its_runs_and_fails_none(world):
    world.pipeline("p", ONE)
    packages = [world.package(name) for name in "ab"]
    away = world.archive.rename(world.archive.with_name("unmounted"))
    with world.roles():
        world.register(*packages)
        wait_until(lambda: sum("held" in r.waiting_for for r in world.runs()) == 2)
        for r in world.runs():
            assert r.state == "STAGING_DATA"
            assert f"location archive is not there, no directory {world.archive} " in r.waiting_for
        with world.store.begin() as tx:
            lines = views.why(tx.conn, pipeline="p", location_id=1)
        assert all(f"no directory {world.archive} " in line.change for line in lines)
        away.rename(world.archive)
        world.act(lambda tx: tx.run("UPDATE task SET due_at = now() WHERE kind = 'stage' AND state = 'ready'"))
        wait_until(lambda: world.states() == {("one", "COMPLETED"): 2})
        world.rest()
    assert {(r.attempt, r.failures) for r in world.runs()} == {(1, 0)}


def test_cancel_stops_the_job_and_is_confirmed_and_blocks_until_asked(world):
    world.config("c", seconds=600)
    world.pipeline("p", [{**ONE[0], "config": "c"}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "RUNNING"] == 1 and world.executions())
        (run,) = world.runs()
        pid = world.ledger.lines()[-1].pid
        world.cancel(run.id)
        wait_until(lambda: world.runs()[0].state == "CANCELLED")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        wait_until(lambda: world.coverage()["one", run.unit].why == "cancelled")
        assert "a test" in world.coverage()["one", run.unit].reason
        world.check()


def test_cancelling_before_anything_was_staged_needs_no_job(world):
    world.pipeline("p", ONE)
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 1)
    (run,) = world.runs()
    world.cancel(run.id)
    assert world.states() == {("one", "CANCELLING"): 1}
    with world.roles():
        wait_until(lambda: world.states()["one", "CANCELLED"] == 1)
        world.check()
    assert not world.executions()


def test_a_job_that_vanished_is_fenced_and_repeated_after_a_grace_period(world):
    world.environ |= {"WFM_VANISH_GRACE_SECONDS": "0.5"}
    world.config("c", seconds=600)
    world.pipeline("p", [{**ONE[0], "config": "c", "max_retries": 1}])
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "RUNNING"] == 1 and world.executions())
        supervisor = int(world.runs()[0].handle.split(":")[0])
        os.kill(supervisor, signal.SIGKILL)
        wait_until(lambda: world.runs()[0].attempt == 2 and len(world.executions()) == 2)
        reasons = world.query("SELECT message FROM run")
        assert "vanished" in reasons[0].message
        world.cancel(world.runs()[0].id)
        wait_until(lambda: world.states()["one", "CANCELLED"] == 1)
        world.check()
    done_once(world)


def test_a_run_whose_task_and_message_are_gone_is_found_by_looking_again(world):
    world.pipeline("p", ONE)
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 1)
    world.query("DELETE FROM task WHERE run_id IS NOT NULL RETURNING 1")
    world.query("UPDATE event SET done_at = now() RETURNING 1")
    world.query("UPDATE run SET look_again_at = now() RETURNING 1")
    with world.roles():
        wait_until(lambda: world.all_covered(1))
    assert done_once(world) == 1


def test_a_package_that_changes_under_a_built_run_is_not_taken_for_the_old_one(world):
    world.pipeline("p", ONE)
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        world.register(world.package("a"))
        wait_until(lambda: world.states()["one", "STAGING_DATA"] == 1)
    world.register(world.package("a", "changed\n"))
    with world.roles():
        wait_until(lambda: world.all_covered(1))
    first, second = world.runs()
    assert (first.state, second.state) == ("FAILED", "COMPLETED")
    assert "other content" in first.message
    assert done_once(world) == 1


def test_pausing_starts_nothing_and_resuming_goes_on(world):
    world.pipeline("p", ONE)
    world.act(lambda tx: acts.pause(tx, "p", None, None, ACTOR))
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: [c.why for c in world.coverage().values()] == ["paused"])
        assert not world.runs()
        world.act(lambda tx: acts.resume(tx, "p", None, None, ACTOR))
        wait_until(lambda: world.all_covered(1))


def test_a_manual_pipeline_waits_for_a_request_and_then_runs_through(world):
    world.pipeline("p", TWO, trigger="MANUAL")
    with world.roles():
        world.register(world.package("a"))
        wait_until(lambda: {c.why for c in world.coverage().values()} == {"manual_only", "waiting_for_upstream"})
        world.act(lambda tx: acts.trigger(tx, "p", None, None, ACTOR))
        wait_until(lambda: world.all_covered(2))
        world.register(world.package("b"))
        wait_until(lambda: sorted(c.why for c in world.coverage().values())[-1] == "waiting_for_upstream")
        assert len(world.runs()) == 2


def test_cores_and_memory_that_steps_ask_for_are_never_exceeded(world):
    world.config("c", seconds=0.3)
    world.pipeline("p", [{**ONE[0], "config": "c", "resources": {"cpu": 2, "memory_gb": 1}}])
    with world.roles():
        world.register(*(world.package(f"a{i}") for i in range(6)))
        most = 0
        while not world.all_covered(6):
            held = [r for r in world.runs() if r.state in ("STAGING_DATA", "SUBMITTED", "RUNNING")]
            most = max(most, len(held))
            waiting = [r.waiting_for for r in world.runs() if r.state == "PENDING" and r.waiting_for]
            assert all("free cores" in w for w in waiting)
            time.sleep(0.02)
    assert most == 2


def test_runs_that_cannot_start_crowd_out_no_others(world, monkeypatch):
    monkeypatch.setattr("wfm.roles.CANDIDATES", 2)
    world.pipeline("paused", [{**ONE[0], "name": "held"}])
    world.pipeline("large", [{**ONE[0], "name": "huge", "resources": {"cpu": 99}}])
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(*(world.package(f"a{i}") for i in range(3)))
        wait_until(lambda: world.states() == {("held", "PENDING"): 3, ("huge", "PENDING"): 3})
    world.act(lambda tx: acts.pause(tx, "paused", None, None, ACTOR))
    world.pipeline("p", ONE)
    with world.roles():
        wait_until(lambda: world.states()["one", "COMPLETED"] == 3)
    assert {("held", "PENDING"): 3, ("huge", "PENDING"): 3}.items() <= world.states().items()


def test_garbage_goes_to_the_dead_letters_and_harms_no_neighbour(world):
    world.pipeline("p", ONE)
    with world.roles() as services:
        client = services[0].bus.client
        client.xadd("wfm:{1}:data.arrived", {"event": b"\xff\x00garbage"})
        client.xadd("wfm:{1}:data.arrived", {"event": b'{"raw_data_package": [1]}'})
        client.xadd("wfm:{1}:job.built", {"something": b"else"})
        world.register(world.package("a"))
        wait_until(lambda: world.all_covered(1))
        world.check(dead_letters=3)
    dead = world.query("SELECT stream, reason, body FROM dead_letter ORDER BY id")
    assert {bytes(d.body) for d in dead} == {b"\xff\x00garbage", b'{"raw_data_package": [1]}', b"something: else"}
    assert all("cannot be decoded" in d.reason for d in dead)


# --- faults ---


def test_redis_emptied_again_and_again_changes_nothing(world):
    world.config("c", seconds=0.05)
    world.pipeline("p", [{**TWO[0], "config": "c"}, TWO[1]])
    with world.roles() as services:
        client = services[0].bus.client
        world.register(*(world.package(f"a{i}") for i in range(8)))
        while not world.all_covered(9):
            client.flushdb()
            time.sleep(0.1)
        world.check()
    assert world.states() == {("one", "COMPLETED"): 8, ("two", "COMPLETED"): 1}
    assert done_once(world) == 9


def test_several_copies_of_every_role_do_nothing_twice(world):
    world.pipeline("p", TWO)
    with world.roles(copies=3):
        for i in range(5):
            world.register(*(world.package(f"a{i}{j}") for j in range(4)))
        wait_until(lambda: world.all_covered(21))
        world.check()
    done_once(world)
    assert world.states()["one", "COMPLETED"] == 20


def test_sigterm_hands_back_what_is_in_hand_and_the_next_one_goes_on(world):
    world.config("c", seconds=1.0)
    world.pipeline("p", [{**ONE[0], "config": "c"}])
    processes = [world.spawn(r) for r in Role]
    try:
        world.register(world.package("a"))
        wait_until(world.executions)
        began = time.monotonic()
        for p in processes:
            p.terminate()
        assert [p.wait(timeout=15) for p in processes] == [0, 0, 0, 0]
        assert time.monotonic() - began < 10
        assert not world.query("SELECT 1 FROM task WHERE state = 'leased'")
        processes = [world.spawn(r) for r in Role]
        wait_until(lambda: world.all_covered(1))
        world.check()
    finally:
        for p in processes:
            p.terminate()
            p.wait(timeout=15)
    assert done_once(world) == 1
