"""The log: list, show, follow, replay and verify events; what was given up."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.cli.definitions import read_documents
from wfm.cli.runs import tell
from wfm.errors import NotFoundError, UnavailableError, UsageError
from wfm.model import RunState

if TYPE_CHECKING:
    from wfm.views import EventLine

LOOK_SECONDS = 0.3
"""s between two looks at the ledger."""

PAGE = 1000
"""Events that are read at once."""

BEGINNINGS = (RunState.PENDING, RunState.COLLECTING_RESULTS)
"""States in which another attempt can begin."""

DeadState = Literal["open", "resent", "dropped", "all"]


@click.group(cls=context.Group)
def events() -> None:
    """Look into the log of everything that happened, and put it to work."""


_about = (
    click.option("--run", type=context.Key, metavar="ID", help="Events of a run."),
    click.option("--pipeline", metavar="P", help="Events of a pipeline."),
    click.option("--unit", metavar="U", help="Events of a unit, by its whole key."),
    click.option("--type", "types", multiple=True, metavar="T", help="Of this type, such as run.failed; repeatable."),
    click.option("--since", type=context.Time(), help="From then on: an ISO 8601 time, or how long ago, such as 2h."),
    click.option("--until", type=context.Time(), help="Before then."),
    click.option("--after", metavar="CURSOR", help="Only what comes after; never skips what was committed late."),
)


def _selection(command: Any) -> Any:
    for option in reversed(_about):
        command = option(command)
    return command


@events.command("list")
@_selection
@click.option("--limit", type=click.IntRange(1), default=100, help="How many at most.")
@output.as_json
def list_(
    run: int | None,
    pipeline: str | None,
    unit: str | None,
    types: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    after: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List events, the oldest first: the newest ones, or those after a cursor.

    To catch up, begin with --after 0-0 and go on with the cursor of each page until one is empty: nothing comes twice,
    and nothing is missing, however late its transaction is committed.

    \b
    Example:  wfm events list --type run.failed --type run.cancelled --since 2h
              wfm events list --after 1234-56 --json
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        page = views.events(
            tx.conn,
            location_id=d.location,
            run=run,
            pipeline=pipeline,
            unit=context.full_key(tx, pipeline, unit) if pipeline else unit,
            types=types,
            since=since,
            until=until,
            after=after,
            newest=after is None,
            limit=limit,
        )
    if as_json:
        output.document(page)
        return
    rows = [
        (
            e.id,
            output.when(e.created_at),
            e.type,
            e.recipient,
            _subject(e),
            e.actor,
            e.reason,
            "" if e.done_at else "yes",
        )
        for e in page.events
    ]
    output.table(("ID", "AT", "TYPE", "TO", "ABOUT", "BY", "REASON", "PENDING"), rows, empty="no such events")
    if rows:
        click.echo(f"\nwhat comes next: --after {page.cursor}")


def _subject(e: EventLine) -> str:
    """What an event is about, in a few words."""
    b = e.body
    if e.run is not None:
        return f"run {e.run} {b.get('pipeline')}/{b.get('step')} {b.get('unit')}: {b.get('state')}"
    return ", ".join(f"{k} {v}" for k, v in b.items() if k not in ("type", "schema"))


@events.command()
@click.argument("event_id", metavar="ID", type=context.Key)
@output.as_json
def show(event_id: int, as_json: bool) -> None:
    """Show all about one event.

    \b
    Example:  wfm events show 123
    """
    import msgspec

    from wfm import views

    with context.deployment() as d, d.read() as tx:
        e = views.event_detail(tx.conn, event_id)
    if as_json:
        output.document(e)
        return
    output.facts(
        [
            ("event", f"{e.id} {e.type}"),
            ("to", e.recipient or "the public stream only"),
            ("about", _subject(e)),
            ("by", e.actor),
            ("reason", e.reason),
            ("at", output.when(e.created_at)),
            ("state", f"done at {output.when(e.done_at)}" if e.done_at else "pending"),
            ("published", f"again {e.publishes} times" if e.publishes else ""),
            ("next time", "" if e.done_at else output.when(e.publish_at)),
            ("failures", e.failures),
            ("dead letters", ", ".join(map(str, e.dead_letters))),
            ("cursor", e.cursor),
            ("body", msgspec.json.encode(e.body).decode()),
        ]
    )


@events.command()
@_selection
@output.as_json
def tail(
    run: int | None,
    pipeline: str | None,
    unit: str | None,
    types: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    after: str | None,
    as_json: bool,
) -> None:
    """Follow the log, from now, from a time or from a cursor, until interrupted or to the end of a time.

    Reads the ledger in Postgres, so it misses nothing and works without Redis.

    \b
    Example:  wfm events tail --type run.collected --json | while read -r event; do ...; done
    """
    from wfm import views

    about: dict[str, Any] = {"run": run, "pipeline": pipeline, "unit": unit, "types": types}
    times: dict[str, Any] = {"since": since, "until": until}
    end = ""
    with context.deployment() as d:
        if pipeline:
            with d.read() as tx:
                about["unit"] = context.full_key(tx, pipeline, unit)
        if after is None and since is not None:
            after = views.START
        if after is None:
            with d.read() as tx:
                after = views.events(tx.conn, location_id=d.location, newest=True, limit=1, **about).cursor
        while True:
            with d.read() as tx:
                page = views.events(tx.conn, location_id=d.location, after=after, limit=PAGE, **about, **times)
            for e in page.events:
                if as_json:
                    output.line(e)
                else:
                    by = f"{e.actor}: {e.reason}" if e.reason else e.actor
                    words = (output.when(e.created_at), str(e.id), e.type, _subject(e), f"({by})")
                    click.echo("  ".join(words))
            sys.stdout.flush()
            after = page.cursor
            if page.events:
                continue
            if end and not views.is_before(after, end):
                return
            if until and not end and datetime.now(UTC) >= until:
                with d.read() as tx:
                    now, cursor = views.log_end(tx.conn)
                end = cursor if now >= until else ""
            time.sleep(LOOK_SECONDS)


# --- replay ---


@events.command()
@click.argument("ids", metavar="[EVENT]...", type=context.Key, nargs=-1)
@click.option("--pending", "--all", "pending", is_flag=True, help="Publish all pending events again.")
@click.option("--run", "runs", type=context.Key, multiple=True, metavar="ID", help="Drive a run again; repeatable.")
@click.option("--from", "begin", type=click.Choice(BEGINNINGS), help="With --run: where it begins.  [default: PENDING]")
@click.option("--into", metavar="STREAM", help="Copy events of the log into a stream of your own.")
@click.option("--config", "files", multiple=True, metavar="FILE", help="Show what changed definitions would do.")
@click.option("--dry-run", is_flag=True, help="With --config, which never does more.")
@click.option(
    "--timeout",
    type=click.FloatRange(1, 3600),
    metavar="S",
    help="With --config: give up after S seconds.  [default: 60]",
)
@click.option("--since", type=context.Time(), help="With --into or --config: events from then on.")
@click.option("--until", type=context.Time(), help="With --into or --config: events before then.")
@click.option("--type", "types", multiple=True, metavar="T", help="With --into: of this type; repeatable.")
@context.reason
@output.as_json
def replay(
    ids: tuple[int, ...],
    pending: bool,
    runs: tuple[int, ...],
    begin: str | None,
    into: str | None,
    files: tuple[str, ...],
    dry_run: bool,
    timeout: float | None,
    since: datetime | None,
    until: datetime | None,
    types: tuple[str, ...],
    reason: str,
    as_json: bool,
) -> None:
    """Do again what events stand for. One of:

    \b
    EVENT... or --pending   publish pending events again, now; those that are done are left alone
    --run ID                have an ended run begin another attempt: all of it, or with --from COLLECTING_RESULTS only
                            the collection of what its last job left. What its earlier attempts made is superseded
                            when the new products are collected.
    --into STREAM           copy events of the log, of a time or a type, into a stream of your own whose key begins with
                            wfm: - field `event`, as in the public stream. Those that come twice have the same id.
    --config FILE --dry-run show which runs changed definitions would add or take away, by the real gap engine: FILE is
                            YAML as for `wfm apply`, or settings (.toml). With --since or --until only for the packages
                            that arrived then. Changes nothing; roles may wait for what it holds until it is done.

    \b
    Example:  wfm events replay --pending
              wfm events replay --run 42 --reason "the calibration disk was corrupt"
              wfm events replay --run 42 --from COLLECTING_RESULTS --reason "the archive is mounted again"
              wfm events replay --since 2d --type run.collected --into wfm:quicklook:replay
              wfm events replay --config new.yaml --since 1d --dry-run
    """
    from wfm import acts

    ways = {"EVENT": ids, "--pending": pending, "--run": runs, "--into": into, "--config": files}
    chosen = [way for way, given in ways.items() if given]
    faults = [] if len(chosen) == 1 else [f"say one of {', '.join(ways)}; given: {', '.join(chosen) or 'none'}"]
    belongs: dict[str, tuple[object, list[str]]] = {
        "--from": (begin, ["--run"]),
        "--reason": (reason, ["--run"]),
        "--since": (since, ["--into", "--config"]),
        "--until": (until, ["--into", "--config"]),
        "--type": (types, ["--into"]),
        "--dry-run": (dry_run, ["--config"]),
        "--timeout": (timeout, ["--config"]),
    }
    faults += [
        f"{option} goes only with {' or '.join(to)}"
        for option, (value, to) in belongs.items()
        if value and not set(to) & set(chosen)
    ]
    if files and not dry_run:
        faults.append("--config changes nothing: say --dry-run too; `wfm apply` makes the change")
    if faults:
        raise UsageError("\n".join(faults))
    if into:
        _copy(into, since, until, types, as_json)
        return
    if files:
        _what_if(files, since, until, timeout or 60.0, as_json)
        return
    with context.deployment() as d:
        if runs:
            state = RunState(begin or RunState.PENDING)
            tell(d.write(lambda tx: acts.redrive_runs(tx, runs, state, context.actor(reason))), as_json)
        else:
            n = d.write(lambda tx: acts.republish(tx, d.location, None if pending else ids))
            _tell_published(n, len(set(ids)) - n if ids else 0, as_json)


def _tell_published(n: int, left: int, as_json: bool) -> None:
    output.done(as_json, {"published": n}, f"published {output.plural(n, 'pending event')} again")
    if left:
        raise NotFoundError(f"{output.plural(left, 'event')} of these: done already, or not there at this location")


class Copied(Struct, frozen=True):
    """How many events went into a stream, and the cursor of the log behind them."""

    stream: str
    events: int
    cursor: str


def _copy(stream: str, since: datetime | None, until: datetime | None, types: Sequence[str], as_json: bool) -> None:
    """Copy a part of the log as it is now, page by page; waits for transactions that began before, to miss nothing."""
    from wfm import views
    from wfm.bus import RedisError, check_foreign
    from wfm.service import open_bus
    from wfm.store import message

    check_foreign(stream)
    with context.deployment() as d, output.progress(f"copying events to {stream}") as advance:
        with d.read() as tx:
            now, end = views.log_end(tx.conn)
        until = min(until, now) if until else now
        bus = open_bus(d.settings)
        n, cursor, waiting = 0, views.START, False
        with closing(bus.client):
            while True:
                with d.read() as tx:
                    page = views.events(
                        tx.conn, location_id=d.location, types=types, since=since, until=until, after=cursor, limit=PAGE
                    )
                try:
                    bus.append(stream, [message(e).body for e in page.events])
                except RedisError as e:
                    raise UnavailableError(
                        f"at least {output.plural(n, 'event')} went into {stream}, then Redis failed: {e}; "
                        "say the same again: what comes twice has the same id"
                    ) from e
                n += len(page.events)
                cursor = page.cursor
                advance(len(page.events))
                if page.events:
                    continue
                if not views.is_before(cursor, end):
                    break
                if not waiting:
                    output.warn("waits for transactions that are still open; what they write belongs to it")
                    waiting = True
                time.sleep(LOOK_SECONDS)
    if as_json:
        output.document(Copied(stream, n, cursor))
    else:
        click.echo(f"copied {output.plural(n, 'event')} to {stream}")


def _what_if(
    files: Sequence[str], since: datetime | None, until: datetime | None, seconds: float, as_json: bool
) -> None:
    from wfm import config, documents
    from wfm.service import capacity
    from wfm.whatif import what_if

    tables = [Path(f) for f in files if f.endswith(".toml")]
    others = [f for f in files if not f.endswith(".toml")]
    if missing := [str(path) for path in tables if not path.is_file()]:
        raise NotFoundError("\n".join(f"{path} does not exist" for path in missing))
    read = read_documents(others) if others else documents.load([])
    settings = config.load(files=tables)
    with context.deployment() as d:
        if settings.processing_location_id != d.location:
            raise UsageError(f"{', '.join(map(str, tables))}: processing_location_id must stay {d.location}")
        limits = capacity(d.settings), capacity(settings)
        with output.progress("computing both futures"):
            found = what_if(d.store, read, d.location, limits=limits, since=since, until=until, seconds=seconds)
    if as_json:
        output.document(found)
        return
    for c in found.changes:
        click.echo(f"{c.kind} {c.name}: {c.action}")
    arrived = output.plural(found.packages or 0, "package that arrived then", "packages that arrived then")
    about = "the whole catalogue" if found.packages is None else arrived
    click.echo(f"for {about}, supposing that every run succeeds:\n")
    rows = [
        (sign, r.wave, r.pipeline, r.step, r.unit, "; ".join(filter(None, (r.reason, r.never_fits))))
        for sign, runs in (("+", found.added), ("-", found.gone))
        for r in runs
    ]
    output.table(("", "WAVE", "PIPELINE", "STEP", "UNIT", "REASON"), rows, empty="the same runs as without the change")
    if found.shifts:
        click.echo("\nunits that would end otherwise:")
        shifts = [(s.pipeline, s.step, s.before or "none", s.after or "none", s.units) for s in found.shifts]
        output.table(("PIPELINE", "STEP", "WITHOUT", "WITH", "UNITS"), shifts, empty="")
    click.echo(f"\n{output.plural(len(found.added), 'run')} more, {len(found.gone)} fewer; nothing was changed")


# --- verify ---


@events.command()
@click.argument("runs", metavar="[RUN]...", type=context.Key, nargs=-1)
@output.as_json
def verify(runs: tuple[int, ...], as_json: bool) -> None:
    """Check that the history of every run replays, through its statechart, to the state that is stored.

    And that events belong to runs that are there, none is left pending for a run that has long ended, and coverage
    rests on completed runs. Ends with 1 if not.

    \b
    Example:  wfm events verify
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx, output.progress("replaying the history of all runs"):
        report = views.verify(tx.conn, d.store.charts, runs or None)
    if as_json:
        output.document(report)
    else:
        looked = f"{output.plural(report.runs, 'run')}, {output.plural(report.transitions, 'transition')}"
        for fault in report.faults:
            click.echo(fault)
        if more := report.faults_total - len(report.faults):
            click.echo(f"... and {output.plural(more, 'more fault')}")
        click.echo(f"{looked}: {output.plural(report.faults_total, 'fault') if report.faults_total else 'no fault'}")
    if report.faults_total:
        click.get_current_context().exit(1)


