"""The four roles in the foreground, and the whole system on one machine: up, down, status, health, demo."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.errors import UnavailableError
from wfm.model import Role

if TYPE_CHECKING:
    from wfm.config import Settings
    from wfm.embedded import Daemon
    from wfm.views import AbsenceLine, Counts, CoverageLine

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
    """Stage inputs, submit jobs, collect products.

    Any number of workers may run; NAME tells them apart.

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
    service.serve(settings, role, name=name, slots=slots)


def _check_database(settings: Settings) -> None:
    """Refuse tables of another version and an unknown location. A database that is away may come back."""
    from sqlalchemy.exc import DBAPIError

    from wfm.store import connect, is_connection_error

    engine = connect(settings.database_url, settings.database_schema)
    try:
        context.check_schema(engine, settings.database_schema)
        with engine.connect() as conn:
            context.check_location(conn, settings.processing_location_id)
    except DBAPIError as e:
        if not is_connection_error(e):
            raise
    finally:
        engine.dispose()


# --- the processes of this machine, and the copies of roles anywhere ---


class Copy(Struct, frozen=True):
    """A copy of a role that reads its streams, wherever it runs."""

    role: Role
    host: str
    pid: int


@contextmanager
def watching(settings: Settings) -> Iterator[Callable[[], list[Copy]]]:
    """Ask Redis, as often as wanted, which copies of the roles have been heard of lately."""
    from redis.exceptions import NoPermissionError, ResponseError

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
            except NoPermissionError:
                raise
            except ResponseError:  # no such stream, or no such group: nobody was ever there
                continue
            for c in consumers:
                host, pid, _ = c["name"].decode().rsplit(":", 2)
                if c["idle"] / 1000 <= lately:
                    found.append(Copy(role, host, int(pid)))
        return found

    with closing(bus.client):
        yield copies


def _daemons(home: Path, workers: int = 0) -> list[tuple[Role, Daemon]]:
    """The roles as background processes: those that were started from this home, and those of `workers` workers."""
    from wfm.embedded import Daemon

    found = []
    for role in Role:
        wanted = [f"{role}-{n}" for n in range(1, workers + 1)] if role is Role.WORKER else [str(role)] * bool(workers)
        started = [path.stem for path in (home / "run").glob(f"{role}*.pid")]
        found += [(role, Daemon(home, name)) for name in sorted({*wanted, *started})]
    return found


# --- up ---


@click.command()
@click.option("--workers", type=click.IntRange(1, 64), default=1, help="Worker processes.")
@concurrency
def up(workers: int, concurrency: int) -> None:
    """Start the whole system on this machine.

    Postgres and Valkey of its own (unless servers are configured), and the four roles as background processes. What
    runs goes on; what died is started again. Its state lies where WFM_HOME says; else in .wfm of this directory, or of
    the nearest one above that has it.

    \b
    Example:  wfm up --workers 2 -c 8
    """
    from wfm.embedded import Embedded, lock
    from wfm.service import open_bus

    settings = context.load_settings()
    click.echo(settings.which_home)
    with lock(settings.home):
        if settings.embedded:
            servers = Embedded(settings.home)
            servers.start(click.echo)
            settings = settings.with_servers(servers.database_url, servers.redis_url)
        else:
            with closing(open_bus(settings).client) as client:
                client.ping()
        _prepare_database(settings)
        started = _start_roles(settings, _daemons(settings.home, workers), concurrency)
    now = f"{output.plural(started, 'role')} started" if started else "all roles were at work already"
    click.echo(f"{now}; `wfm status` shows how it stands, `wfm down` ends it")


def _prepare_database(settings: Settings) -> None:
    """Tables at the newest revision, and a location to work at."""
    from wfm import documents, migrations, yamltext

    with context.deployment(settings) as d:
        migrations.upgrade(d.store.engine, settings.database_schema)
        own = settings.embedded or settings.env == "localdev"
        with d.read() as tx:
            if context.processing_locations(tx.conn) or not own:
                context.check_location(tx.conn, d.location)
                return
        place = {"site": "local", "type": "processing", "root": str(settings.pipeline_base_dir)}
        location: dict[str, Any] = {"kind": "location", "name": "local", "id": d.location, **place}
        new = [{"kind": "site", "name": "local"}, location]
        read = documents.load([("wfm up", yamltext.dump(new))])
        actor = context.actor("the first `wfm up`")
        d.write(
            lambda tx: documents.apply(tx.conn, read, location_id=d.location, actor=actor.name, reason=actor.reason)
        )


