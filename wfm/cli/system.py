"""The four roles in the foreground, and the whole system on one machine: up, down, status, health, demo."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct, structs

from wfm.cli import context, output
from wfm.errors import RefusedError, UnavailableError, UsageError, WfmError
from wfm.model import Actor, Role

if TYPE_CHECKING:
    from wfm.bus import Bus
    from wfm.config import Settings
    from wfm.embedded import Daemon
    from wfm.views import Counts, CoverageLine

GRACE_SECONDS = 12.0
"""A role needs up to 8 s to finish what it has in hand, or to hand it back."""
START_LIMIT = 60.0
"""s that a role may take until it is at work."""

concurrency = click.option(
    "-c", "--concurrency", type=click.IntRange(1, 256), default=4, help="Tasks of one kind that a worker does at once."
)


# --- one role in the foreground ---


@click.command("trigger-manager")
def trigger_manager() -> None:
    """Find gaps: data that no valid result covers.

    \b
    Example:  wfm trigger-manager
    """
    _serve(Role.TRIGGER_MANAGER)


@click.command("workflow-manager")
def workflow_manager() -> None:
    """Admit runs to free slots, and build their jobs.

    \b
    Example:  wfm workflow-manager
    """
    _serve(Role.WORKFLOW_MANAGER)


@click.command("worker")
@click.argument("name", default="worker")
@concurrency
def worker(name: str, concurrency: int) -> None:
    """Stage inputs, submit jobs, collect products. Any number of workers may run.

    \b
    Example:  wfm worker night-1 -c 8
    """
    _serve(Role.WORKER, name, concurrency)


@click.command("result-manager")
def result_manager() -> None:
    """Follow jobs to their end.

    \b
    Example:  wfm result-manager
    """
    _serve(Role.RESULT_MANAGER)


def _serve(role: Role, name: str = "", slots: int = 1) -> None:
    from wfm import service

    settings = context.open_settings()
    context.start_logging(settings.log_level, f"{role} {name}".rstrip())
    _check_database(settings)
    service.serve(settings, role, name=name or role, slots=slots)


def _check_database(settings: Settings) -> None:
    """Refuse to start on tables of another version or at an unknown location. A database that is away may come back."""
    from sqlalchemy.exc import DBAPIError

    from wfm.store import connect, is_connection_error

    engine = connect(settings.database_url, settings.database_schema)
    try:
        fault = context.schema_fault(engine, settings.database_schema)
        if not fault:
            with engine.connect() as conn:
                fault = context.location_fault(conn, settings.processing_location_id)
    except DBAPIError as e:
        if not is_connection_error(e):
            raise
        fault = ""
    finally:
        engine.dispose()
    if fault:
        raise UsageError(fault)


# --- the processes of this machine, and the copies of roles anywhere ---


class Copy(Struct, frozen=True):
    """A copy of a role that reads its streams, wherever it runs."""

    role: Role
    host: str
    pid: int


@contextmanager
def watching(settings: Settings) -> Iterator[Callable[[], list[Copy]]]:
    """Ask Redis, as often as wanted, which copies of the roles have been heard of lately."""
    from redis.exceptions import ResponseError

    from wfm import service
    from wfm.roles import streams_of

    charts = service.load_charts()
    bus = service.open_bus(settings)
    streams = {role: bus.prefix + streams_of(role, charts[max(charts)])[0] for role in Role}
    # A reader comes back within every block and every claim; a dead one's name stays for an hour.
    lately = settings.block_seconds + 2 * settings.claim_idle_seconds

    def copies() -> list[Copy]:
        found = []
        for role, stream in streams.items():
            try:
                consumers = bus.client.xinfo_consumers(stream, role)
            except ResponseError:  # no such stream, or no such group: nobody was ever there
                continue
            for c in consumers:
                host, pid, _ = c["name"].decode().rsplit(":", 2)
                if c["idle"] / 1000 <= lately:
                    found.append(Copy(role, host, int(pid)))
        return found

    with closing(bus.client):
        yield copies


def _daemons(home: Path, workers: int = 0) -> dict[Daemon, Role]:
    """The roles as background processes of this home: those that were started here, and those that are wanted."""
    from wfm.embedded import Daemon

    found = {}
    for role in Role:
        names = {path.stem for path in (home / "run").glob(f"{role}*.pid")}
        if role is not Role.WORKER:
            names |= {str(role)} if workers else set()
        else:
            names |= {f"worker-{n}" for n in range(1, workers + 1)}
        found |= {Daemon(home, name): role for name in sorted(names)}
    return found


# --- up ---


@click.command()
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Worker processes.")
@concurrency
def up(workers: int, concurrency: int) -> None:
    """Start the whole system on this machine.

    Postgres and Valkey of its own, unless servers are configured, and the four roles as background processes. What runs
    already goes on; what has died is started again. The state is in .wfm/, or where WFM_HOME says.

    \b
    Example:  wfm up --workers 2 -c 8
    """
    from wfm.embedded import Embedded, lock

    settings = context.load_settings()
    with lock(settings.home):
        if settings.embedded:
            servers = Embedded(settings.home)
            servers.start(click.echo)
            settings = settings.with_servers(servers.database_url, servers.redis_url)
        else:
            _ping(settings)
        _prepare_database(settings)
        started = _start_roles(settings, _daemons(settings.home, workers), concurrency)
    click.echo(f"{started or 'everything ran already'}; `wfm status` shows how it stands, `wfm down` ends it")


def _ping(settings: Settings) -> None:
    from wfm.service import open_bus

    with closing(open_bus(settings).client) as client:
        client.ping()


def _prepare_database(settings: Settings) -> None:
    """Tables at the newest revision, and a location to work at."""
    from wfm import documents, migrations

    with context.deployment(settings) as d:
        migrations.upgrade(d.store.engine, settings.database_schema)
        with d.store.engine.connect() as conn:
            fault = context.location_fault(conn, d.location)
            elsewhere = context.processing_locations(conn)
        if not fault:
            return
        if elsewhere or not (settings.embedded or settings.env == "localdev"):
            raise UsageError(fault)
        here: dict[str, Any] = {"site": "local", "type": "processing", "root": str(settings.pipeline_base_dir)}
        text = documents.dump(
            [{"kind": "site", "name": "local"}, {"kind": "location", "id": d.location, "name": "local", **here}]
        )
        made = documents.load([("wfm up", text)])
        by = context.actor("wfm up")
        d.write(
            lambda tx: documents.apply(tx.conn, made, location_id=d.location, actor=by.name, reason=by.reason)
        )


def _start_roles(settings: Settings, daemons: Mapping[Daemon, Role], concurrency: int) -> str:
    """Start what does not run and wait until all is at work; returns what was started, for people."""
    # The roles must find the same home, whatever directory they are looked at from.
    env = {**os.environ, "WFM_HOME": str(settings.home)}
    env.pop("CCAT_WORKFLOW_MANAGER_HOME", None)
    started = []
    for daemon, role in daemons.items():
        if daemon.pid() is None:
            words = [daemon.name, "-c", str(concurrency)] if role is Role.WORKER else []
            # -P: a directory named wfm where the user happens to stand is not the program.
            daemon.start([sys.executable, "-P", "-m", "wfm", role, *words], env)
            started.append(daemon)
    waiting = list(daemons)
    end = time.monotonic() + START_LIMIT
    with output.progress("starting the roles", len(waiting)) as advance, watching(settings) as copies:
        while waiting:
            seen = {c.pid for c in copies() if c.host == socket.gethostname()}
            for daemon in list(waiting):
                pid = daemon.pid()
                if pid in seen:
                    waiting.remove(daemon)
                    advance(1)
                    if daemon in started:
                        click.echo(f"{daemon.name} is at work as process {pid}")
                elif pid is None or time.monotonic() > end:
                    what = "ended" if pid is None else f"is not at work after {START_LIMIT:g} s"
                    raise UnavailableError(
                        f"{daemon.name} {what}. The last lines of {daemon.log}:\n{daemon.last_lines()}\n"
                        "What was started goes on: `wfm up` tries again, `wfm down` ends it"
                    )
            time.sleep(0.05)
    return f"started {output.plural(len(started), 'role')}" if started else ""


# --- down ---


@click.command()
def down() -> None:
    """Stop the roles and the servers that `wfm up` started. Data, runs and events stay.

    Jobs that run go on by themselves; the next `wfm up` takes them over.

    \b
    Example:  wfm down
    """
    from wfm.embedded import Embedded, lock

    settings = context.load_settings()
    home = settings.home
    with lock(home):
        daemons = list(_daemons(home))
        with ThreadPoolExecutor(max(len(daemons), 1)) as pool:
            ended = list(pool.map(lambda daemon: daemon.stop(GRACE_SECONDS), daemons))
        for daemon, gently in zip(daemons, ended, strict=True):
            click.echo(f"{daemon.name} {'stopped' if gently else 'was killed; others take over what it did'}")
        servers = [name for name in ("postgres", "valkey") if Daemon(home, name).pid() is not None]
        if servers or settings.embedded:
            Embedded(home).stop()
        for name in servers:
            click.echo(f"{name} stopped")
        if not daemons and not servers:
            click.echo(f"nothing ran in {home}")


# --- status ---


class ServerLine(Struct, frozen=True):
    """A server: whether it answers, its process if it is ours, and its version or what is wrong."""

    name: str
    state: Literal["ok", "down"]
    pid: int | None
    about: str


class RoleLine(Struct, frozen=True):
    """A role: ``at work`` (it reads its streams), ``starting`` (its process lives), or ``down``."""

    name: str
    state: Literal["at work", "starting", "down"]
    host: str
    pid: int | None


class Status(Struct, frozen=True, kw_only=True):
    """How a deployment stands. What cannot be known now is None, and `faults` says why."""

    running: bool
    home: str
    location_id: int
    servers: list[ServerLine]
    roles: list[RoleLine]
    counts: Counts | None
    coverage: list[CoverageLine] | None
    faults: list[str]


@click.command()
@output.as_json
def status(as_json: bool) -> None:
    """Show how the system stands: servers, roles, runs, coverage, what waits. Ends with 0 if all of it runs.

    \b
    Example:  wfm status
              wfm status --json | jq .counts.runs
    """
    found = _status(context.load_settings())
    if as_json:
        output.document(found)
    else:
        _show(found)
    if not found.running:
        click.get_current_context().exit(1)


def _status(settings: Settings) -> Status:
    faults: list[str] = []

    def attempt(question: Callable[[], T]) -> T | None:
        try:
            return question()
        except Exception as e:
            fault = context.explain(e)
            if fault is None:
                raise
            faults.append(str(fault))
            return None

    servers: list[ServerLine]
    if settings.embedded:
        servers, settings = _embedded(settings)
    else:
        servers = [_database(settings, attempt), _redis(settings, attempt)]
    up = {s.name: s.state == "ok" for s in servers}
    seen = (attempt(lambda: _copies(settings)) if up["redis"] else None) or []
    roles = _roles(settings.home, seen)
    asked = attempt(lambda: _counted(settings)) if up["database"] else None
    return Status(
        running=all(up.values()) and all(r.state == "at work" for r in roles) and asked is not None,
        home=str(settings.home),
        location_id=settings.processing_location_id,
        servers=servers,
        roles=roles,
        counts=asked[0] if asked else None,
        coverage=asked[1] if asked else None,
        faults=faults,
    )
