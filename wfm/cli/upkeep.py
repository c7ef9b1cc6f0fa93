"""Upkeep of a deployment: doctor, the database's tables, statecharts, shell completion."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.cli.system import watching
from wfm.errors import ChartError, NotFoundError, UsageError
from wfm.model import Role

if TYPE_CHECKING:
    from wfm.config import Settings
    from wfm.embedded import Embedded

OLDEST_POSTGRES = 13
OLDEST_REDIS = (6, 2)
CLOCK_SECONDS = 5.0
"""Difference between two clocks from which on times in logs and tables mislead people."""


# --- doctor ---


class Finding(Struct, frozen=True):
    """One line of the doctor: what was looked at, how it is, what was seen, and what to change."""

    check: str
    verdict: Literal["ok", "warn", "fail"]
    seen: str
    change: str = ""


class Setting(Struct, frozen=True):
    """A setting as it is in effect. `source` is what set it."""

    name: str
    value: str
    source: str


Findings = Iterator[Finding]


@click.command()
@output.as_json
def doctor(as_json: bool) -> None:
    """Check every connection, permission, path and version, and say what to change.

    Shows all settings and where each comes from. Ends with 1 if something must be changed.

    \b
    Example:  wfm doctor
    """
    from wfm.embedded import Embedded

    settings = context.load_settings()
    servers = Embedded(settings.home) if settings.embedded else None
    if servers:
        settings = settings.with_servers(servers.database_url, servers.redis_url)
    findings = list(_examine(settings, servers))
    listed = [Setting(*described) for described in settings.describe()]
    if as_json:
        output.document({"checks": findings, "settings": listed})
    else:
        output.table(("SETTING", "VALUE", "FROM"), [(s.name, s.value, s.source) for s in listed], empty="")
        click.echo()
        rows = [(f.verdict, f.check, f.seen + (f" → {f.change}" if f.change else "")) for f in findings]
        output.table(("IS", "CHECK", "SEEN → WHAT TO CHANGE"), rows, empty="")
    if any(f.verdict == "fail" for f in findings):
        click.get_current_context().exit(1)


def _examine(settings: Settings, servers: Embedded | None) -> Findings:
    yield from (Finding("settings", "warn", warning, "unset it, or correct its name") for warning in settings.warnings)
    yield from _attempt("charts", _charts)
    if servers and (down := [name for name, server in servers.status().items() if not server.running]):
        yield Finding("embedded servers", "fail", f"not running: {', '.join(down)}", "wfm up")
    yield from _attempt("Postgres", lambda: _postgres(settings))
    yield from _attempt("Redis", lambda: _redis(settings))
    yield from _attempt("roles", lambda: _roles_at_work(settings))
    yield from _attempt("pipeline_base_dir", lambda: _directory(settings))
    yield from _attempt("backend", lambda: _backend(settings))


def _attempt(check: str, examine: Callable[[], Findings]) -> Findings:
    """The findings of one check; whatever stops it is one more."""
    try:
        yield from examine()
    except Exception as e:
        yield Finding(check, "fail", *context.meaning(e))


def _charts() -> Findings:
    from wfm.service import load_charts

    yield Finding("charts", "ok", ", ".join(map(str, load_charts().values())))


_RIGHTS = """
SELECT t.tablename, array_agg(r.name) AS missing
FROM pg_tables t CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS r(name)
WHERE t.schemaname = :schema
    AND NOT has_table_privilege(quote_ident(t.schemaname) || '.' || quote_ident(t.tablename), r.name)
