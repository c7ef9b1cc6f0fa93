"""The checker is shown faults that were planted; it must name each."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.faults.checker import EFFECTS, check, examine
from tests.faults.history import Call
from tests.faults.ledger import Ledger
from tests.harness import World, wait_until
from wfm.errors import WfmError
from wfm.model import Role
from wfm.service import open_bus, open_store

STEPS = [{"name": "one", "group_by": ["executed_obs_unit"]}, {"name": "two", "depends_on": ["one"], "group_by": []}]


@pytest.fixture(scope="module")
def finished(servers, migrated, tmp_path_factory) -> Iterator[World]:
    """A world in which all went well: 3 packages, one of them late; 5 runs, one cancelled and retried."""
    with servers.database(template=migrated) as database, servers.redis() as redis_url:
        world = World(tmp_path_factory.mktemp("finished"), database, redis_url)
        world.pipeline("p", STEPS)
        with world.roles(Role.TRIGGER_MANAGER):
            world.register(world.package("a"), world.package("b"))
            wait_until(lambda: len(world.runs()) == 2)
        world.cancel(1)
        world.retry(1)
        with world.roles():
            wait_until(lambda: world.all_covered(3))
            world.register(world.package("c"))
            wait_until(lambda: world.all_covered(4))
            world.check()
        world.close()
        yield world


@pytest.fixture
def world(finished, servers, tmp_path) -> Iterator[World]:
    """A copy of that world, to plant one fault in. Files and Redis are shared: plants there are taken back."""
    name = make_url(finished.environ["WFM_DATABASE_URL"]).database
    with servers.database(template=name) as database:
        world = copy.copy(finished)
        world.environ = {**finished.environ, "WFM_DATABASE_URL": database}
        world.history = copy.deepcopy(finished.history)
        world.ledger = Ledger(shutil.copy(finished.ledger.path, tmp_path))
        world.store = open_store(world.settings)
        yield world
        world.close()


def test_a_sound_world_is_found_sound_and_was_looked_at(world):
    report = examine(world)
    assert not report.violations
    assert (report.runs, report.completed, report.packages, report.calls) == (5, 5, 3, 5)
    assert report.jobs == 5
    assert report.effects == 15
    assert report.products == 10  # with a log each
    assert report.transitions >= 5 * 5 + 2  # a short job is never seen running
    assert (report.repeated, report.unknown, report.consumers) == (0, 0, 0)


# --- plants: each is followed by what the checker must say of it ---


def forget_run(world):
    for statement in (
        "DELETE FROM physical_copy c USING data_product d WHERE d.id = c.product_id AND d.run_id = 2",
        *(f"DELETE FROM {table} WHERE run_id = 2" for table in ("data_product", "coverage", "task", "transition")),
        "DELETE FROM run_input WHERE 2 IN (run_id, upstream_run_id)",
        "DELETE FROM run WHERE id = 2",
    ):
        world.query(f"{statement} RETURNING 1")


def done_without_deed(world):
    """A package arrives, and its message is ticked off by somebody who did nothing."""
    world.register(world.package("late"))
    world.query("UPDATE event SET done_at = now() WHERE done_at IS NULL RETURNING 1")
    open_bus(world.settings).client.delete("wfm:{1}:data.arrived")


def second_computation(world):
    world.ledger.write("job 1.2", "begin", step="one", unit="a")


def lines(world, keep):
    text = world.ledger.path.read_text().splitlines(keepends=True)
    world.ledger.path.write_text("".join(x for x in text if keep(json.loads(x))))


def sql(statement):
    return lambda world: world.query(f"{statement} RETURNING 1")


def refused_but_done(world):
    with pytest.raises(WfmError):
        world.history.call([Call("cancel", 1)], lambda: (_ for _ in ()).throw(WfmError("no")))
    world.history.calls = [c for c in world.history.calls if (c.operation, c.outcome) != ("cancel", "ok")]


def unkept_promise(world):
    world.history.call([Call("register", "x", {"raw.txt": "sha256:1"})], lambda: None)


def other_content(world):
    for call in world.history.of("register"):
        call.content = {"raw.txt": "sha256:" + "1" * 64}


def twice_under_one_epoch(world):
    world.ledger.write("stage 3.1", "begin", 1)
    world.ledger.write("stage 3.1", "failed", 1)


def repeat(world):
    world.ledger.write("collect 3.1", "begin", 7)
    world.ledger.write("collect 3.1", "end", 7)


PLANTS: dict[str, tuple[Callable[[World], object], str]] = {
    "a run is gone": (forget_run, r"run 2: does not exist, but job 2\.1 happened"),
    "a run is gone, its unit says so": (forget_run, r"unit one b\S*: nobody looked at it; it holds b/raw\.txt"),
    "a message is done and nobody acted": (done_without_deed, r"unit one late\S*: nobody looked at it"),
    "late data never reached the step above": (done_without_deed, r"run \d: covers two all.*did not read late/raw"),
    "a job computes twice": (second_computation, r"run 1 \(one a\S*, attempt 2\): job 1\.2 computed 2 times: begin by"),
    "a job never ran": (
        lambda w: lines(w, lambda x: x[0] != "job 3.1"),
        r"run 3 \(two all, attempt 1\): COMPLETED, but job 3\.1 never ended",
    ),
    "nobody collected": (
        lambda w: lines(w, lambda x: x[0] != "collect 3.1"),
        r"run 3: collect 3\.1 is done by epoch 1, which never ended it: nothing",
    ),
    "another epoch's outcome was taken": (
        sql("UPDATE task SET epoch = 9 WHERE kind = 'submit' AND run_id = 3"),
        r"run 3: submit 3\.1 is done by epoch 9, which never ended it: begin epoch 1, end epoch 1",
    ),
    "one lease, two deeds": (twice_under_one_epoch, r"stage 3\.1 was done 2 times under the one epoch 1"),
    "an effect is repeated": (repeat, r"collect 3\.1 was repeated, which nothing here explains"),
    "a gap in the history": (
        sql("DELETE FROM transition WHERE run_id = 3 AND version = 3"),
        r"history: run 3: version 4 follows version 2",
    ),
    "an outcome was accepted twice": (
        sql(
            "INSERT INTO transition SELECT run_id, 99, attempt, trigger, source, dest, chart_version, actor, reason, at"
            " FROM transition WHERE run_id = 3 AND trigger = 'collect'"
        ),
        r"run 3: collect 3\.1 was accepted 2 times",
    ),
    "an event was never written": (
        sql("DELETE FROM event WHERE run_id = 3 AND type = 'job.running' OR run_id = 3 AND type = 'job.submitted'"),
        r"run 3: version 3 entered SUBMITTED, but job\.submitted was never written",
    ),
    "an event is pending": (
        sql("UPDATE event SET done_at = NULL WHERE run_id = 3 AND type = 'run.collected'"),
        r"event \d+: run\.collected of run 3 is pending for trigger-manager",
    ),
    "a lease is stuck": (
        sql("UPDATE task SET state = 'leased', lease_until = now(), owner = 'x' WHERE kind = 'stage' AND run_id = 3"),
        r"task \d+: stage of run 3, attempt 1: the lease is held by x, epoch 1",
    ),
    "a task is open": (
        sql("UPDATE task SET state = 'ready' WHERE kind = 'stage' AND run_id = 3"),
        r"task \d+: stage of run 3, attempt 1: it is still open",
    ),
    "a run stands still": (
        sql("UPDATE run SET state = 'RUNNING', finished_at = NULL WHERE id = 3"),
        r"run 3: neither ended nor stuck: RUNNING",
    ),
    "a failure without a reason": (
        sql("UPDATE run SET state = 'FAILED' WHERE id = 3"),
        r"run 3 \(two all, attempt 1\): FAILED without a reason",
    ),
    "a failed run with products": (
        sql("UPDATE run SET state = 'FAILED' WHERE id = 3"),
        r"run 3 \(two all, attempt 1\): FAILED, but has 2 products",
    ),
    "a unit rests for a reason that should have passed": (
        sql("UPDATE coverage SET state = 'waiting', why = 'newer_input', reason = 'x' WHERE run_id = 2"),
        r"unit one b\S*: no result, no run, no lasting reason: waiting, newer_input, 'x'",
    ),
    "a product's row is gone": (
        sql(
            "WITH d AS (DELETE FROM physical_copy c USING data_product p WHERE p.id = c.product_id AND p.run_id = 2"
            " AND type <> 'LOG' RETURNING product_id) DELETE FROM data_product USING d WHERE id = d.product_id"
        ),
        r"run 2 \(.*\): its job wrote \S+ \(sha256:\w+\), registered is nothing",
    ),
    "a product is of another attempt": (
        sql("UPDATE data_product SET attempt = 1 WHERE run_id = 1"),
        r"run 1 \(.*, attempt 2\): product \S+ is of attempt 1",
    ),
    "an old result still stands": (
        sql("UPDATE data_product SET superseded_by = NULL WHERE run_id = 3"),
        r"run 3 \(two all, attempt 1\): not superseded, though run 5 is newer",
    ),
    "the newest result is superseded": (
        sql("UPDATE data_product SET superseded_by = 3 WHERE run_id = 5"),
        r"run 5 \(two all, attempt 1\): the newest result of its unit, but superseded",
    ),
    "a dead letter": (
        sql(
            "INSERT INTO dead_letter (location_id, stream, entry_id, body, reason) VALUES (1, 's', '1-1', '', 'broken')"
        ),
        r"dead letters: 1 instead of 0: 1 on s: broken",
    ),
    "refused, but done": (refused_but_done, r"run 1: cancel was asked with \{'failed': 1\}, but happened 1 times"),
    "done, but not asked": (
        lambda w: setattr(w.history, "calls", []),
        r"run 1: retry was asked with \{\}, but happened 1 times",
    ),
    "promised, but not kept": (unkept_promise, r"package x: its registration was accepted, but the catalogue"),
    "kept otherwise than promised": (other_content, r"package a: the catalogue has raw\.txt \(sha256:"),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_fault_is_named(world, plant):
    act, words = PLANTS[plant]
    act(world)
    found = examine(world).violations
    assert any(re.search(words, x) for x in found), found
    with pytest.raises(AssertionError, match="the checker found"):
        check(world, seconds=0.1)


def test_a_declared_repetition_is_no_fault_and_is_counted(world):
    repeat(world)
    assert not examine(world, repeats={"collect"}).violations
    assert examine(world, repeats=EFFECTS).repeated == 1


def test_what_nobody_knows_may_have_happened_or_not(world):
    for call in world.history.calls:
        call.outcome = "unknown"
    world.history.calls.append(Call("register", "x", {"raw.txt": "sha256:1"}))
    report = examine(world)
    assert not report.violations
    assert report.unknown == 6


@pytest.mark.parametrize("damage", ["gone", "other content", "other content, and the tables agree"])
def test_a_stolen_product_is_named(world, damage):
    (product,) = world.query(
        "SELECT d.id, c.path AS place FROM data_product d JOIN physical_copy c ON c.product_id = d.id"
        " WHERE run_id = 5 AND type = 'SCIENCE'"
    )
    path = Path(product.place)
    content = path.read_bytes()
    path.unlink()
    try:
        if damage != "gone":
            path.write_bytes(b"x" * len(content))
        if damage.endswith("agree"):
            new = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
            world.query("UPDATE data_product SET checksum = :new WHERE id = :id RETURNING 1", new=new, id=product.id)
        (found,) = examine(world).violations
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    told = {"gone": "is not on disk", "other content": "in the tables"}.get(damage, "its job wrote")
    assert found.startswith("run 5 (two all, attempt 1): ")
    assert told in found


MESSAGES = {
    "left over": (lambda c, key: c.xadd(key, {"event": b"{}"}), r"stream \S+job\.built: \S+ is left over"),
    "in somebody's hands": (
        lambda c, key: (c.xadd(key, {"event": b"{}"}), c.xreadgroup("worker", "h:1:x", {key: ">"})),
        r"stream \S+job\.built: 1 pending in group worker",
    ),
    "a consumer": (
        lambda c, key: c.xgroup_createconsumer(key, "worker", "h:1:x"),
        r"redis: consumer h:1:x on \S+job\.built is left over",
    ),
    "a group": (lambda c, key: c.xgroup_create(key, "others"), r"redis: group others on \S+job\.built"),
    "a key": (lambda c, key: c.set("wfm:{1}:lock", "1"), r"redis: key wfm:\{1\}:lock is none of ours"),
    "a stranger's key": (lambda c, key: c.set("lock", "1"), r"redis: key lock is none of ours"),
}


@pytest.mark.parametrize("plant", MESSAGES)
def test_what_is_left_in_redis_is_named(world, plant):
    act, words = MESSAGES[plant]
    client = open_bus(world.settings).client
    key = "wfm:{1}:job.built"
    act(client, key)
    try:
        found = examine(world).violations
    finally:
        client.delete(key, "wfm:{1}:lock", "lock")
        client.xgroup_create(key, "worker", mkstream=True)
    assert any(re.search(words, x) for x in found), found


def test_a_transaction_that_is_left_open_is_named(world):
    with world.store.begin() as tx:
        tx.all("SELECT 1 FROM run")
        found = examine(world).violations
    assert any(x.startswith("postgres: session ") and "FROM run" in x for x in found), found
