"""Campaigns: frozen data sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from wfm.cli import context, output
from wfm.errors import NotFoundError, UsageError
from wfm.model import ProductType


@click.group(cls=context.Group)
def campaign() -> None:
    """Process a named, frozen set of packages with pinned versions; nothing that comes later changes it."""


def _pairs(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """STEP=VERSION, each step once."""
    found: dict[str, str] = {}
    for value in values:
        step, equals, version = value.partition("=")
        if not (step and equals and version):
            raise click.BadParameter(f"{value!r} is not STEP=VERSION, such as calibrate=1.2.0", ctx, param)
        if step in found:
            raise click.BadParameter(f"step {step!r} is given twice", ctx, param)
        found[step] = version
    return found


def _json(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[Any]:
    try:
        return [msgspec.json.decode(value) for value in values]
    except msgspec.DecodeError as e:
        raise click.BadParameter(f"not JSON: {e}", ctx, param) from None


@campaign.command()
@click.argument("name")
@click.option("--pipeline", required=True, metavar="P", help="The pipeline that it is made from.")
@click.option(
    "--version",
    "versions",
    multiple=True,
    callback=_pairs,
    metavar="STEP=V",
    help="Version of a step's software; by default the one that the step would run today.",
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    callback=_json,
    metavar="JSON",
    help="One more rule beside those of the pipeline's grouping, as in a grouping; repeatable.",
)
@click.option("--package", "packages", multiple=True, metavar="NAME", help="Only this package; repeatable.")
@click.option("--packages", "file", metavar="FILE", help="Only the packages whose names stand in FILE; - for stdin.")
@click.option("--priority", type=click.IntRange(-1_000_000, 1_000_000), help="Of its runs; else the pipeline's.")
@context.reason
@output.as_json
def create(
    name: str,
    pipeline: str,
    versions: dict[str, str],
    rules: list[Any],
    packages: tuple[str, ...],
    file: str | None,
    priority: int | None,
    reason: str,
    as_json: bool,
) -> None:
    """Freeze the packages that a pipeline selects now, and the versions and configs that it would use now.

    NAME becomes a pipeline of its own, and begins at once. Packages that arrive later, newer versions and newer
    configs never change it.

    \b
    Example:  wfm campaign create dr1 --pipeline ngc253-co --version map=1.2.0 --reason "data release 1"
              wfm campaign create dr1 --pipeline ngc253-co \\
                --rule '{"table": "source", "column": "name", "operator": "eq", "value": "NGC253"}'
    """
    from wfm import campaign as campaigns

    names = [*packages, *(_names(file) if file else ())]
    with context.deployment() as d:
        made = d.write(
            lambda tx: campaigns.create(
                tx,
                name,
                pipeline,
                location_id=d.location,
                actor=context.actor(reason),
                versions=versions,
                rules=rules,
                packages=list(dict.fromkeys(names)) if packages or file else None,
                priority=priority,
            )
        )
    pinned = ", ".join(f"{step} {version}" for step, version in made.versions.items())
    said = f"{name}: {output.plural(made.packages, 'package')} frozen, with {pinned}"
    output.done(as_json, made, f"{said}; `wfm campaign show {name}` shows how far it is")


def _names(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"{file} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{file} cannot be read: {e}") from e
    return [line.strip() for line in text.splitlines() if line.strip()]


@campaign.command()
@click.argument("name")
@output.as_json
def show(name: str, as_json: bool) -> None:
    """Show how far a campaign is, and what is missing, with its reason and what would change it.

    \b
    Example:  wfm campaign show dr1
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.campaign(tx.conn, name, d.location)
    if as_json:
        output.document(found)
        return
    output.facts(
        [
            ("campaign", f"{found.name}: {found.percent:g} % covered ({found.covered} of {found.units} units)"),
            ("made from", found.template),
            ("packages", found.packages),
            ("frozen", f"{output.when(found.created_at)} by {found.actor}"),
            ("reason", found.reason),
        ]
    )
    for member in found.revoked:
        click.echo(f"warning: package {member.package} in it was revoked by {member.by}: {member.reason}")
    click.echo()
    states = [s for s in (found.steps[0].states if found.steps else ()) if any(x.states[s] for x in found.steps)]
    rows = [
        (
            x.step,
            f"{x.software} {x.version}" + (f" ({x.version_state})" if x.version_state != "active" else ""),
            f"{x.config} revision {x.config_revision}" if x.config else "",
            x.units,
            *(x.states[s] for s in states),
        )
        for x in found.steps
    ]
    output.table(("STEP", "VERSION", "CONFIG", "UNITS", *(s.upper() for s in states)), rows, empty="no steps")
    if found.missing:
        click.echo("\nmissing")
        lines = [
            (m.step, m.why, m.units, m.example.unit, " ".join(m.example.reason.split()), m.example.change)
            for m in found.missing
        ]
        columns = ("STEP", "WHY", "UNITS", "FOR EXAMPLE", "REASON", "WHAT WOULD CHANGE IT")
        output.table(columns, lines, empty="")


@campaign.command("list")
@output.as_json
def list_(as_json: bool) -> None:
    """List the campaigns, the newest first.

    \b
    Example:  wfm campaign list
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.campaigns(tx.conn, d.location)
    if as_json:
        output.document(found)
        return
    rows = [
        (c.name, c.template, c.packages, c.units, c.covered, f"{c.percent:g} %", output.when(c.created_at), c.actor)
        for c in found
    ]
    columns = ("CAMPAIGN", "MADE FROM", "PACKAGES", "UNITS", "COVERED", "DONE", "FROZEN", "BY")
    output.table(columns, rows, empty="no campaigns yet: `wfm campaign create NAME --pipeline P`")


@campaign.command()
@click.argument("name")
@click.option("--type", "kinds", multiple=True, type=click.Choice(list(ProductType)), help="Only these; repeatable.")
@output.as_json
def products(name: str, kinds: tuple[ProductType, ...], as_json: bool) -> None:
    """List the products of a campaign.

    \b
    Example:  wfm campaign products dr1 --type SCIENCE --json
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.campaign_products(tx.conn, name, d.location, list(kinds) or None)
    if as_json:
        output.document(found)
        return
    rows = [(p.id, p.step, p.unit, p.run, p.type, output.size(p.size), p.path) for p in found]
    output.table(("PRODUCT", "STEP", "UNIT", "RUN", "TYPE", "SIZE", "PATH"), rows, empty="nothing is made yet")
