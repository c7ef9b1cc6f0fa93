"""Approve: what another version, a config or a revocation made stale, and is too much to do unasked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from wfm.cli import context, output
from wfm.errors import UsageError

if TYPE_CHECKING:
    from wfm.views import ApprovalLine


@click.command()
@click.argument("target", metavar="[PIPELINE[/STEP]]", required=False)
@click.option("--list", "only_list", is_flag=True, help="Show what is held; change nothing.")
@context.reason
@output.as_json
def approve(target: str | None, only_list: bool, reason: str, as_json: bool) -> None:
    """Let units that are stale and held run again.

    Approval is for what the step wants now: another version or config needs its own. New data never wait for it.

    \b
    Example:  wfm approve --list
              wfm approve ngc253-co/map --reason "the new beam is worth it"
    """
    from wfm import acts, views

    if not only_list and not (target and reason.strip()):
        raise UsageError("name what to approve, and why: wfm approve PIPELINE[/STEP] --reason TEXT; or say --list")
    pipeline, step = context.split(target) if target else (None, None)
    with context.deployment() as d:
        if only_list or not pipeline:
            with d.read() as tx:
                found = views.approvals(tx.conn, d.location, pipeline, step)
        else:
            found = d.write(lambda tx: acts.approve(tx, d.location, pipeline, step, context.actor(reason)))
    if as_json:
        output.document(found)
    elif only_list:
        _show(found)
    else:
        for a in found:
            click.echo(f"{a.pipeline}/{a.step}: {output.plural(a.units, 'unit')} may run again with {a.wanted}")


def _show(found: Sequence[ApprovalLine]) -> None:
    from wfm import views

    columns = ("STEP", "UNITS", "CORE-HOURS", "WANTED", "SINCE", "")
    rows = [
        (
            *(f"{a.pipeline}/{a.step}", a.units, views.hours(a.core_hours)),
            *(a.wanted, output.when(a.since), f"{a.revoked} without a result that counts" if a.revoked else ""),
        )
        for a in found
    ]
    output.table(columns, rows, empty="nothing is held for approval")
