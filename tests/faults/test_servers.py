"""Servers that are killed, emptied, and meddled with while everything works. Nobody lends a hand afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from sqlalchemy import NullPool, create_engine, text

from tests.faults.checker import EFFECTS
from tests.faults.network import HASTE, SHORT_LEASE, TWO
from tests.harness import World, wait_until
from tests.services import Servers
from wfm import migrations
from wfm.embedded import Embedded
from wfm.events import TYPES
from wfm.model import Role
from wfm.store import connect

# --- servers of our own, to be killed ---


@pytest.fixture(scope="module")
def home():
    memory = Path("/dev/shm")
    home = Path(tempfile.mkdtemp(prefix="wfm-killed-", dir=memory if memory.is_dir() else None))
    servers = Embedded(home)
    try:
        servers.start()
        engine = connect(servers.database_url, "wfm")
        migrations.upgrade(engine, "wfm")
        engine.dispose()
        yield home
    finally:
        servers.stop()
        shutil.rmtree(home)


@pytest.fixture
def mortal(home, tmp_path, monkeypatch):
    """A world on servers that may be killed."""
    servers = Embedded(home)
    servers.start()
    monkeypatch.setenv("WFM_TEST_DATABASE_URL", servers.database_url)
    monkeypatch.setenv("WFM_TEST_REDIS_URL", servers.redis_url)
    with Servers().database(template="wfm") as database, redis.Redis.from_url(servers.redis_url) as client:
        client.flushall()
        world = World(tmp_path, database, servers.redis_url)
        world.environ |= HASTE
        yield world
        servers.start()
        world.close()


def kill(home, name, number):
    os.kill(Embedded(home).status()[name].pid, number)
    wait_until(lambda: not Embedded(home).status()[name].running, what=f"{name} is gone")


def test_valkey_killed_and_started_again_empty(home, mortal):
    mortal.config("c", seconds=0.1)
    mortal.pipeline("p", [{**TWO[0], "config": "c"}, TWO[1]])
    with mortal.roles():
        mortal.register(*(mortal.package(f"a{i}") for i in range(4)))
        for n in (1, 3):
            wait_until(lambda n=n: len(mortal.executions()) >= n)
            kill(home, "valkey", signal.SIGKILL)
            shutil.rmtree(home / "valkey")
            Embedded(home).start()
        wait_until(lambda: mortal.all_covered(5), what="all covered")
        mortal.check()


def test_postgres_stopped_immediately_and_started_again(home, mortal):
    """SIGQUIT is what `pg_ctl stop -m immediate` sends: no shutdown, recovery at the next start."""
    mortal.environ |= SHORT_LEASE
    mortal.config("c", seconds=0.1)
    mortal.pipeline("p", [{**TWO[0], "config": "c"}, TWO[1]])
    with mortal.roles():
        mortal.register(*(mortal.package(f"a{i}") for i in range(4)))
        for n in (1, 3):
            wait_until(lambda n=n: len(mortal.executions()) >= n)
            kill(home, "postgres", signal.SIGQUIT)
            Embedded(home).start()
            mortal.store.engine.dispose()
        wait_until(lambda: mortal.all_covered(5), what="all covered")
        mortal.check(repeats=EFFECTS)


# --- one server for all tests ---


@pytest.fixture
def hasty(world):
    world.environ |= HASTE
    return world


def test_all_backends_terminated_again_and_again(hasty):
    hasty.environ |= SHORT_LEASE
    hasty.pipeline("p", TWO)
    admin = create_engine(hasty.settings.database_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with hasty.roles(), admin.connect() as c:
        hasty.register(*(hasty.package(f"a{i}") for i in range(4)))
        killed = 0
        for n in range(1, 9):
            wait_until(lambda n=n: c.execute(text("SELECT count(*) FROM wfm.transition")).scalar_one() >= 2 * n)
            killed += c.execute(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            ).scalar_one()
        hasty.store.engine.dispose()
        wait_until(lambda: hasty.all_covered(5), what="all covered")
        hasty.check(repeats=EFFECTS)
    assert killed >= 8


PREFIX = "wfm:{1}:"


def flush(client, groups):
    client.flushall()


def delete_all_streams(client, groups):
    for stream in groups:
        client.delete(stream)


def destroy_groups(client, groups):
    for stream, group in groups.items():
        client.xgroup_destroy(stream, group)


def delete_consumers_with_what_they_hold(client, groups):
    for stream, group in groups.items():
        for c in client.xinfo_consumers(stream, group):
            client.xgroup_delconsumer(stream, group, c["name"])


def trim_what_nobody_has_read(client, groups):
    for stream in groups:
        client.xtrim(stream, maxlen=0)


def put_other_things_in_place_of_streams(client, groups):
    for name in [*TYPES, "events"]:
        client.set(PREFIX + name, "a text")
    client.pipeline().delete(PREFIX + "life").hset(PREFIX + "life", "a", "hash").execute()


HARMS = [
    flush,
    delete_all_streams,
    destroy_groups,
    delete_consumers_with_what_they_hold,
    trim_what_nobody_has_read,
    put_other_things_in_place_of_streams,
]


def test_redis_is_meddled_with_again_and_again(hasty):
    hasty.pipeline("p", TWO)
    with hasty.roles() as services, redis.Redis.from_url(hasty.settings.redis_url) as client:
        groups = {stream: str(s.bus.group) for s in services for stream in s.bus.streams}
        for n, harm in enumerate(HARMS, start=1):
            done = 0
            hasty.register(hasty.package(f"a{n}"), hasty.package(f"b{n}"))
            while not hasty.all_covered(2 * n + 1):
                if done < 6:  # for ever would be to wait for the next reconciliation
                    with suppress(redis.ResponseError):  # the stream or the group is not back yet
                        harm(client, groups)
                        done += 1
                time.sleep(0.1)
            assert done, harm
        hasty.check()
        wait_until(lambda: {client.type(s) for s in groups} == {b"stream"}, what="every stream is one again")
        assert client.type(PREFIX + "events") == b"stream"
        assert client.type(PREFIX + "life") == b"string"
        for stream, group in groups.items():
            assert [x["name"].decode() for x in client.xinfo_groups(stream)] == [group]
    assert set(groups.values()) == set(Role)
