"""The log: list, show, follow, replay and verify events; what was given up."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

import click

from wfm.cli import context, output
from wfm.errors import NotFoundError, UnavailableError, UsageError

if TYPE_CHECKING:
    from wfm.views import EventLine

LOOK_SECONDS = 0.3
"""s between two looks at the ledger."""

DeadState = Literal["open", "resent", "dropped", "all"]


@click.group(cls=context.Group)
def events() -> None:
    """Look into the log of everything that happened, and put it to work."""


_about = (
    click.option("--run", type=context.Key, metavar="ID", help="Events of a run."),
    click.option("--pipeline", metavar="P"),
    click.option("--unit", metavar="U"),
    click.option("--type", "type_", metavar="T", help="Events of a type, such as run.failed."),
    click.option("--after", metavar="CURSOR", help="Only what comes after; never skips what was committed late."),
)


def _selection(command: Any) -> Any:
    for option in reversed(_about):
        command = option(command)
    return command


@events.command("list")
@_selection
@click.option("--since", type=context.Time())
@click.option("--until", type=context.Time())
@click.option("--limit", type=click.IntRange(1), default=100, help="How many at most.")
@output.as_json
def list_(
    run: int | None,
    pipeline: str | None,
    unit: str | None,
    type_: str | None,
    after: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List events, the oldest first: the newest ones, or those after a cursor.

    \b
    Example:  wfm events list --type run.failed --since 2026-03-01
              wfm events list --after 1234-56 --json
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        page = views.events(
            tx.conn,
            location_id=d.location,
            run=run,
            pipeline=pipeline,
            unit=unit,
            type=type_,
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
    run: int | None, pipeline: str | None, unit: str | None, type_: str | None, after: str | None, as_json: bool
) -> None:
    """Follow the log, from now or from a cursor, until interrupted.

    Reads the ledger in Postgres, so it misses nothing and works without Redis.

    \b
    Example:  wfm events tail --type run.collected --json | while read -r event; do ...; done
    """
    from wfm import views

    about: dict[str, Any] = {"run": run, "pipeline": pipeline, "unit": unit, "type": type_}
    with context.deployment() as d:
        if after is None:
            with d.read() as tx:
                after = views.events(tx.conn, location_id=d.location, newest=True, limit=1, **about).cursor
        while True:
            with d.read() as tx:
                page = views.events(tx.conn, location_id=d.location, after=after, limit=1000, **about)
            for e in page.events:
                if as_json:
                    output.line(e)
                else:
                    by = f"{e.actor}: {e.reason}" if e.reason else e.actor
                    words = (output.when(e.created_at), str(e.id), e.type, _subject(e), f"({by})")
                    click.echo("  ".join(words))
            sys.stdout.flush()
            after = page.cursor
            if not page.events:
                time.sleep(LOOK_SECONDS)


@events.command()
@click.argument("ids", metavar="[ID]...", type=context.Key, nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that are pending.")
def replay(ids: tuple[int, ...], every: bool) -> None:
    """Publish pending events again, now. Those that are done already are left alone.

    \b
    Example:  wfm events replay --all
    """
    from wfm import acts

    if bool(ids) == every:
        raise UsageError("name events by ID, or all with --all")
    with context.deployment() as d:
        n = d.write(lambda tx: acts.republish(tx, d.location, None if every else ids))
    if ids and n < len(set(ids)):
        raise NotFoundError(f"published {n} again; of these events, {len(set(ids)) - n} are done, or do not exist here")
    click.echo(f"published {output.plural(n, 'pending event')} again")


@events.command()
@click.argument("runs", metavar="[RUN]...", type=context.Key, nargs=-1)
@output.as_json
def verify(runs: tuple[int, ...], as_json: bool) -> None:
    """Check that the history of every run replays, through its statechart, to the state that is stored.

    Ends with 1 if it does not.

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


# --- dead letters ---


@events.group(cls=context.Group)
def dead() -> None:
    """Messages that could not be handled: look at them, send them again, or drop them."""


@dead.command("list")
@click.option("--state", type=click.Choice(get_args(DeadState)), default="open", help="Only those.")
@output.as_json
def dead_list(state: DeadState, as_json: bool) -> None:
    """List messages that were given up, the newest first.

    \b
    Example:  wfm events dead list
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.dead_letters(tx.conn, None if state == "all" else state)
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
            ("dead letter", f"{x.id}, {x.state}" + (f" by {x.actor}" if x.actor else "")),
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
def resend(letters: tuple[int, ...], reason: str) -> None:
    """Put messages back on their streams, as they were.

    \b
    Example:  wfm events dead resend 3 4
    """
    from wfm import acts

    with context.deployment() as d, d.store.begin() as tx:
        n = acts.resend_dead(tx, letters, context.actor(reason))
        # Before the commit: the ledger does not know them all.
        if kept := d.send(tx.outbox):
            kinds = ", ".join(sorted({m.type for m in kept}))
            raise UnavailableError(f"the stream of {kinds} is full; nothing is marked as sent, try again later")
    click.echo(f"sent {output.plural(n, 'message')} again")


@dead.command()
@_letters
@context.reason
def drop(letters: tuple[int, ...], reason: str) -> None:
    """Give messages up for good; their bytes stay in the list.

    \b
    Example:  wfm events dead drop 3 --reason "sent by a broken script"
    """
    from wfm import acts

    with context.deployment() as d:
        n = d.write(lambda tx: acts.drop_dead(tx, letters, context.actor(reason)))
    click.echo(f"dropped {output.plural(n, 'message')}")
