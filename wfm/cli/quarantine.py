"""Quarantine: members on which a unit fails, and that it is run without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from wfm.cli import context, output
from wfm.errors import UsageError

if TYPE_CHECKING:
    from wfm.views import QuarantineLine


@click.group(invoke_without_command=True)
@click.option("--pipeline", metavar="P[/STEP]", help="Of this pipeline or step only.")
@click.option("--all", "every", is_flag=True, help="Also what is not in force any more.")
@output.as_json
@click.pass_context
def quarantine(ctx: click.Context, pipeline: str | None, every: bool, as_json: bool) -> None:
    """List what units are run without since they fail on it, with the evidence.

    A step with `quarantine_at_most` looks for such members by itself, and leaves them out until they have new content,
    its version or config is another one, or somebody releases them.

    \b
    Example:  wfm quarantine
              wfm quarantine --pipeline ngc253-co/map --all --json
    """
    from wfm import views

    if ctx.invoked_subcommand:
        if pipeline or every or as_json:
            raise UsageError("--pipeline, --all and --json of `wfm quarantine` are for its list alone")
        return
    name, step = context.split(pipeline) if pipeline else (None, None)
    with context.deployment() as d, d.read() as tx:
        found = views.quarantine(tx.conn, location_id=d.location, pipeline=name, step=step, every=every)
    if as_json:
        output.document(found)
        return
    columns = ("STEP", "UNIT", "MEMBER", "SINCE", "FAILED WITH IT", "WITH IT ALONE", "ERROR", "STATE")
    rows = [
        (
            *(f"{q.pipeline}/{q.step}", q.unit, f"{q.kind} {q.member}", output.when(q.created_at)),
            *(f"run {q.run}", f"run {q.probe}", " ".join(q.error.split()), _state(q)),
        )
        for q in found
    ]
    output.table(columns, rows, empty="nothing is in quarantine")


def _state(q: QuarantineLine) -> str:
    if q.in_force:
        return "left out"
    if q.released_at:
        return f"released {output.when(q.released_at)} by {q.released_by}: {q.released_reason}"
    return "not in force: it, the version or the config is another one now"


@quarantine.command()
@click.argument("target", metavar="PIPELINE/STEP")
@click.argument("unit")
@click.argument("member", required=False)
@context.required_reason
@output.as_json
def release(target: str, unit: str, member: str | None, reason: str, as_json: bool) -> None:
    """Use members of a unit again, and try it with them.

    The run that failed with them begins another attempt, as by `wfm runs retry`.

    \b
    Example:  wfm quarantine release ngc253-co/map ngc253 0142 --reason "the mapper can read it after all"
    """
    from wfm import acts

    pipeline, step = context.split(target)
    if step is None:
        raise UsageError(f"{target!r} names no step: wfm quarantine release PIPELINE/STEP UNIT [MEMBER] --reason TEXT")
    with context.deployment() as d:
        done = d.write(
            lambda tx: acts.release_quarantine(
                tx, pipeline, step, str(context.full_key(tx, pipeline, unit)), member, context.actor(reason)
            )
        )
    output.done(as_json, done, _said(done.members, done.retried))
    if done.refused:
        output.warn(f"it is not tried with them yet: {done.refused}")


def _said(members: Sequence[str], retried: int | None) -> str:
    again = f"; run {retried} begins another attempt" if retried else ""
    return f"released: {', '.join(members)}{again}"