# --- schema ---


@events.command()
@output.as_json
def schema(as_json: bool) -> None:
    """Print the schema of every event, as an AsyncAPI document in YAML. Needs no database.

    \b
    Example:  wfm events schema > events.yaml
    """
    import yaml

    from wfm.asyncapi import document
    from wfm.service import load_charts

    charts = load_charts()
    made = document(charts[max(charts)])
    if as_json:
        output.document(made)
    else:
        click.echo(yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=120), nl=False)


# --- dead letters ---


@events.group(cls=context.Group)
def dead() -> None:
    """Messages that could not be handled: look at them, send them again, or drop them."""


@dead.command("list")
@click.option("--state", type=click.Choice(get_args(DeadState)), default="open", help="Letters in this state.")
@output.as_json
def dead_list(state: DeadState, as_json: bool) -> None:
    """List messages that were given up, the newest first.

    \b
    Example:  wfm events dead list
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.dead_letters(tx.conn, None if state == "all" else state, location_id=d.location)
    if as_json:
        output.document(found)
        return
    rows = [(x.id, output.when(x.created_at), x.state, x.stream, x.event_id, x.size, x.reason) for x in found]
    output.table(("ID", "AT", "STATE", "STREAM", "EVENT", "BYTES", "REASON"), rows, empty="no dead letters")


@dead.command("show")
@click.argument("letter", metavar="ID", type=context.Key)
@output.as_json
def dead_show(letter: int, as_json: bool) -> None:
    """Show a message that was given up, with its bytes.

    \b
    Example:  wfm events dead show 3
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        x = views.dead_letter(tx.conn, letter)
    if as_json:
        output.document(x)
        return
    output.facts(
        [
            ("dead letter", f"{x.id}, {x.state}"),
            ("settled", f"at {output.when(x.settled_at)} by {x.actor}: {x.actor_reason}" if x.settled_at else ""),
            ("stream", f"{x.stream} entry {x.entry_id}"),
            ("event", x.event_id),
            ("at", output.when(x.created_at)),
            ("reason", x.reason),
            ("body", x.text),
        ]
    )


