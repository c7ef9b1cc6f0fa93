"""Real servers for the whole session; a fresh database and an empty Redis for each test that asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from tests.services import Servers
from wfm import migrations
from wfm.store import connect

if TYPE_CHECKING:
    from tests.harness import World


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    servers = Servers()
    servers.start()
    yield servers
    servers.stop()


@pytest.fixture(scope="session")
def migrated(servers: Servers) -> Iterator[str]:
    """Name of a database at the newest revision, from which the tests' databases are cloned."""
    with servers.database() as url:
        engine = connect(url, "wfm")
        migrations.upgrade(engine, "wfm")
        engine.dispose()
        yield url.rsplit("/", 1)[-1].split("?")[0]


@pytest.fixture
def database(servers: Servers, migrated: str) -> Iterator[str]:
    with servers.database(template=migrated) as url:
        yield url


def _redis_7(directory: Path) -> Iterator[str]:
    binary = shutil.which("redis-server")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs redis-server (Redis 7); .ci/run installs it")
        pytest.skip("no redis-server on this machine; the same tests run on Valkey")
    socket = directory / "r.sock"
    process = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
    )
    try:
        url = f"unix://{socket}?db=0"
        with redis.Redis.from_url(url) as client:
            deadline = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(params=["valkey", "redis7"])
def any_redis(request: pytest.FixtureRequest, servers: Servers) -> Iterator[str]:
    """Each kind of server in turn, empty."""
    if request.param == "valkey":
        with servers.redis() as url:
            yield url
    else:
        with tempfile.TemporaryDirectory(prefix="wfm-r7-") as directory:
            yield from _redis_7(Path(directory))


@pytest.fixture
def redis_url(servers: Servers) -> Iterator[str]:
    with servers.redis() as url:
        yield url


@pytest.fixture
def world(database: str, redis_url: str, tmp_path: Path) -> Iterator[World]:
    """A deployment of its own: database, Redis, catalogue directory, pipelines directory."""
    from tests.harness import World

    world = World(tmp_path, database, redis_url)
    yield world
    world.close()