def _start_roles(settings: Settings, daemons: Sequence[tuple[Role, Daemon]], concurrency: int) -> int:
    """Start what does not run, and wait until all is at work; returns how many were started."""
    # The roles must find this home from wherever they are started.
    env = {**os.environ, "WFM_HOME": str(settings.home)}
    env.pop("CCAT_WORKFLOW_MANAGER_HOME", None)
    started = []
    for role, daemon in daemons:
        if daemon.pid() is None:
            words = [daemon.name, "-c", str(concurrency)] if role is Role.WORKER else []
            # -P: a directory named wfm where the user happens to stand is not the program.
            daemon.start([sys.executable, "-P", "-m", "wfm", role, *words], env)
            started.append(daemon)
    waiting = [daemon for _, daemon in daemons]
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
                    raise UnavailableError(
                        f"{daemon.name} {'ended' if pid is None else f'is not at work after {START_LIMIT:g} s'}. "
                        f"The last lines of {daemon.log}:\n{daemon.last_lines()}\n"
                        "The rest goes on: `wfm up` tries again, `wfm down` ends it"
                    )
            time.sleep(0.05)
    return len(started)


# --- down ---


@click.command()
def down() -> None:
    """Stop the roles and the servers that `wfm up` started.

    Data, runs and events stay. Jobs that run now go on by themselves; the next `wfm up` takes them over.

    \b
    Example:  wfm down
    """
    from wfm.embedded import Daemon, Embedded, lock

    settings = context.load_settings()
    home = settings.home
    if not home.exists():
        click.echo(f"nothing ran in {home}")
        return
    click.echo(settings.which_home)
    with lock(home):
        roles = [daemon for _, daemon in _daemons(home)]
        with ThreadPoolExecutor(max(len(roles), 1)) as pool:
            gently = list(pool.map(lambda daemon: daemon.stop(GRACE_SECONDS), roles))
        for daemon, by_itself in zip(roles, gently, strict=True):
            click.echo(f"{daemon.name} {'stopped' if by_itself else 'was killed; what it held is taken up by others'}")
        servers = [name for name in ("postgres", "valkey") if Daemon(home, name).pid() is not None]
        if servers or settings.embedded:
            Embedded(home).stop()
        for name in servers:
            click.echo(f"{name} stopped")
    if not roles and not servers:
        click.echo(f"nothing ran in {home}")


# --- status ---


class ServerLine(Struct, frozen=True):
    """A server: whether it answers; its process if it is one of ours; its version, or what is wrong."""

    name: str
    state: Literal["ok", "down"]
    pid: int | None
    about: str


class RoleLine(Struct, frozen=True):
    """A role: ``at work`` (Redis heard of it lately), ``alive`` (its process lives, but Redis did not), or ``down``."""

    name: str
    state: Literal["at work", "alive", "down"]
    host: str
    pid: int | None


class Status(Struct, frozen=True, kw_only=True):
    """How a deployment stands. `counts` and `coverage` are None if the database cannot tell; `faults` says why."""

    running: bool
    home: str
    location_id: int
    servers: list[ServerLine]
    roles: list[RoleLine]
    counts: Counts | None
    coverage: list[CoverageLine] | None
    absent: list[AbsenceLine]
    faults: list[str]


