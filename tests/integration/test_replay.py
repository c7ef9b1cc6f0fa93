"""Copies of the log for others, what changed definitions would do, and dead letters."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from tests.harness import ACTOR, wait_until
from tests.integration.test_cli import Cli
from wfm import acts, documents, gaps
from wfm.decide import Capacity
from wfm.errors import NotFoundError, RefusedError, UnavailableError
from wfm.model import Role
from wfm.service import open_bus
from wfm.views import verify
from wfm.whatif import _future, what_if

ONE = [{"name": "one", "group_by": ["executed_obs_unit"]}]
TWO = [*ONE, {"name": "two", "depends_on": ["one"], "group_by": []}]
STREAM = "wfm:mine:replay"


@pytest.fixture
def cli(world):
    return Cli(world.environ)


@pytest.fixture
def redis(world):
    bus = open_bus(world.settings)
    yield bus.client
    bus.client.close()


def bodies(redis, stream=STREAM):
    return [json.loads(fields[b"event"]) for _, fields in redis.xrange(stream)]


# --- into a stream ---


def processed(world):
    world.pipeline("p", TWO)
    with world.roles():
        world.register(*(world.package(n) for n in "abc"))
        wait_until(lambda: world.all_covered(4))
        world.rest()


def succeed(world, *packages):
    """The same without roles, which takes time: every run as if it had succeeded."""
    if not world.query("SELECT 1 FROM pipeline"):
        world.pipeline("p", TWO)
    world.register(*(world.package(n) for n in packages))
    with world.store.begin() as tx:
        _future(tx, 1, None, Capacity(100), lambda: None)


def test_a_part_of_the_log_is_copied_as_it_was_published(world, cli, redis, monkeypatch):
    monkeypatch.setattr("wfm.cli.events.PAGE", 3)
    processed(world)
    ledger = [r.id for r in world.query("SELECT id FROM event ORDER BY txid, id")]
    assert cli.json("events", "replay", "--into", STREAM)["events"] == len(ledger) > 3
    assert [b["id"] for b in bodies(redis)] == ledger
    public = {b["id"]: b for b in bodies(redis, "wfm:{1}:events")}
    assert {b["id"]: b for b in bodies(redis)} == public
    redis.delete(STREAM)
    assert cli.json("events", "replay", "--into", STREAM, "--type", "run.collected", "--since", "1h")["events"] == 4
    assert {b["type"] for b in bodies(redis)} == {"run.collected"}
    assert "copied 0 events" in cli("events", "replay", "--into", STREAM, "--until", "1h").stdout


def test_a_copy_waits_for_what_is_committed_late(world, cli, redis):
    succeed(world, "a")
    with world.store.begin() as tx:
        late = tx.all(
            "INSERT INTO event (location_id, type, recipient, actor, body, done_at)"
            " VALUES (1, 'data.arrived', '', 'test', '{\"type\": \"data.arrived\", \"raw_data_package\": 1}', now())"
            " RETURNING id"
        )[0].id
        copying = cli.start("events", "replay", "--into", STREAM)
        assert copying.stderr is not None
        assert "waits for transactions" in copying.stderr.readline()
    _, err = copying.communicate(timeout=60)
    assert (copying.returncode, err) == (0, "")
    assert bodies(redis)[-1]["id"] == late


@pytest.mark.parametrize("key", ["mine", "wfm:", "wfm:{1}:events", "wfm:{1}:data.arrived", "wfm:{x}", "wfm:a b", ""])
def test_keys_that_are_not_for_others(world, cli, key):
    said = cli("events", "replay", "--into", key, code=2).stderr
    assert ("allowed is a key of your own" in said) if key else ("given: none" in said)


def test_a_key_that_holds_something_else(world, cli, redis):
    succeed(world, "a")
    redis.set(STREAM, "text")
    assert "something else than a stream" in cli("events", "replay", "--into", STREAM, code=2).stderr


# --- what if ---

FREE = (Capacity(100), Capacity(100))


def rows_of_all_tables(world):
    """Everything the database holds, but for what sequences gave out."""
    with world.store.begin() as tx:
        tables = [r.tablename for r in tx.all("SELECT tablename FROM pg_tables WHERE schemaname = 'wfm'")]
        return {
            t: tx.conn.execute(text(f"SELECT md5(string_agg(x::text, '|' ORDER BY x::text)) FROM {t} x")).scalar()
            for t in tables
        }


def asked(world, *bodies, **more):
    loaded = documents.load([("new.yaml", "\n---\n".join(json.dumps(b) for b in bodies))])
    before = rows_of_all_tables(world)
    found = what_if(world.store, loaded, 1, limits=more.pop("limits", FREE), **more)
    assert rows_of_all_tables(world) == before
    return found


def lines(runs):
    return [(r.wave, r.pipeline, r.step, r.unit.split("-")[0], r.reason) for r in runs]


def pipeline(steps, **more):
    defaults = {"software": "copy", "version": "1.0.0", "max_retries": 0}
    more = {"grouping": "everything", **more}
    return {"kind": "pipeline", "name": "p", **more, "steps": [{**defaults, **s} for s in steps]}


def test_a_new_version_makes_every_step_run_again_one_after_the_other(world):
    processed(world)
    version = {"version": "1.1.0", "command": ["python", str(world.program)]}
    found = asked(world, {"kind": "software", "name": "copy", "versions": [version]})
    stale = "stale: copy 1.1.0 is wanted now"
    assert lines(found.added) == [
        (1, "p", "one", "a", stale),
        (1, "p", "one", "b", stale),
        (1, "p", "one", "c", stale),
        (2, "p", "two", "all", "stale: newer input; copy 1.1.0 is wanted now"),
    ]
    assert (found.gone, found.shifts, found.packages) == ([], [], None)
    assert asked(world).added == []
    # And the real engine does just that.
    with world.roles():
        world.apply(json.dumps({"kind": "software", "name": "copy", "versions": [version]}))
        wait_until(lambda: len(world.runs()) == 8 and world.all_covered(4))
        world.rest()


def test_what_would_have_run_and_will_not_is_gone_with_the_reason(world):
    world.pipeline("p", TWO)
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(*(world.package(n) for n in "ab"))
        wait_until(lambda: len(world.runs()) == 2)
        with world.store.begin() as tx:
            assert verify(tx.conn, tx.charts).faults == []
    only_a = {
        "kind": "grouping",
        "name": "only-a",
        "rules": [{"table": "raw_data_package", "column": "name", "operator": "eq", "value": "a"}],
    }
    found = asked(world, only_a, pipeline(TWO, grouping="only-a"))
    gone = "newer input, version or config takes its place"
    assert lines(found.added) == [(2, "p", "two", "all", "no result covers this unit yet")]
    assert lines(found.gone) == [
        (1, "p", "one", "b", "empty: no raw data package belongs to this unit any more"),
        (2, "p", "two", "all", gone),
    ]
    assert [(s.step, s.before, s.after, s.units) for s in found.shifts] == [("one", "covered", "empty", 1)]
    found = asked(world, pipeline(TWO, enabled=False))
    assert {r.unit.split("-")[0] for r in found.gone} == {"a", "b", "all"}
    assert found.added == []
    assert found.gone[0].reason.startswith("active: run")
    found = asked(world, pipeline(ONE))
    assert lines(found.gone) == [(2, "p", "two", "all", "held: the step is no longer part of its pipeline")]


def test_only_what_arrived_in_a_time_range_and_what_follows_from_it(world):
    succeed(world, "a", "b", "c")
    between = world.query("SELECT clock_timestamp() AS now")[0].now
    succeed(world, "late")
    config = {"kind": "config", "name": "c", "parameters": {"seconds": 0}}
    changed = [{**s, "config": "c"} for s in TWO]
    found = asked(world, config, pipeline(changed), since=between)
    assert [(r.step, r.unit.split("-")[0]) for r in found.added] == [("one", "late"), ("two", "all")]
    assert found.packages == 1
    # A pipeline that is not there yet.
    found = asked(world, {**pipeline(ONE), "name": "q"}, since=between)
    assert lines(found.added) == [(1, "q", "one", "late", "no result covers this unit yet")]
    # A run of something else is under way; it comes to its end in both futures, and what follows is not asked for.
    world.register(world.package("other"))
    with world.store.begin() as tx:
        gaps.reconcile(tx, 1, ACTOR)
    assert world.states()["one", "PENDING"] == 1
    found = asked(world, config, pipeline(changed), until=between)
    assert [r.unit.split("-")[0] for r in found.added] == ["a", "b", "c", "all"]


def test_runs_that_could_never_start_are_told(world):
    succeed(world, "a", "b", "c")
    large = [{**ONE[0], "resources": {"cpu": 8, "memory_gb": 1}}]
    found = asked(world, {**pipeline(large), "name": "q"}, limits=(Capacity(9), Capacity(9, cpu=4.0)))
    assert {r.never_fits for r in found.added} == {"never fits: asks for 8 cores, this location has 4"}


def test_it_gives_up_rather_than_wait_for_others_or_keep_them_waiting(world, monkeypatch):
    succeed(world, "a", "b", "c")
    world.query("UPDATE coverage SET basis = NULL RETURNING 1")  # so that the gap engine looks at it
    with world.store.begin() as tx:
        tx.run("SELECT 1 FROM coverage FOR UPDATE")
        gave_up = []

        def ask():
            with pytest.raises(UnavailableError, match=r"gave up after 0\.2 s"):
                what_if(world.store, documents.load([]), 1, limits=FREE, seconds=0.2)
            gave_up.append(True)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: gave_up, seconds=20)  # less than the lock_timeout that every connection has
    asking.join()

    clock = iter((0.0, 0.0, 61.0))
    monkeypatch.setattr("wfm.whatif.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(UnavailableError, match="gave up after 60 s"):
        what_if(world.store, documents.load([]), 1, limits=FREE)
    assert not world.query("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'")


def test_the_command_shows_it_and_refuses_what_makes_no_sense(world, cli, tmp_path: Path):
    succeed(world, "a", "b", "c")
    new, small = tmp_path / "new.yaml", tmp_path / "small.toml"
    new.write_text(json.dumps({**pipeline([{**ONE[0], "resources": {"cpu": 3, "memory_gb": 1}}]), "name": "q"}))
    small.write_text("[default]\nlocal_cpu = 2.0\n")
    said = cli("events", "replay", "--config", new, "--dry-run", WFM_LOCAL_CPU="").stdout
    assert "pipeline q: create" in said
    assert "3 runs more, 0 fewer; nothing was changed" in said
    found = cli.json("events", "replay", "--config", new, "--config", small, "--dry-run", WFM_LOCAL_CPU="")
    assert {r["never_fits"] for r in found["added"]} == {"never fits: asks for 3 cores, this location has 2"}
    said = cli("events", "replay", "--config", new, "--into", STREAM, "--type", "x", code=2).stderr
    assert "given: --into, --config" in said
    assert "say --dry-run too" in said
    cli("events", "replay", "--config", tmp_path / "none.toml", "--dry-run", code=3)
    small.write_text("[default]\nprocessing_location_id = 2\n")
    assert "must stay 1" in cli("events", "replay", "--config", small, "--dry-run", code=2).stderr


# --- dead letters ---

BYTES = b'{"raw_data_package": "a", \xff\x00 "not": JSON'


def bury(world, kind, body, location=1, event=None):
    with world.store.begin() as tx:
        tx.bury(location, f"wfm:{{{location}}}:{kind}", f"{len(body)}-1", body, "a test", event)
        return tx.all("SELECT max(id) AS id FROM dead_letter")[0].id


def test_a_letter_is_sent_again_byte_for_byte_and_its_event_is_pending_although_it_was_done(world, redis):
    world.pipeline("p", ONE)
    world.register(world.package("a"))
    (event,) = world.query("UPDATE event SET done_at = now(), failures = 5 WHERE type = 'data.arrived' RETURNING id")
    letter = bury(world, "data.arrived", BYTES, event=event.id)
    redis.flushdb()
    assert world.act(lambda tx: acts.resend_dead(tx, 1, [letter], ACTOR)) == 1
    assert [fields for _, fields in redis.xrange("wfm:{1}:data.arrived")] == [{b"event": BYTES}]
    assert not redis.exists("wfm:{1}:events")
    (row,) = world.query("SELECT done_at, failures, publish_at > now() AS later FROM event WHERE id = :id", id=event.id)
    assert tuple(row) == (None, 0, True), "the relay does not publish it at once, beside the letter"


def test_letters_are_settled_all_or_none_and_every_fault_is_told(world):
    world.pipeline("p", ONE)
    good, odd = bury(world, "data.arrived", b"1"), bury(world, "job.running", b"22")
    other = bury(world, "data.arrived", b"333", location=2)

    def refused(ids, act=acts.resend_dead):
        with pytest.raises((RefusedError, NotFoundError)) as caught, world.store.begin() as tx:
            act(tx, 1, ids, ACTOR)
        assert [r.state for r in world.query("SELECT state FROM dead_letter")] == ["open"] * 3
        return str(caught.value).splitlines()

    assert [x.split(";")[0] for x in refused([good, 98, 99])] == [
        "dead letter 98 does not exist",
        "dead letter 99 does not exist",
    ]
    assert refused([good, odd, other]) == [
        f"dead letter {odd}: nobody reads a stream 'job.running'; drop it instead",
        f"dead letter {other} belongs to location 2, and this is 1",
    ]
    assert len(refused([odd, other], acts.drop_dead)) == 1