GROUP BY t.tablename ORDER BY t.tablename
"""


def _postgres(settings: Settings) -> Findings:
    with context.deployment(settings) as d:
        with d.read() as tx:
            number = int(tx.all("SHOW server_version_num")[0][0])
            seen = f"{number // 10_000}.{number % 10_000} at {d.store.engine.url.render_as_string(hide_password=True)}"
            old = number // 10_000 < OLDEST_POSTGRES
            change = f"wfm needs Postgres {OLDEST_POSTGRES} or newer" if old else ""
            yield Finding("Postgres", "fail" if old else "ok", seen, change)
            yield from _clock(tx)
        yield from _attempt("tables", lambda: _tables(d))
        yield from _attempt("location", lambda: _location(d))


def _clock(tx: Any) -> Findings:
    before = time.time()
    theirs = float(tx.all("SELECT extract(epoch FROM clock_timestamp())::float8 AS now")[0].now)
    apart = theirs - (before + time.time()) / 2
    seen = f"Postgres is {abs(apart):.3f} s {'ahead' if apart > 0 else 'behind'}"
    if abs(apart) < CLOCK_SECONDS:
        yield Finding("clock", "ok", seen)
    else:
        yield Finding("clock", "warn", seen, "synchronise both clocks; wfm itself goes by the clock of Postgres")


def _tables(d: context.Deployment) -> Findings:
    schema = d.settings.database_schema
    context.check_schema(d.store.engine, schema)
    with d.read() as tx:
        lacking = tx.all(_RIGHTS, schema=schema)
        user = tx.all("SELECT current_user AS name")[0].name
        if lacking:
            listed = "; ".join(f"{', '.join(r.missing)} on {r.tablename}" for r in lacking)
            yield Finding("tables", "fail", f"user {user} lacks {listed}", f"GRANT it to {user} in schema {schema}")
        else:
            yield Finding("tables", "ok", f"schema {schema} is at the newest revision, and {user} may use it")


def _location(d: context.Deployment) -> Findings:
    with d.read() as tx:
        context.check_location(tx.conn, d.location)
        yield Finding("location", "ok", f"{d.location} ({context.processing_locations(tx.conn)[d.location]})")


def _redis(settings: Settings) -> Findings:
    from redis.exceptions import ResponseError

    from wfm.service import open_bus

    bus = open_bus(settings)
    with closing(bus.client) as client:
        client.ping()
        try:
            info = client.info()
        except ResponseError as e:
            yield Finding("Redis", "warn", f"INFO is not allowed ({e})", "allow it, so that its version can be checked")
        else:
            version = str(info["redis_version"])
            old = tuple(map(int, version.split(".")[:2])) < OLDEST_REDIS
            wanted = ".".join(map(str, OLDEST_REDIS))
            yield Finding(
                "Redis",
                "fail" if old else "ok",
                context.server_name(info),
                f"wfm needs Redis {wanted} or newer" if old else "",
            )
            if (policy := info.get("maxmemory_policy", "noeviction")) != "noeviction":
                change = "set maxmemory-policy noeviction: evicted messages cost time (the ledger publishes them again)"
                yield Finding("Redis memory", "warn", f"maxmemory-policy is {policy}", change)
        key = f"{bus.prefix}doctor"
        try:
            client.xgroup_create(key, "doctor", id="0", mkstream=True)
            entry = client.xadd(key, {b"event": b"{}"})
            client.xreadgroup("doctor", "doctor", {key: ">"}, count=1)
            client.xack(key, "doctor", entry)
            client.xdel(key, entry)
            yield Finding("Redis rights", "ok", f"may use keys {bus.prefix}*")
        except ResponseError as e:
            yield Finding("Redis rights", "fail", f"{key}: {e}", f"allow its user the stream commands on {bus.prefix}*")
        finally:
            with suppress(ResponseError):
                client.delete(key)


def _roles_at_work(settings: Settings) -> Findings:
    with watching(settings) as copies:
        seen = copies()
    missing = [str(role) for role in Role if not any(c.role is role for c in seen)]
    at_work = ", ".join(f"{c.role} ({c.host}:{c.pid})" for c in seen) or "none is at work"
    if missing:
        yield Finding("roles", "warn", at_work, f"start {', '.join(missing)}: `wfm up`, or `wfm ROLE`")
    else:
        yield Finding("roles", "ok", at_work)


def _directory(settings: Settings) -> Findings:
    base = settings.pipeline_base_dir
    there = next(p for p in (base, *base.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as e:
        yield Finding(
            "pipeline_base_dir", "fail", f"{there}: {e.strerror}", "make it writable, or set PIPELINE_BASE_DIR"
        )
        return
    free = shutil.disk_usage(there).free
    seen = f"{base}{'' if there == base else ' (will be made)'}, {output.size(free)} free"
    if free < settings.staging_reserve_gb * 1e9:
        yield Finding(
            "pipeline_base_dir", "fail", seen, f"free more than the reserve of {settings.staging_reserve_gb:g} GB"
        )
    else:
        yield Finding("pipeline_base_dir", "ok", seen)


def _backend(settings: Settings) -> Findings:
    from wfm.backends import open_backend
    from wfm.service import capacity

    backend = open_backend(settings)
    limit = capacity(settings)
    room = [
        f"{limit.runs} runs",
        f"{limit.cpu:g} cores" if limit.cpu else "",
        f"{limit.memory_gb:.3g} GB" if limit.memory_gb else "",
    ]
    yield Finding("backend", "ok", f"{backend.name}: room for {', '.join(filter(None, room))}")


# --- db ---


@click.group(cls=context.Group)
def db() -> None:
    """The tables of wfm: make, bring to the newest revision, check."""


@db.command()
@output.as_json
def upgrade(as_json: bool) -> None:
    """Bring the tables to the newest revision. Safe at any time; touches nothing outside its schema.

    \b
    Example:  wfm db upgrade
    """
    from wfm import migrations

    with context.deployment() as d:
        schema = d.settings.database_schema
        before = migrations.current(d.store.engine, schema)
        after = migrations.upgrade(d.store.engine, schema)
    said = f"is at {after} already" if before == after else f"{before or 'empty'} → {after}"
    output.done(as_json, {"schema": schema, "before": before, "revision": after}, f"schema {schema}: {said}")


@db.command()
@output.as_json
def check(as_json: bool) -> None:
    """Check that the tables are those of this version. Ends with 1 if they are not.

    \b
    Example:  wfm db check
    """
    from wfm import migrations

    with context.deployment() as d:
        schema = d.settings.database_schema
        found, newest = migrations.current(d.store.engine, schema), migrations.head()
        differences = migrations.differences(d.store.engine, schema) if found == newest else []
    if as_json:
        output.document({"schema": schema, "revision": found, "newest": newest, "differences": differences})
    else:
        click.echo(f"schema {schema}: revision {found or 'none'}, newest {newest}")
        for difference in differences:
            click.echo(difference)
        if found != newest:
            click.echo("run `wfm db upgrade`")
    if found != newest or differences:
        click.get_current_context().exit(1)


# --- charts ---


@click.group(cls=context.Group)
def charts() -> None:
    """The statecharts that every run obeys."""


@charts.command("show")
@click.option("--version", type=int, help="Of the chart; the newest by default.")
@output.as_json
def charts_show(version: int | None, as_json: bool) -> None:
    """Print the chart of a run as a Mermaid diagram, or as JSON.

    \b
    Example:  wfm charts show > run.mmd
    """
    from wfm.service import load_charts

    known = load_charts()
    wanted = max(known) if version is None else version
    if wanted not in known:
        raise NotFoundError(f"there is no chart of version {wanted}; known: {', '.join(map(str, sorted(known)))}")
    chart = known[wanted]
    if as_json:
        about = {"name": chart.name, "version": chart.version, "initial": chart.initial}
        output.document(about | {"states": list(chart.states.values()), "transitions": chart.transitions})
    else:
        click.echo(chart.mermaid(), nl=False)


@charts.command("check")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@output.as_json
def charts_check(files: tuple[str, ...], as_json: bool) -> None:
    """Check charts, by default those of this installation, and report all faults together. Needs no database.

    \b
    Example:  wfm charts check my-run.yaml
    """
    from wfm import events
    from wfm.charts import parse
    from wfm.decide import GUARDS
    from wfm.service import load_charts

    found = [] if files else list(load_charts().values())
    faults: list[str] = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8")
            found.append(parse(text, source=file, guards=GUARDS, events=events.TYPES))
        except FileNotFoundError:
            raise NotFoundError(f"{file} does not exist") from None
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"{file} cannot be read: {e}") from e
        except ChartError as e:
            faults += e.faults
    counted = [(c, len(c.states), len(c.transitions)) for c in found]
    if as_json:
        output.document([{"name": c.name, "version": c.version, "states": n, "transitions": m} for c, n, m in counted])
    else:
        for c, n, m in counted:
            click.echo(f"{c}: {n} states, {m} transitions, no fault")
    if faults:
        raise ChartError(faults)


# --- completion ---


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets a shell complete commands and options.

    \b
    Example:  wfm completion bash > ~/.local/share/bash-completion/completions/wfm
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    name = os.path.basename(root.info_name or "").removesuffix(".py")
    program = name if name in ("wfm", "ccat_workflow_manager") else "wfm"
    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(root.command, {}, program, f"_{program.upper()}_COMPLETE").source())
