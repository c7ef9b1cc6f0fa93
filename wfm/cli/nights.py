"""The certificate of a night, and what need not be covered for it."""

from __future__ import annotations

from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import click

from wfm.cli import context, output
from wfm.cli.data import show_plan
from wfm.errors import UsageError
from wfm.model import Standing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wfm.store import Tx
    from wfm.views import Certificate, WaiverLine


class Night(click.ParamType[date]):
    """An observing night, by the date on which it begins."""

    name = "NIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> date:
        try:
            return value if isinstance(value, date) else date.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a night, such as 2026-03-01: the date of its evening", param, ctx)


@click.group(cls=context.Group)
def coverage() -> None:
    """Report whether data has been processed."""


@coverage.command()
@click.argument("night", type=Night(), required=False)
@click.option("--pipeline", metavar="P", help="Look at this pipeline only; by default at all enabled ones.")
@output.as_json
def report(night: date | None, pipeline: str | None, as_json: bool) -> None:
    """Certify a night: every raw data package covered, waived or explained.

    Ends with 1 if something must still be done, or decided. NIGHT is the date of its evening: it lasts from noon to
    noon by the clocks of the instrument's site. By default it is the last one that is over.

    \b
    Example:  wfm coverage report 2026-03-01
              wfm coverage report --json | jq .counts
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        asked = night or views.last_night(tx.conn)
        found = views.certificate(tx.conn, asked, location_id=d.location, pipeline=pipeline)
    if as_json:
        output.document(found)
    else:
        _show(found)
    if not found.complete:
        click.get_current_context().exit(1)


_SHOWN = 5


def _show(c: Certificate) -> None:
    total = len(c.packages)
    left = c.counts[Standing.OPEN]
    verdict = f"{left} of {output.plural(total, 'package')} still open" if left else f"{total} packages, nothing open"
    if c.planned:
        verdict += f"; {output.plural(len(c.planned), 'planned observation')} missing"
    click.echo(f"night {c.night}: {verdict}\n")
    output.table(("PACKAGES", "NUMBER"), list(c.counts.items()), empty="")
    columns = ("STEP", "UNIT", "PACKAGES", "FOR EXAMPLE", "STATE", "REASON", "WHAT WOULD CHANGE IT")
    for title, units in (("open", c.open), ("explained: not asked for by the definitions", c.explained)):
        if units:
            click.echo(f"\n{title}")
            rows = [
                (f"{u.pipeline}/{u.step}", u.unit, u.packages, u.example, u.state, _one_line(u.reason), u.change)
                for u in units
            ]
            output.table(columns, rows, empty="")
    if c.unsorted:
        click.echo(f"\nopen: arrived, but not sorted into units yet: {_some(c.unsorted)}")
        click.echo("the trigger-manager does that next; if it stays so, see `wfm health trigger-manager`")
    if c.planned:
        click.echo("\nopen: planned, but not arrived; `wfm data lost NAME` says that it never will")
        show_plan(c.planned)
    if c.unselected:
        click.echo(f"\nexplained: no enabled pipeline selects {_some(c.unselected)}")
        click.echo(f"`wfm why --package {c.unselected[0]}` names the rule that rejects it")
    if c.waivers:
        click.echo("\nwaived")
        _list(c.waivers)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _list(found: Sequence[WaiverLine]) -> None:
    rows = [(w.what, output.when(w.until), w.actor, w.reason, _how(w)) for w in found]
    output.table(("WHAT", "UNTIL", "BY", "REASON", "STATE"), rows, empty="nothing was waived")


def _how(w: WaiverLine) -> str:
    if w.ended_at:
        return f"ended {output.when(w.ended_at)} by {w.ended_by}" + (f": {w.ended_reason}" if w.ended_reason else "")
    return "in force" if w.in_force else "over"


@click.command()
@click.argument("things", metavar="[PACKAGE]... | [PIPELINE/STEP UNIT...]", nargs=-1)
@click.option("--until", type=context.Ahead(), metavar="TIME", help="When it ends by itself: ISO 8601, or such as 14d.")
@click.option("--end", is_flag=True, help="End waivers before their time.")
@click.option("--list", "listed", is_flag=True, help="Show what is waived, and what was.")
@context.reason
@output.as_json
def waive(things: tuple[str, ...], until: datetime | None, end: bool, listed: bool, reason: str, as_json: bool) -> None:
    """Say that packages, or units of a step, need not be covered until a certain time.

    For the certificate of a night (`wfm coverage report`) they do not count as missing then. Nothing else changes: what
    can run still runs, and what depends on a waived unit goes on waiting for it.

    \b
    Example:  wfm waive 0142 0143 --until 2026-04-01 --reason "cloud, to be observed again"
              wfm waive ngc253-co/map ngc253-co43 --until 14d --reason "new beam is on its way"
              wfm waive 0142 --end --reason "it is good after all"
              wfm waive --list
    """
    from wfm import acts, views

    if listed + end + bool(until) != 1:
        raise UsageError("say one of --until TIME, --end and --list")
    if listed == bool(things):
        raise UsageError("--list stands alone" if listed else "name packages, or a PIPELINE/STEP and its units")
    if not listed and not reason:
        raise UsageError("missing: --reason TEXT; it stands beside your name in every certificate")
    with context.deployment() as d:
        if listed:
            with d.read() as tx:
                found = views.waivers(tx.conn)
            if as_json:
                output.document(found)
            else:
                _list(found)
            return

        def work(tx: Tx) -> int:
            packages, units = _meant(tx, things)
            actor = context.actor(reason)
            if until is None:
                return acts.end_waivers(tx, d.location, packages, units, actor)
            return acts.waive(tx, d.location, packages, units, until, actor)

        n = d.write(work)
    said = f"{output.plural(n, 'waiver')} ended" if until is None else f"{n} waived until {output.when(until)}"
    output.done(as_json, {"waivers": n, "until": until, "ended": end}, said)


def _meant(tx: Tx, things: Sequence[str]) -> tuple[Sequence[str], dict[str, list[str]]]:
    """Packages; or, where the first thing is a step and others follow, its units."""
    pipeline, step = context.split(things[0])
    known = "SELECT 1 FROM raw_data_package WHERE name = :name"
    if step and things[1:] and not tx.all(known, name=things[0]):
        return (), {things[0]: [str(context.full_key(tx, pipeline, unit)) for unit in things[1:]]}
    return things, {}
