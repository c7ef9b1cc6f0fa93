"""Revoke: what must not be used any more, with a plan of what follows before it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from wfm.revoke import Plan


@click.group(cls=context.Group)
def revoke() -> None:
    """Say that a version, a config, a package or a product must not be used; first shows what follows.

    What rests on it becomes stale, and so does what was made from that; nothing else does. `--restore` undoes it: what
    was made before counts again.
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        output.as_json,
        click.option("--timeout", type=click.FloatRange(0.1, 3600), default=60.0, metavar="S", help="For the plan."),
        click.option("--plan", "only_plan", is_flag=True, help="Show what would follow; change nothing."),
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--restore", "--undo", is_flag=True, help="Let it be used again."),
        click.option("--reason", default="", metavar="TEXT", help="Why; needed for all but --plan."),
    ):
        command = option(command)
    return command


@revoke.command()
@click.argument("name")
@click.argument("version")
@click.option("--deprecate", is_flag=True, help="Only choose it no more: where it is pinned, all stays as it is.")
@_options
def software(name: str, version: str, deprecate: bool, **more: Any) -> None:
    """Revoke or deprecate a version of a software.

    \b
    Example:  wfm revoke software linefit 1.4.0 --reason "wrong sign of the velocity"
              wfm revoke software linefit 1.3.0 --deprecate --plan
    """
    _revoke("software", name, version, deprecate=deprecate, **more)


@revoke.command()
@click.argument("name")
@click.argument("revision", required=False, default="")
@_options
def config(name: str, revision: str, **more: Any) -> None:
    """Revoke a revision of a config, by default the one that counts; the newest that is left counts then.

    \b
    Example:  wfm revoke config narrow-band --reason "window cuts the wings"
              wfm revoke config narrow-band 3 --restore --reason "it was the data"
    """
    _revoke("config", name, revision, **more)


@revoke.command()
@click.argument("name")
@_options
def package(name: str, **more: Any) -> None:
    """Revoke a raw data package: no unit contains it any more.

    \b
    Example:  wfm revoke package CHAI-2026-03-01-0042 --reason "dome was closed"
    """
    _revoke("package", name, **more)


@revoke.command()
@click.argument("product")
@_options
def product(product: str, **more: Any) -> None:
    """Revoke a product, by its id or path: the result that it belongs to is made again.

    \b
    Example:  wfm revoke product 1234 --reason "the reference was saturated"
    """
    _revoke("product", product, **more)


class Revoked(Struct, frozen=True):
    """What a revocation did, or would do; the plan is None where it took too long."""

    kind: str
    name: str
    before: str
    state: str
    done: bool
    plan: Plan | None


def _revoke(
    kind: str,
    name: str,
    which: str = "",
    *,
    reason: str,
    restore: bool,
    yes: bool,
    only_plan: bool,
    timeout: float,
    as_json: bool,
    deprecate: bool = False,
) -> None:
    from wfm.revoke import Kind, State, find, plan, set_state

    faults = [
        *["--restore and --deprecate exclude each other"] * (restore and deprecate),
        *["--plan changes nothing: leave out --yes"] * (only_plan and yes),
        *["Missing option '--reason': say why; it stands beside your name"] * (not only_plan and not reason.strip()),
        *["--json does not ask: say --yes, or --plan"] * (as_json and not yes and not only_plan),
    ]
    if faults:
        raise UsageError("\n".join(faults))
    state = State.ACTIVE if restore else State.DEPRECATED if deprecate else State.REVOKED
    with context.deployment() as d:
        with d.read() as tx:
            thing = find(tx.conn, Kind(kind), name, which, restore=restore)
        found: Plan | None = None
        if thing.state is not state:
            try:
                found = plan(d.store, thing, state, seconds=timeout)
            except UnavailableError as e:
                if not yes:
                    raise
                output.warn(str(e))
        said = f"{kind} {thing.name}"
        if thing.state is state:
            nothing = Revoked(kind, thing.name, thing.state, state, False, None)
            output.done(as_json, nothing, f"{said} is {state} already; nothing to do")
            return
        if not as_json and found:
            _show(found)
        if not only_plan:
            to = "let it be used again" if restore else str(state).removesuffix("d")
            if not yes:
                click.confirm(f"{to} {said}?", abort=True, err=True)
            d.write(lambda tx: set_state(tx, thing, state, context.actor(reason)))
    done = Revoked(kind, thing.name, thing.state, state, not only_plan, found)
    output.done(as_json, done, "nothing was changed" if only_plan else f"{said} is {state} now")


def _show(plan: Plan) -> None:
    from wfm.revoke import Effect

    rows = [(s.pipeline, s.step, s.units, s.effect) for s in plan.steps]
    output.table(("PIPELINE", "STEP", "UNITS", "WHAT BECOMES OF THEM"), rows, empty="no unit is touched")
    if plan.cost.runs:
        click.echo(f"{output.plural(plan.cost.runs, 'run')}: {plan.cost}; earlier results stay as history\n")
    if plan.units(Effect.HELD):
        click.echo("held units run when what holds them is gone: see `wfm why`\n")