@click.command()
@output.as_json
def status(as_json: bool) -> None:
    """Show how the system stands.

    Servers, roles, runs by state, coverage by step, events that wait, dead letters. Ends with 0 if all of it runs.

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
    servers, settings = _servers(settings)
    answers = [s.state == "ok" for s in servers]
    faults: list[str] = []
    counts, coverage, seen = None, None, []
    absent: list[AbsenceLine] = []
    try:
        if answers[0]:
            counts, coverage, absent = _counted(settings)
        if answers[1]:
            with watching(settings) as copies:
                seen = copies()
    except Exception as e:
        faults.append("; ".join(filter(None, context.meaning(e))))
    roles = _roles(settings.home, seen)
    return Status(
        running=all(answers) and not faults and all(r.state == "at work" for r in roles),
        home=str(settings.home),
        location_id=settings.processing_location_id,
        servers=servers,
        roles=roles,
        counts=counts,
        coverage=coverage,
        absent=absent,
        faults=faults,
    )


def _servers(settings: Settings) -> tuple[list[ServerLine], Settings]:
    """Postgres and Redis as they answer, and the settings with their addresses."""
    from wfm.embedded import Embedded

    pids: dict[str, int | None] = {}
    names = ["postgres", "redis"]
    if settings.embedded:
        own = Embedded(settings.home)
        pids = {name: server.pid for name, server in own.status().items()}
        names = list(pids)
        settings = settings.with_servers(own.database_url, own.redis_url)
    lines = []
    for name, ask in zip(names, (context.postgres_version, context.redis_version), strict=True):
        if settings.embedded and pids[name] is None:
            lines.append(ServerLine(name, "down", None, "does not run; `wfm up` starts it"))
            continue
        try:
            lines.append(ServerLine(name, "ok", pids.get(name), ask(settings)))
        except Exception as e:
            lines.append(ServerLine(name, "down", pids.get(name), context.meaning(e)[0]))
    return lines, settings


def _counted(settings: Settings) -> tuple[Counts, list[CoverageLine], list[AbsenceLine]]:
    from wfm import views

    with context.deployment(settings) as d, d.read() as tx:
        context.check_schema(d.store.engine, settings.database_schema)
        context.check_location(tx.conn, d.location)
        counted = views.counts(tx.conn, d.location), views.coverage_summary(tx.conn, d.location)
        return *counted, views.absences(tx.conn, d.location)


def _roles(home: Path, seen: Sequence[Copy]) -> list[RoleLine]:
    """The roles that belong to this home, and those that work elsewhere for the same location."""
    host = socket.gethostname()
    at_work = {(c.host, c.pid) for c in seen}
    daemons = _daemons(home)
    lines: list[RoleLine] = []
    for role in Role:
        own = [(daemon.name, daemon.pid()) for r, daemon in daemons if r is role]
        here = {(host, pid) for _, pid in own}
        found = [
            RoleLine(name, "at work" if (host, pid) in at_work else "alive" if pid else "down", host, pid)
            for name, pid in own
        ]
        found += [
            RoleLine(role, "at work", c.host, c.pid)
            for c in seen
            # Redis remembers for a while what was killed here.
            if c.role is role and (c.host, c.pid) not in here and (c.host != host or Path(f"/proc/{c.pid}").exists())
        ]
        lines += found or [RoleLine(role, "down", "", None)]
    return lines


def _show(s: Status) -> None:
    click.echo(f"home {s.home}, location {s.location_id}\n")
    output.table(("SERVER", "STATE", "PID", "ABOUT"), [(x.name, x.state, x.pid, x.about) for x in s.servers], empty="")
    click.echo()
    output.table(("ROLE", "STATE", "PID", "HOST"), [(x.name, x.state, x.pid, x.host) for x in s.roles], empty="")
    if s.counts is not None:
        click.echo()
        runs = [(state, n) for state, n in s.counts.runs.items() if n]
        output.table(("RUNS", "NUMBER"), runs, empty="no runs yet")
        click.echo()
        waits = [(p.recipient, p.events, output.span(p.oldest_seconds)) for p in s.counts.pending]
        output.table(("EVENTS FOR", "PENDING", "OLDEST"), waits, empty="no event is pending")
        if s.counts.paused:
            click.echo()
            paused = [(p.what, p.units, p.by, p.reason) for p in s.counts.paused]
            output.table(("PAUSED", "UNITS", "BY", "REASON"), paused, empty="")
        if s.counts.dead_letters:
            click.echo(f"\n{output.plural(s.counts.dead_letters, 'dead letter')}: see `wfm events dead list`")
    if s.coverage is not None:
        click.echo()
        show_coverage(s.coverage)
    if s.absent:
        click.echo()
        output.table(("ABSENT", "SINCE"), [(a.reason, output.when(a.since)) for a in s.absent], empty="")
    for fault in s.faults:
        click.echo(f"\n{fault}")


def show_coverage(lines: Sequence[CoverageLine]) -> None:
    """Print how much of each step is covered; states that occur nowhere are left out."""
    states = [state for state in (lines[0].states if lines else ()) if any(line.states[state] for line in lines)]
    output.table(
        ("PIPELINE", "STEP", "UNITS", *(state.upper() for state in states)),
        [(x.pipeline, x.step, x.units, *(x.states[state] for state in states)) for x in lines],
        empty="no pipelines yet: `wfm apply -f FILE`, or `wfm demo`",
    )


# --- health, demo ---


@click.command()
@click.argument("role", type=click.Choice([str(r) for r in Role]), required=False)
@output.as_json
def health(role: str | None, as_json: bool) -> None:
    """Tell whether a role is at work, here or elsewhere; every role if none is named.

    Ends with 1 if one is not: fit for the health check of a container.

    \b
    Example:  wfm health worker
    """
    with watching(context.open_settings()) as copies:
        seen = copies()
    found = {r: [f"{c.host}:{c.pid}" for c in seen if c.role is r] for r in Role if role in (None, r)}
    if as_json:
        output.document(found)
    else:
        rows = [(r, "at work" if where else "down", len(where), ", ".join(where)) for r, where in found.items()]
        output.table(("ROLE", "STATE", "COPIES", "WHERE"), rows, empty="")
    if not all(found.values()):
        click.get_current_context().exit(1)


@click.command()
@click.option("--simulated", is_flag=True, help="Make data up instead of fetching what a telescope has seen.")
def demo(simulated: bool) -> None:
    """Take real telescope data through three steps to maps and plots.

    Says what it made, and where.

    \b
    Example:  wfm demo
              wfm demo --simulated
    """
    from wfm.demo.run import main

    main(simulated=simulated)