_letters = click.argument("letters", metavar="ID...", type=context.Key, nargs=-1, required=True)


@dead.command()
@_letters
@context.reason
@output.as_json
def resend(letters: tuple[int, ...], reason: str, as_json: bool) -> None:
    """Put messages back on their streams, byte for byte, all or none.

    The event of a letter is pending again, also if it is done: what is handled twice does no harm.

    \b
    Example:  wfm events dead resend 3 4 --reason "the bug is mended"
    """
    from wfm import acts

    with context.deployment() as d, d.store.begin() as tx:
        n = acts.resend_dead(tx, d.location, letters, context.actor(reason))
        # Before the commit: the ledger does not know them all.
        if kept := d.send(tx.outbox):
            kinds = ", ".join(sorted({m.type for m in kept}))
            raise UnavailableError(f"the stream of {kinds} is full; nothing is marked as sent, try again later")
    output.done(as_json, {"resent": n}, f"sent {output.plural(n, 'message')} again")


@dead.command()
@_letters
@context.required_reason
@output.as_json
def drop(letters: tuple[int, ...], reason: str, as_json: bool) -> None:
    """Give messages up for good, all or none; their bytes stay in the list.

    \b
    Example:  wfm events dead drop 3 --reason "sent by a broken script"
    """
    from wfm import acts

    with context.deployment() as d:
        n = d.write(lambda tx: acts.drop_dead(tx, d.location, letters, context.actor(reason)))
    output.done(as_json, {"dropped": n}, f"dropped {output.plural(n, 'message')}")
