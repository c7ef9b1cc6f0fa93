"""Messages that are doubled, late, shuffled, lost, sent again much later, unreadable, huge, or deadly to a reader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
import redis

from tests.faults.checker import EFFECTS
from tests.faults.network import HASTE, ONE, SHORT_LEASE, TWO, at_work
from tests.harness import ACTOR, REPOSITORY, wait_until
from wfm import catalogue
from wfm.model import Role, RunState, TaskKind
from wfm.store import Tx

ARRIVED = "wfm:{1}:data.arrived"


@pytest.fixture
def hasty(world):
    world.environ |= HASTE
    return world


@pytest.fixture
def client(hasty):
    with redis.Redis.from_url(hasty.settings.redis_url) as client:
        yield client


# --- carriers that do their work badly ---


class Carrier:
    """Takes the messages of all roles to Redis, in its own way.

    Attributes:
        carried: all that was ever given to it.
    """

    def __init__(self, chance):
        self._chance = chance
        self._lock = threading.Lock()
        self.carried = []
        self.become()

    def become(self, copies=(1,), held=0.0, lost=0.0):
        """Take on other habits, and forget what is held.

        Args:
            copies: of each message, one of these numbers. held: the share that stays with the carrier until a later
                turn, so that it comes late and out of order. lost: the share that never arrives.
        """
        with self._lock:
            self._copies, self._held, self._lost = copies, held, lost
            self._bag = []

    def serve(self, service):
        send = service.bus.send

        def carry(messages, done=()):
            with self._lock:
                self.carried += messages
                for m in messages:
                    if self._chance.random() >= self._lost:
                        self._bag += [m] * self._chance.choice(self._copies)
                self._chance.shuffle(self._bag)
                n = round(len(self._bag) * self._held)
                self._bag, going = self._bag[:n], self._bag[n:]
            send(going, done)

        service.bus.send = carry


HABITS = {
    "doubled": {"copies": (2, 3, 4, 5)},
    "late and shuffled": {"held": 0.7},
    "lost": {"lost": 0.3},
    "all of it": {"copies": (0, 1, 2, 3), "held": 0.5, "lost": 0.3},
}


def test_how_messages_travel_changes_nothing(net, chance):
    world = net.world
    world.pipeline("p", TWO)
    carrier = Carrier(chance)
    services = [net.service(r) for r in Role]
    for s in services:
        carrier.serve(s)
    with at_work(*services):
        for n, (name, habit) in enumerate(HABITS.items(), start=1):
            carrier.become(**habit)
            world.register(world.package(f"a{n}"), world.package(f"b{n}"))
            wait_until(lambda n=n: world.all_covered(2 * n + 1), what=f"{name}: all covered")
        carrier.become()  # an honest one; what it still held is lost
        report = world.check()
    assert report.completed == report.runs == 2 * len(HABITS) + world.states()["two", RunState.COMPLETED]


def test_old_messages_sent_again_are_only_another_look(net, chance, client):
    """Also those of runs that ended long ago, and of rows that are gone."""
    world = net.world
    world.pipeline("p", TWO)
    carrier = Carrier(chance)
    services = [net.service(r) for r in Role]
    for s in services:
        carrier.serve(s)
    with at_work(*services):
        world.register(*(world.package(f"a{i}") for i in range(2)))
        wait_until(lambda: world.all_covered(3), what="all covered")
        before = world.check()
        old = [m for m in carrier.carried if m.recipient]
        for m in chance.sample(old * 2, len(old) * 2):
            client.xadd(f"wfm:{{1}}:{m.type}", {"event": m.body})
        # As if from a ledger of which nobody knows any more:
        client.xadd(ARRIVED, {"event": b'{"id": 123456789, "raw_data_package": 987654321}'})
        client.xadd("wfm:{1}:job.built", {"event": b'{"id": 123456790, "run": 987654321, "version": 3}'})
        after = world.check()
    assert len(old) >= 12
    assert (after.runs, after.transitions, after.jobs, after.effects) == (
        before.runs,
        before.transitions,
        before.jobs,
        before.effects,
    )


# --- unreadable ones ---

UNREADABLE = [
    b"\xff\x00garbage",
    b"[" * 100_000,
    b'{"type": "no.such.event", "raw_data_package": 1}',
    b'{"type": "with a \\u0000", "raw_data_package": 1}',
    b"{}",
    b'{"raw_data_package": [1]}',
    b'{"raw_data_package": "with a \\u0000"}',
    b'{"raw_data_package": 1' + b"0" * 40 + b"}",
    b'{"raw_data_package": "a0", "id": 1' + b"0" * 40 + b"}",
    b'{"raw_data_package": "a0", "id": -1}',
]


def test_messages_that_nobody_can_read_go_to_the_dead_letters_and_harm_no_neighbour(hasty, client):
    hasty.pipeline("p", ONE)
    with hasty.roles(Role.TRIGGER_MANAGER) as services:
        streams = list(services[0].bus.streams)
        wait_until(lambda: client.exists(*streams) == len(streams))
        hasty.check()
    for body in UNREADABLE:
        client.xadd(ARRIVED, {"event": body})
    client.xadd(ARRIVED, {"raw_data_package": "a0", "and": "no event"})
    hasty.register(*(hasty.package(f"a{i}") for i in range(3)))
    with hasty.roles() as services:
        for s in services:
            for stream in s.bus.streams:
                client.xadd(stream, {"event": b"\xff"})
        streams = [stream for s in services for stream in s.bus.streams]
        wait_until(lambda: hasty.all_covered(3), what="all covered")
        hasty.check(dead_letters=len(UNREADABLE) + 1 + len(streams))
    dead = {bytes(d.body): d for d in hasty.query("SELECT body, reason FROM dead_letter")}
    assert set(UNREADABLE) <= dead.keys()
    assert all(d.reason for d in dead.values())


def test_what_a_newer_version_adds_is_ignored(hasty, client):
    hasty.pipeline("p", ONE)
    body = b'{"type": "data.arrived", "schema": 99, "raw_data_package": "a", "new": {"x": [1]}, "at": "later"}'
    with hasty.roles():
        wait_until(lambda: hasty.query("SELECT 1 FROM task WHERE kind = 'reconcile' AND due_at > now()"))
        hasty.check()
        with hasty.store.begin() as tx:  # only the message below tells of it
            catalogue.register(tx.conn, [hasty.package("a")], location_ids=[1], actor=ACTOR.name)
            tx.run("UPDATE event SET done_at = now() WHERE done_at IS NULL")
        client.xadd(ARRIVED, {"event": body, "beside": b"it"})
        wait_until(lambda: hasty.all_covered(1), what="covered")
        hasty.check()


def test_messages_of_64_megabytes(hasty, client):
    body = b'{"raw_data_package": "' + b"x" * 64_000_000
    hasty.pipeline("p", ONE)
    with hasty.roles():
        client.xadd(ARRIVED, {"event": body + b'"}'})
        client.xadd(ARRIVED, {"event": body})
        hasty.register(hasty.package("a"))
        wait_until(lambda: hasty.all_covered(1), what="covered")
        hasty.check(dead_letters=1)
    assert hasty.query("SELECT length(body) AS n FROM dead_letter")[0].n == len(body)


# --- deadly ones ---


def test_a_handler_that_raises_for_one_event_harms_no_neighbour(net):
    """As often as is allowed, with growing pauses (which the test makes short); then the event is a dead letter."""
    world = net.world
    world.environ |= {"WFM_MAX_DELIVERIES": "3", "WFM_RECONCILE_SECONDS": "1"}
    world.pipeline("p", TWO)
    service = net.service(Role.TRIGGER_MANAGER)
    handle, batches = service.work.handle, []

    def poisoned(tx, events):
        if any(getattr(e, "run", None) == 2 for e in events):
            batches.append(len(events))
            raise ValueError("run 2 is poison")
        return handle(tx, events)

    def buried():
        world.query("UPDATE event SET publish_at = now() WHERE failures > 0 AND done_at IS NULL RETURNING 1")
        return world.query("SELECT reason FROM dead_letter")

    service.work.handle = poisoned
    with at_work(service), net.roles([r for r in Role if r is not Role.TRIGGER_MANAGER]):
        world.register(*(world.package(f"a{i}") for i in range(4)))
        dead = wait_until(buried, what="buried")
        wait_until(lambda: world.all_covered(5), what="all covered")
        world.check(dead_letters=1)
    assert [d.reason for d in dead] == ["failed 3 times; the last time ValueError: run 2 is poison"]
    assert 3 <= batches.count(1) <= 8  # a late copy is another try, and finds that the event is done


def test_what_cannot_be_buried_ends_nobody_and_comes_again(net, client, monkeypatch):
    world = net.world
    bury, refused = Tx.bury, []

    def grave(tx, *args):
        if not refused:
            refused.append(args)
            raise ValueError("no dead letter today")
        return bury(tx, *args)

    monkeypatch.setattr(Tx, "bury", grave)
    with net.roles([Role.TRIGGER_MANAGER]):
        client.xadd(ARRIVED, {"event": b"\xff"})
        wait_until(lambda: world.query("SELECT 1 FROM dead_letter"), what="buried the second time")
        world.check(dead_letters=1)
    assert refused


class Mortal:
    """A role that run 2 kills, started again whenever it ends. See `tests.faults.deadly`."""

    def __init__(self, world, kind, role):
        self._world = world
        self._words = [sys.executable, "-m", "tests.faults.deadly", kind, role, "--ledger", str(world.ledger.path)]
        self.deaths = -1
        self._start()

    def _start(self):
        environ = {**os.environ, **self._world.environ}
        self.process = subprocess.Popen(self._words, env=environ, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        self._world._processes.append(self.process)
        self.deaths += 1

    def revived(self):
        """Have it live; True, for conditions that wait meanwhile."""
        if self.process.poll() is not None:
            assert self.process.returncode == -signal.SIGKILL
            assert self.deaths < 10, "a crash loop for ever"
            self._start()
        return True


@pytest.fixture
def mortal():
    made = []

    def make(*args):
        made.append(Mortal(*args))
        return made[-1]

    yield make
    for m in made:
        m.process.kill()
        m.process.wait()


def test_an_event_that_kills_its_reader_is_buried_and_its_neighbours_are_not(net, mortal):
    world = net.world
    world.environ |= {"WFM_MAX_DELIVERIES": "2", "WFM_RECONCILE_SECONDS": "1"}
    world.pipeline("p", TWO)
    with net.roles([r for r in Role if r is not Role.TRIGGER_MANAGER]):
        with net.roles([Role.TRIGGER_MANAGER]):
            world.register(*(world.package(f"a{i}") for i in range(4)))
            wait_until(lambda: len(world.runs()) == 4)
        wait_until(lambda: world.states()["one", RunState.COMPLETED] == 4)
        trigger_manager = mortal(world, "run.collected", Role.TRIGGER_MANAGER)
        wait_until(lambda: trigger_manager.revived() and world.query("SELECT 1 FROM dead_letter"), what="buried")
        wait_until(lambda: trigger_manager.revived() and world.all_covered(5), what="all covered")
        trigger_manager.process.kill()
        with net.roles([Role.TRIGGER_MANAGER]):  # late copies harm nobody who survives them
            world.check(dead_letters=1)
    (dead,) = world.query("SELECT reason FROM dead_letter")
    assert dead.reason == "handed out 2 times without success"
    assert trigger_manager.deaths >= 2


@pytest.mark.parametrize("kind", [TaskKind.STAGE, TaskKind.SUBMIT])
def test_a_task_that_kills_its_worker_fails_and_its_neighbours_do_not(net, mortal, kind):
    """They are leased together, so each death is one of them all; the last chance is had alone."""
    world = net.world
    world.environ |= {**SHORT_LEASE, "WFM_MAX_TASK_TRIES": "1"}
    world.pipeline("p", ONE)
    world.register(*(world.package(f"a{i}") for i in range(4)))
    with net.roles([r for r in Role if r is not Role.WORKER]):
        wait_until(lambda: world.states()["one", RunState.STAGING_DATA] == 4)
        worker = mortal(world, kind, Role.WORKER)
        wait_until(lambda: worker.revived() and world.states()["one", RunState.FAILED] == 1, what="it failed")
        wait_until(lambda: worker.revived() and world.states()["one", RunState.COMPLETED] == 3, what="others did not")
        world.check(repeats=EFFECTS)
    (failed,) = world.query("SELECT id, message FROM run WHERE state = 'FAILED'")
    assert failed.id == 2
    # Whether a submission that killed its worker had started a job, only the backend can say: it is asked by name.
    assert failed.message.startswith(
        "stage: 2 workers ended or lost touch while doing it" if kind is TaskKind.STAGE else "the job is absent"
    )
    assert worker.deaths == 2
