"""A real Postgres and a real Valkey for a whole test session."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import redis
from sqlalchemy import NullPool, create_engine, make_url

from wfm.embedded import Embedded

_MEMORY = Path("/dev/shm")
_PLENTY = 4e9
"""Free bytes from which on the servers live in memory, where a new database takes 10 ms instead of 100 ms."""

# Its input ends when the test session ends, even if that is killed.
_KEEPER = """
import shutil, sys
from pathlib import Path
from wfm.embedded import Embedded

home = Path(sys.argv[1])
servers = Embedded(home)
try:
    servers.start()
    print("ready", flush=True)
    sys.stdin.read()
finally:
    servers.stop()
    shutil.rmtree(home)
"""


class Servers:
    """Our own servers in a directory of their own, or those that the environment names.

    WFM_TEST_DATABASE_URL: a Postgres (SQLAlchemy URL) whose user may create databases.
    WFM_TEST_REDIS_URL: a Redis or Valkey that holds nothing of value: its databases 0 to 15 are emptied.
    """

    def __init__(self) -> None:
        self._database_url = os.environ.get("WFM_TEST_DATABASE_URL", "")
        self._redis_url = os.environ.get("WFM_TEST_REDIS_URL", "")
        self._free_numbers = list(range(16))
        self._keeper: subprocess.Popen[str] | None = None

    def start(self) -> None:
        if self._database_url and self._redis_url:
            return
        roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _PLENTY
        home = Path(tempfile.mkdtemp(prefix="wfm-tests-", dir=_MEMORY if roomy else None))
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which stop us in their own time
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != "ready\n":
            self.stop()
            raise RuntimeError("the servers for the tests did not start: the reason is on standard error")
        own = Embedded(home)
        self._database_url = self._database_url or own.database_url
        self._redis_url = self._redis_url or own.redis_url

    def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.communicate(timeout=120)

    @contextmanager
    def database(self, template: str | None = None) -> Iterator[str]:
        """The SQLAlchemy URL of a new database, which is dropped afterwards.

        Args:
            template: name of the database to copy, to which nobody may be connected; None: an empty one.
        """
        name = f"wfm_test_{secrets.token_hex(8)}"
        self._execute(f'CREATE DATABASE {name} TEMPLATE "{template or "template0"}"')
        try:
            yield make_url(self._database_url).set(database=name).render_as_string(hide_password=False)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    @contextmanager
    def redis(self) -> Iterator[str]:
        """The URL of an empty Redis database that nobody else has meanwhile."""
        number = self._free_numbers.pop()
        base, _, query = self._redis_url.partition("?")
        url = f"{base}?{urlencode({**dict(parse_qsl(query)), 'db': number})}"
        try:
            with redis.Redis.from_url(url) as client:
                client.flushdb()
            yield url
        finally:
            self._free_numbers.append(number)

    def _execute(self, statement: str) -> None:
        engine = create_engine(self._database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
