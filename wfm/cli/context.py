"""What commands share: settings, the servers, who acts, and errors as people read them."""

from __future__ import annotations

import getpass
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from wfm.cli import output
from wfm.errors import NotFoundError, UnavailableError, UsageError, WfmError
from wfm.model import Actor

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection, Engine

    from wfm.config import Settings
    from wfm.events import Message
    from wfm.store import Store, Tx

T = TypeVar("T")

reason = click.option(
    "--reason", default="", show_default=False, metavar="TEXT", help="Why; stands in the history beside your name."
)


def _not_blank(_ctx: click.Context, _param: click.Parameter, text: str) -> str:
    if not text.strip():
        raise click.BadParameter("it is blank; say why")
    return text


required_reason = click.option(
    "--reason",
    required=True,
    callback=_not_blank,
    metavar="TEXT",
    help="Why; stands beside your name for those who look later.",
)
Key = click.IntRange(1, 2**63 - 1)
"""The id of a row."""


class Group(click.Group):
    """A group whose commands are listed in the order in which they are written."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return list(self.commands)


_AGO = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)(s|min|h|d|w)", re.ASCII)
_AGO_WORDS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Time(click.ParamType[Any]):
    """An ISO 8601 time, UTC where it has no offset; or so long ago, such as ``2h``."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        from datetime import UTC, datetime, timedelta

        from wfm.grouping import parse_time

        try:
            if isinstance(value, str) and (ago := _AGO.fullmatch(value)):
                return datetime.now(UTC) - timedelta(**{_AGO_WORDS[ago[2]]: float(ago[1])})
            return parse_time(value) if isinstance(value, str) else value
        except (ValueError, OverflowError):
            known = "an ISO 8601 time such as 2026-03-01T04:30:00Z, nor how long ago, such as 90s, 15min, 2h, 3d or 1w"
            self.fail(f"{value!r} is neither {known}", param, ctx)


class Ahead(Time):
    """A time to come, or so long from now, such as ``3d``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        from datetime import UTC, datetime

        time: datetime = super().convert(value, param, ctx)
        now = datetime.now(UTC)
        if isinstance(value, str) and _AGO.fullmatch(value):
            time = now + (now - time)
        if time <= now:
            self.fail(f"{value!r} is over already", param, ctx)
        return time


class There(click.Path):
    """A path of something that exists."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.path.exists(value):
            raise NotFoundError(f"{os.fspath(value)} does not exist")
        return super().convert(value, param, ctx)


