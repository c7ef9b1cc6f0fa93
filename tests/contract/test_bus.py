"""The bus, on Valkey and on Redis 7: the judge of stream semantics is a real server."""

from __future__ import annotations

import pytest
from redis.exceptions import RedisError

from wfm.bus import Bus, connect
from wfm.events import Message


@pytest.fixture
def client(any_redis):
    client = connect(any_redis, {})
    yield client
    client.close()


def make(client, group="worker", streams=("job.built",)):
    bus = Bus(client, 1, group, streams, public_length=1000, high_water=1000)
    bus.join()
    return bus


def built(n):
    return Message("job.built", "worker", b'{"type":"job.built","run":%d,"version":1}' % n, id=n)


def test_a_message_is_read_once_acknowledged_and_gone(client):
    bus = make(client)
    bus.send([built(1), built(2)])
    entries = bus.read(10, 0.1)
    assert [e.body for e in entries] == [built(1).body, built(2).body]
    assert entries[0].type == "job.built"
    assert bus.read(10, 0.01) == []
    bus.send([], entries)
    assert bus.backlog(["job.built"]) == {"job.built": 0}
    assert bus.read_own_pending(10) == []


def test_two_consumers_of_a_role_share_the_work(client):
    a, b = make(client), make(client)
    a.send([built(n) for n in range(10)])
    got = a.read(5, 0.1) + b.read(10, 0.1)
    assert len({e.id for e in got}) == 10


def test_everything_with_a_ledger_row_is_on_the_public_stream_and_wakeups_are_not(client):
    bus = make(client)
    bus.send([built(1), Message("job.running", "", b"{}", id=2), Message("slot.freed", "workflow-manager", b"{}")])
    assert client.xlen("wfm:{1}:events") == 2
    assert client.xlen("wfm:{1}:slot.freed") == 1
    assert not client.exists("wfm:{1}:job.running")


def test_a_stream_at_its_mark_takes_no_more_until_it_is_shorter(client):
    bus, other = (Bus(client, 1, "worker", ["job.built"], public_length=10_000, high_water=700) for _ in range(2))
    bus.join()
    kept = bus.send([built(n) for n in range(1000)] + [Message("slot.freed", "workflow-manager", b"{}")])
    assert [m.id for m in kept] == list(range(700, 1000))
    assert bus.backlog(["job.built", "slot.freed", "events"]) == {"job.built": 700, "slot.freed": 1, "events": 1000}
    assert other.send([built(1000)]) == [built(1000)], "another writer asks before it writes"
    assert len(bus.send([built(1001)], bus.read(10, 0.1))) == 1, "what is acknowledged makes room for the next ones"
    assert bus.send([built(n) for n in range(10)]) == []
    assert bus.backlog(["job.built"]) == {"job.built": 700}


def test_the_public_stream_is_capped(client):
    bus = Bus(client, 1, "", (), public_length=100, high_water=1000)
    for _ in range(20):
        bus.send([Message("job.running", "", b"{}", id=n) for n in range(100)])
    assert client.xlen("wfm:{1}:events") < 400


def test_a_group_that_is_made_late_still_sees_older_entries(client):
    Bus(client, 1, "", (), public_length=10, high_water=1000).send([built(1)])
    assert len(make(client).read(10, 0.1)) == 1


@pytest.mark.parametrize("wipe", ["flushall", "stream", "group"])
def test_reading_goes_on_after_the_groups_are_gone(client, wipe):
    bus = make(client)
    key = bus.streams[0]
    if wipe == "flushall":
        client.flushall()
    elif wipe == "stream":
        client.delete(key)
    else:
        client.xgroup_destroy(key, "worker")
    assert bus.read(10, 0.01) == []
    bus.send([built(1)])
    assert len(bus.read(10, 0.5)) == 1


def test_entries_of_a_dead_reader_are_claimed_with_their_deliveries_counted(client):
    dead, alive = make(client), make(client)
    dead.send([built(n) for n in range(3)])
    assert len(dead.read(10, 0.1)) == 3
    assert alive.claim_idle(60.0, 10) == []
    claimed = alive.claim_idle(0.0, 10)
    assert [e.body for e in claimed] == [built(n).body for n in range(3)]
    assert all(e.deliveries == 2 for e in claimed)
    assert len(dead.claim_idle(0.0, 10)) == 3, "whoever claims last holds them"
    assert alive.read_own_pending(10) == []


def test_claiming_follows_the_cursor_past_many_live_entries(client):
    dead, alive = make(client), make(client)
    dead.send([built(n) for n in range(50)])
    dead.read(100, 0.1)
    seen = set()
    for _ in range(30):
        seen |= {e.id for e in alive.claim_idle(0.0, 5)}
    assert len(seen) == 50


def test_a_pending_entry_whose_body_was_deleted_does_no_harm(client):
    bus, other = make(client), make(client)
    bus.send([built(1)])
    (entry,) = bus.read(10, 0.1)
    client.xdel(bus.streams[0], entry.id)
    assert all(e.body == b"" for e in other.claim_idle(0.0, 10))
    left = bus.read_own_pending(10)
    assert all(e.body == b"" for e in left)
    bus.send([], left)
    assert bus.read_own_pending(10) == []


def test_the_life_key_tells_once_that_redis_was_emptied(client):
    bus, other = make(client), make(client)
    first, born = bus.life()
    assert born
    assert other.life() == (first, False)
    client.flushall()
    second, born = other.life()
    assert born
    assert second != first
    assert bus.life() == (second, False)


def test_leaving_takes_the_name_off_unless_entries_are_held(client):
    idle, holder = make(client), make(client)
    holder.send([built(1)])
    assert holder.read(10, 0.1)
    idle.read(10, 0.01)
    idle.leave()
    holder.leave()
    names = {c["name"].decode() for c in client.xinfo_consumers(idle.streams[0], "worker")}
    assert names == {holder.consumer}


def test_consumers_that_hold_nothing_are_forgotten_after_a_while(client):
    holder, idle = make(client), make(client)
    holder.send([built(1)])
    holder.read(10, 0.1)
    idle.read(10, 0.01)
    idle.forget_consumers(idle_seconds=-1)
    names = {c["name"].decode() for c in client.xinfo_consumers(idle.streams[0], "worker")}
    assert names == {holder.consumer}


def test_no_key_outside_ours_is_made(client):
    bus = make(client)
    bus.life()
    bus.send([built(1)])
    assert all(key.startswith(b"wfm:{1}:") for key in client.scan_iter("*"))


def test_a_key_of_the_wrong_type_is_an_error_not_a_silence(client):
    client.set("wfm:{1}:job.built", "x")
    with pytest.raises(RedisError):
        Bus(client, 1, "worker", ["job.built"], public_length=10, high_water=1000).join()
