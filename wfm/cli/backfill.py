"""Backfills: work over what there was, with an order, a priority and a limit of its own."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.errors import UsageError
from wfm.model import BackfillKind

if TYPE_CHECKING:
    from wfm.backfill import Preview
    from wfm.store import Tx
    from wfm.views import BackfillLine

LOOK_SECONDS = 0.5
"""s between two looks at what is being followed."""


class _Group(context.Group):
    """What is not the name of a command is the pipeline that a backfill is begun for."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["start", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def backfill() -> None:
    """Run over what there was: what is missing, failed, stale, or all of it.

    \b
    Example:  wfm backfill ngc253-co --missing
              wfm backfill ngc253-co/map --stale --since 2026-01-01T00:00 --limit 20 --order newest
              wfm backfill status
    """


class Started(Struct, frozen=True):
    """What a backfill does, and its name if it was begun."""

    name: str | None
    preview: Preview


@backfill.command()
@click.argument("target", metavar="PIPELINE[/STEP]")
@click.option("--missing", is_flag=True, help="What has no result yet and has not failed.")
@click.option("--failed", is_flag=True, help="What stopped after failures: another attempt of each run.")
@click.option("--stale", is_flag=True, help="What has a result of older input, version or config.")
@click.option("--all", "all_", is_flag=True, help="All of these, and once more what is covered.")
@click.option("--since", type=context.Time(), help="Units with an observation that began since.")
@click.option("--until", type=context.Time(), help="Units with an observation that began before.")
@click.option("--units", metavar="GLOB", help="Units whose key is so; * is any text, ? one character.")
@click.option(
    "--order", type=click.Choice(["oldest", "newest"]), default="oldest", help="What was observed then first."
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Runs in flight at once.")
@click.option("--priority", type=click.IntRange(-1_000_000, 1_000_000), help="By default one below the pipeline's.")
@click.option("--name", metavar="NAME", help="By default the pipeline's name and a number.")
@click.option("--dry-run", is_flag=True, help="Only show what it would do.")
@click.option("--yes", is_flag=True, help="Begin without asking.")
@context.reason
@output.as_json
def start(
    target: str,
    missing: bool,
    failed: bool,
    stale: bool,
    all_: bool,
    since: datetime | None,
    until: datetime | None,
    units: str | None,
    order: Any,
    limit: int | None,
    priority: int | None,
    name: str | None,
    dry_run: bool,
    yes: bool,
    reason: str,
    as_json: bool,
) -> None:
    """Begin a backfill, after showing what it would do. The word `start` may be left out.

    What it is about is fixed when it begins. By default new data goes before it.

    \b
    Example:  wfm backfill start ngc253-co --missing
              wfm backfill ngc253-co --failed --units 'ngc253*' --reason "disk was full" --yes
    """
    from wfm import backfill as work

    flags = {"missing": missing, "failed": failed, "stale": stale, "all": all_}
    kinds = [BackfillKind(kind) for kind, given in flags.items() if given]
    _check(kinds, since, until, name, dry_run, yes, as_json)
    pipeline, step = context.split(target)
    selection = work.Selection(
        pipeline=pipeline, step=step, kind=kinds[0], since=since, until=until, units=units, order=order
    )
    with context.deployment() as d:
        with d.read() as tx:
            found = work.preview(tx, selection)
        if not as_json:
            _show(found, target, kinds[0])
        if dry_run or not found.units:
            if as_json:
                output.document(Started(None, found))
            return
        if not yes:
            click.confirm("begin it?", abort=True)

        def begin(tx: Tx) -> str | None:
            actor = context.actor(reason)
            return work.begin(tx, selection, name=name, priority=priority, limit=limit, actor=actor)

        begun = d.write(begin)
    said = f"backfill {begun} has begun; `wfm backfill status {begun} --watch` follows it"
    output.done(as_json, Started(begun, found), said if begun else "nothing of it is left to do")


def _check(
    kinds: list[BackfillKind],
    since: datetime | None,
    until: datetime | None,
    name: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Refuse what does not go together, all of it at once."""
    import re

    from wfm.catalogue import LABEL, LABEL_TEXT

    faults = []
    if len(kinds) != 1:
        given = f", not {' and '.join(f'--{kind}' for kind in kinds)}" if kinds else ""
        faults.append(f"say what is to run: one of {', '.join(f'--{kind}' for kind in BackfillKind)}{given}")
    if since and until and since >= until:
        faults.append(f"--since {output.when(since)} is not before --until {output.when(until)}: no unit lies between")
    if name is not None and not re.fullmatch(LABEL, name):
        faults.append(f"--name {name!r} is not {LABEL_TEXT}")
    if dry_run and yes:
        faults.append("--dry-run begins nothing, and --yes begins it: give one of them")
    if as_json and not (dry_run or yes):
        faults.append("with --json nobody can be asked: add --yes, or --dry-run to begin nothing")
    if faults:
        raise UsageError("\n".join(faults))


def _show(found: Preview, target: str, kind: BackfillKind) -> None:
    from wfm import views

    rows = [(x.step, x.units, views.hours(x.core_hours)) for x in found.steps]
    output.table(("STEP", "UNITS", "CORE-HOURS"), rows, empty=f"nothing of {target} is {kind}" if kind != "all" else "")
    if found.units:
        click.echo(f"\n{output.plural(found.units, 'run')}: {found.cost}")


@backfill.command()
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="Go on until it has ended.")
@click.option("--limit", type=click.IntRange(1), default=20, help="How many at most.")
@output.as_json
def status(name: str | None, watch: bool, limit: int, as_json: bool) -> None:
    """Show how far backfills are; with --watch, follow one to its end (by default the newest that goes on).

    With --watch it ends with 1 if something of it failed.

    \b
    Example:  wfm backfill status
              wfm backfill status ngc253-co-4 --watch
    """
    from wfm import views

    with context.deployment() as d:
        with d.read() as tx:
            found = views.backfills(tx.conn, d.location, name, limit)
        if not watch:
            _list(found, name, as_json)
            return
        going = [b for b in found if name or not b.ended]
        if not going:
            raise UsageError("no backfill goes on; name one that has ended, see `wfm backfill status`")
        last = _follow(d, going[0], as_json)
    if last.failed:
        click.get_current_context().exit(1)


def _list(found: list[BackfillLine], name: str | None, as_json: bool) -> None:
    if as_json:
        output.document(found)
        return
    columns = (
        "NAME",
        "RUNS",
        "STATE",
        "UNITS",
        "DONE",
        "FAILED",
        "SKIPPED",
        "UNDER WAY",
        "IN FLIGHT",
        "TO COME",
        "SINCE",
    )
    rows = [
        (
            *(b.name, f"{b.kind} of {b.pipeline}" + (f"/{b.step}" if b.step else ""), b.state, b.units, b.done),
            *(b.failed, b.skipped, b.begun, b.in_flight, b.waiting, output.when(b.created_at)),
        )
        for b in found
    ]
    output.table(columns, rows, empty="no backfills yet: `wfm backfill PIPELINE --missing`")
    for b in found if name else ():
        _tell(b)


def _tell(b: BackfillLine) -> None:
    """What is to be said of one backfill beside its numbers."""
    click.echo()
    selection = {k: v for k, v in b.selection.items() if k not in ("pipeline", "step", "kind")}
    output.facts(
        [
            ("order", f"{selection.pop('order', 'oldest')} first"),
            ("only", ", ".join(f"{k} {v}" for k, v in selection.items())),
            ("priority", b.priority),
            ("limit", f"{b.max_in_flight} in flight" if b.max_in_flight else ""),
            ("begun by", b.actor + (f": {b.reason}" if b.reason else "")),
            ("paused by", b.paused_by + (f": {b.paused_reason}" if b.paused_reason else "")),
            ("ended", output.when(b.finished_at)),
        ]
    )
    if b.notes:
        click.echo()
        rows = [(n.state, n.units, " ".join(n.note.split()), n.example) for n in b.notes]
        output.table(("", "UNITS", "REASON", "FOR EXAMPLE"), rows, empty="")


def _follow(d: context.Deployment, b: BackfillLine, as_json: bool) -> BackfillLine:
    """Show a backfill until it has ended: a bar on a terminal, else a line for each change."""
    from wfm import views

    seen: Any = None
    with output.progress(f"backfill {b.name}", b.units) as advance:
        ended = 0
        while True:
            now = b.done + b.failed + b.skipped
            advance(now - ended)
            ended = now
            counted = (b.state, b.done, b.failed, b.skipped, b.begun, b.waiting)
            if counted != seen and as_json:
                output.line(b)
            elif counted != seen and not sys.stderr.isatty():
                parts = (
                    f"{b.done} done, {b.failed} failed, {b.skipped} skipped, {b.begun} under way, {b.waiting} to come"
                )
                click.echo(f"{b.name} is {b.state}: {parts}")
                sys.stdout.flush()
            seen = counted
            if b.ended:
                break
            time.sleep(LOOK_SECONDS)
            with d.read() as tx:
                (b,) = views.backfills(tx.conn, d.location, b.name)
    if not as_json and sys.stderr.isatty():
        click.echo(
            f"{b.name} is {b.state}: {b.done} done, {b.failed} failed, {b.skipped} skipped, {b.waiting} not begun"
        )
    return b


def _steer(name: str, what: str, reason: str, as_json: bool, said: str) -> None:
    from wfm import backfill as work

    act = getattr(work, what)
    with context.deployment() as d:
        d.write(lambda tx: act(tx, name, context.actor(reason)))
    state = {"pause": "paused", "resume": "running", "cancel": "cancelled"}[what]
    output.done(as_json, {"name": name, "state": state}, said)


@backfill.command()
@click.argument("name")
@context.reason
@output.as_json
def pause(name: str, reason: str, as_json: bool) -> None:
    """Begin nothing more of a backfill, and give its runs no slot; what has one goes on.

    \b
    Example:  wfm backfill pause ngc253-co-4 --reason "the archive is slow"
    """
    _steer(name, "pause", reason, as_json, f"backfill {name} is paused; `wfm backfill resume {name}` lets it go on")


@backfill.command()
@click.argument("name")
@context.reason
@output.as_json
def resume(name: str, reason: str, as_json: bool) -> None:
    """Undo `wfm backfill pause`.

    \b
    Example:  wfm backfill resume ngc253-co-4
    """
    _steer(name, "resume", reason, as_json, f"backfill {name} goes on")


@backfill.command()
@click.argument("name")
@context.reason
@output.as_json
def cancel(name: str, reason: str, as_json: bool) -> None:
    """Begin nothing more of a backfill for good, and withdraw the runs that it made and that have no slot yet.

    Runs that have a slot go on, and so do those that it had begin another attempt: `wfm runs cancel` stops them.

    \b
    Example:  wfm backfill cancel ngc253-co-4 --reason "wrong range"
    """
    said = (
        f"backfill {name} is cancelled; runs that have a slot go on, `wfm backfill status {name}` shows how far it came"
    )
    _steer(name, "cancel", reason, as_json, said)