def actor(reason: str = "") -> Actor:
    """The person at the keyboard; by number where the user has no name, as in some containers."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return Actor(f"user:{name}", reason)


def split(target: str) -> tuple[str, str | None]:
    """PIPELINE[/STEP] in its parts."""
    pipeline, _, step = target.partition("/")
    return pipeline, step or None


def full_key(tx: Tx, pipeline: str, unit: str | None) -> str | None:
    """A unit's key, of which people may leave out the digest (16 digits) at its end where the rest is clear enough.

    What fits no unit is returned as it is, for others to refuse.

    Raises:
        UsageError: it fits several.
    """
    if unit is None:
        return None
    rows = tx.all(
        """
        SELECT DISTINCT u.key FROM unit u JOIN pipeline p ON p.id = u.pipeline_id
        WHERE p.name = :pipeline AND (u.key = :unit OR left(u.key, -17) = lower(:unit)) ORDER BY u.key
        """,
        pipeline=pipeline,
        unit=unit,
    )
    keys = [r.key for r in rows]
    if unit in keys or not keys:
        return unit
    if len(keys) > 1:
        raise UsageError(f"several units of {pipeline} are named {unit!r}: {', '.join(keys)}")
    return str(keys[0])


# --- settings and servers ---


def load_settings() -> Settings:
    """The settings, after telling what is odd about them. The addresses of embedded servers are still missing."""
    from wfm import config

    settings = config.load()
    for warning in settings.warnings:
        output.warn(warning)
    if settings.log_level == "DEBUG":
        start_logging("DEBUG", "wfm")
    return settings


def start_logging(level: str, name: str) -> None:
    """Log to standard error, one line each: time in UTC, level, who, what."""
    form = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ %(levelname)s {name.replace('%', '%%')}: %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    form.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(form)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("transitions", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def open_settings() -> Settings:
    """The settings with the addresses of the servers; see `with_servers`."""
    return with_servers(load_settings())


def with_servers(settings: Settings) -> Settings:
    """Settings with the addresses of the servers.

    Raises:
        UnavailableError: the servers would be embedded ones, and they do not run.
    """
    if not settings.embedded:
        return settings
    from wfm.embedded import Embedded

    servers = Embedded(settings.home)
    if not servers.status()["postgres"].running:
        raise UnavailableError(
            f"nothing runs in {settings.home}: start it with `wfm up`, set WFM_HOME to the home of a running system, "
            "or set WFM_DATABASE_URL and WFM_REDIS_URL to servers of your own"
        )
    return settings.with_servers(servers.database_url, servers.redis_url)


class Deployment:
    """The configured database and Redis, as a command uses them."""

    def __init__(self, settings: Settings) -> None:
        from wfm.service import open_store

        self.settings = settings
        self.location = settings.processing_location_id
        self.store: Store = open_store(settings)

    @contextmanager
    def read(self) -> Iterator[Tx]:
        """A transaction that only reads."""
        with self.store.begin() as tx:
            yield tx

    def write(self, work: Callable[[Tx], T]) -> T:
        """Do `work` in one transaction, and publish its events after the commit."""
        value, outbox = self.store.retrying(work)
        self.publish(outbox)
        return value

    def publish(self, outbox: Sequence[Message]) -> None:
        """Publish, at best: everything is in the ledger already."""
        from wfm.bus import RedisError

        try:
            self.send(outbox)
        except RedisError as e:
            output.warn(f"committed, but Redis cannot be told now ({e}): the roles tell it when it is back")

    def send(self, outbox: Sequence[Message]) -> list[Message]:
        """Publish, or raise RedisError; returns what a full stream did not take."""
        from wfm.service import open_bus

        bus = open_bus(self.settings)
        with closing(bus.client):
            return bus.send(outbox)


@contextmanager
def deployment(settings: Settings | None = None) -> Iterator[Deployment]:
    """The configured deployment; `open_settings` if no settings are given."""
    opened = Deployment(settings or open_settings())
    try:
        yield opened
    finally:
        opened.store.close()


def check_schema(engine: Engine, schema: str) -> None:
    """Refuse tables that this version cannot work with.

    Raises:
        UsageError: they are missing, or of another version.
    """
    from wfm import migrations

    found, wanted = migrations.current(engine, schema), migrations.head()
    if found is None:
        raise UsageError(f"schema {schema} of the database has no tables of wfm: run `wfm db upgrade`")
    if found != wanted:
        raise UsageError(
            f"schema {schema} of the database is at revision {found}, and this wfm works with {wanted}: run "
            "`wfm db upgrade`; if the database is the newer one, install the newer wfm"
        )


def check_location(conn: Connection, location_id: int) -> None:
    """Refuse a location that the catalogue does not have.

    Raises:
        UsageError: there is no such location where jobs can run.
    """
    known = processing_locations(conn)
    if location_id not in known:
        listed = ", ".join(f"{i} ({name})" for i, name in known.items()) or "none"
        raise UsageError(
            f"PROCESSING_LOCATION_ID is {location_id}, but the catalogue has no such location of type processing "
            f"(there: {listed}). Set it to one of these, or apply one: `wfm apply -f FILE` with kind: location, "
            f"id: {location_id}, name, site, type: processing, root"
        )


def processing_locations(conn: Connection) -> dict[int, str]:
    """The names of the locations where jobs can run, by id."""
    from sqlalchemy import text

    rows = conn.execute(text("SELECT id, name FROM data_location WHERE type = 'processing' ORDER BY id"))
    return {r.id: r.name for r in rows}


def postgres_version(settings: Settings) -> str:
    """What Postgres says it is."""
    from sqlalchemy import text

    from wfm.store import connect

    engine = connect(settings.database_url, settings.database_schema)
    try:
        with engine.connect() as conn:
            return f"Postgres {conn.execute(text('SHOW server_version')).scalar_one()}"
    finally:
        engine.dispose()


def redis_version(settings: Settings) -> str:
    """What Redis says it is."""
    from wfm.service import open_bus

    with closing(open_bus(settings).client) as client:
        return server_name(client.info("server"))


def server_name(info: Mapping[str, Any]) -> str:
    """What a server says it is in its answer to INFO; Valkey also gives the version of Redis that it is like."""
    return f"Valkey {info['valkey_version']}" if "valkey_version" in info else f"Redis {info['redis_version']}"


# --- errors ---


def explain(error: Exception) -> WfmError | None:
    """What an error of a server means to people; None if it is a defect of ours."""
    if isinstance(error, WfmError):
        return error
    if "redis" in sys.modules:
        import redis.exceptions

        if isinstance(error, redis.exceptions.RedisError):
            return UnavailableError(f"Redis does not answer as it should: {error}\n{_look('redis_url', 'redis_host')}")
    if "sqlalchemy" in sys.modules:
        from sqlalchemy.exc import DBAPIError

        if isinstance(error, DBAPIError):
            return _explain_database(error)
    return None


def meaning(error: Exception) -> tuple[str, str]:
    """What an error of a server means to people, and what to change; a defect of ours is raised again."""
    explained = explain(error)
    if explained is None:
        raise error
    said, *advice = str(explained).splitlines()
    return said, "; ".join(line for line in advice if line != _SEE_DOCTOR)


_TABLES_MISSING = {"42P01", "42703", "3F000"}
"""Undefined table, undefined column, invalid schema name."""
_NOT_ALLOWED = {"42501"}


def _explain_database(error: Any) -> WfmError | None:
    from wfm.store import is_connection_error

    code = getattr(error.orig, "pgcode", None)
    said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
    if code in _TABLES_MISSING:
        return UsageError(f"the tables of wfm are missing, or of another version ({said}): run `wfm db upgrade`")
    if code in _NOT_ALLOWED:
        return UsageError(f"the database user may not do this ({said}): see `wfm doctor`")
    if is_connection_error(error):
        return UnavailableError(f"Postgres cannot be reached: {said}\n{_look('database_url')}")
    return None


_SEE_DOCTOR = "`wfm doctor` checks every connection, permission, path and version"


def _look(*names: str) -> str:
    """Where to look when a server is away."""
    from wfm import config

    settings = config.load()
    if settings.embedded:
        return f"look at the logs in {settings.home / 'log'}\n{_SEE_DOCTOR}"
    found = [(name, value, source) for name, value, source in settings.describe() if name in names and value]
    shown = [f"{name} = {value} (from {source})" for name, value, source in found]
    return f"look at {', '.join(shown)}\n{_SEE_DOCTOR}"


class _Shown(click.ClickException):
    """An error as click prints it: every fault in a line of its own."""

    def __init__(self, error: WfmError) -> None:
        super().__init__(str(error))
        self.exit_code: int = error.exit_code  # type: ignore[misc]  # click declares it for the class
        self.faults: Sequence[str] = getattr(error, "faults", (str(error),))

    def show(self, file: Any = None) -> None:
        for fault in self.faults:
            click.echo(f"{click.style('error:', fg='red', bold=True)} {fault}", file=file, err=file is None)


def fail(error: Exception) -> NoReturn:
    """End the command with what an error means to people."""
    shown = explain(error)
    if shown is None:
        shown = WfmError(f"{type(error).__name__}: {error}\nthis is a defect of wfm; --debug shows where")
    raise _Shown(shown) from error
