"""What would run now, and why; how a grouping comes to its packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from wfm.cli import context, output
from wfm.cli.definitions import deployment_for, read_documents
from wfm.errors import UsageError

if TYPE_CHECKING:
    from wfm.views import RuleCount, Selection
    from wfm.whatif import Gaps, Plan


@click.command()
@click.argument("target", metavar="[PIPELINE[/STEP]]", required=False)
@click.option("--explain", is_flag=True, help="Count instead what each rule of the grouping lets through.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Explain the groupings of a YAML file.")
@click.option("--timeout", type=click.FloatRange(1), default=60.0, metavar="S", help="Give up after so many seconds.")
@output.as_json
def plan(target: str | None, explain: bool, files: tuple[str, ...], timeout: float, as_json: bool) -> None:
    """Say what would run now, why, and what it would cost. Changes nothing.

    What the trigger-manager would find at its next look is worked out and undone. The cost is that of past runs of the
    step: the median of core-hours.

    With --explain: how many packages each rule of a grouping lets through, alone and together with those before it,
    and, of a rule that matches nothing, what packages have instead. With -f also for groupings that are not applied.

    \b
    Example:  wfm plan
              wfm plan ngc253-co/map
              wfm plan ngc253-co --explain
              wfm plan --explain -f mine.yaml
    """
    from wfm import whatif

    if files and (target or not explain):
        raise UsageError("-f goes with --explain, and without a pipeline")
    if explain:
        _explain(target, files, as_json)
        return
    pipeline, step = context.split(target) if target else (None, None)
    with context.deployment() as d, output.progress("comparing the catalogue with coverage"):
        found = whatif.plan(d.store, d.location, pipeline=pipeline, step=step, seconds=timeout)
    if as_json:
        output.document(found)
    else:
        _show(found)


def _show(found: Plan) -> None:
    rows = [
        (f"{s.pipeline}/{s.step}", g.units, _what(g), g.reason, g.example if g.units == 1 else f"{g.example}, ...")
        for s in found.steps
        for g in s.gaps
    ]
    output.table(("STEP", "UNITS", "NOW", "WHY", "UNIT"), rows, empty="no units")
    for name in dict.fromkeys(s.pipeline for s in found.steps if not s.units):
        click.echo(f"\n{name}: no package fits; `wfm plan {name} --explain` counts what each rule lets through")
    for s in found.steps:
        if s.starts:
            click.echo(f"\n{s.pipeline}/{s.step}: {output.plural(s.starts, 'run')} would start; cost: {s.cost}")
    click.echo(f"\n{output.plural(found.starts, 'run')} would start in all; cost: {found.cost}")


def _what(g: Gaps) -> str:
    if g.starts:
        return "would start"
    return f"{g.state} ({g.run})" if g.run else str(g.state)


def _explain(target: str | None, files: Sequence[str], as_json: bool) -> None:
    from wfm import views
    from wfm.yamltext import refuse

    if bool(target) == bool(files):
        raise UsageError("--explain needs a pipeline, or a file with groupings: -f FILE")
    if files:
        read = read_documents(files)
        refuse(read.faults)
        groupings = {name: d.spec.rules for name, d in read.of("grouping").items()}
        if not groupings:
            raise UsageError(f"there is no grouping in {', '.join(files)}")
        with deployment_for(read) as d, d.read() as tx:
            found = [views.explain(tx.conn, name, rules) for name, rules in groupings.items()]
    else:
        with context.deployment() as d, d.read() as tx:
            pipeline = context.split(str(target))[0]
            found = [views.explain_pipeline(tx.conn, pipeline, location_id=d.location)]
    if as_json:
        output.document(found)
        return
    for n, selection in enumerate(found):
        if n:
            click.echo()
        _show_selection(selection)


def _show_selection(s: Selection) -> None:
    of = output.plural(s.packages, "package")
    click.echo(f"grouping {s.grouping} selects {s.selected} of {of} in the catalogue\n")
    rows = [(r.number, r.alone, r.together, f"{'  ' * r.number.count('.')}{r.rule}") for r in s.rules]
    output.table(("RULE", "ALONE", "TOGETHER", "CONDITION"), rows, empty="it has no rules: every package fits")
    for line in _remarks(s.rules) if s.packages else ():
        click.echo(f"\n{line}")


def _remarks(rules: Sequence[RuleCount]) -> list[str]:
    remarks = []
    for r in rules:
        if not r.alone:
            instead = f"; packages have: {', '.join(r.values)}" if r.values else ""
            remarks.append(f"rule {r.number} matches nothing{instead}")
    outer = [r for r in rules if r.together is not None]
    first = next((r for r in outer if not r.together), None)
    if first is not None and all(r.alone for r in outer):
        remarks.append(f"each rule matches something, but rules 1 to {first.number} together match nothing")
    return remarks
