"""The command line: ``wfm``, also called ``ccat_workflow_manager``.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 not found, 130 interrupted. Modules that take time to
import are imported where a command needs them, so that help and completion are quick.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

import click

from wfm import __version__
from wfm.cli import (
    approve,
    backfill,
    campaigns,
    context,
    data,
    definitions,
    events,
    nights,
    plan,
    quarantine,
    revoke,
    runs,
    system,
    trial,
    upkeep,
)

__all__ = ["main", "wfm"]

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "One machine": (system.up, system.down, system.status, system.demo),
    "Roles": (system.trigger_manager, system.workflow_manager, system.worker, system.result_manager),
    "Definitions and data": (
        *(definitions.apply, definitions.diff, definitions.get, definitions.delete),
        data.data,
        revoke.revoke,
    ),
    "Pipelines": (
        definitions.pipelines,
        *(definitions.trigger, definitions.pause, definitions.resume, definitions.enable, definitions.disable),
        approve.approve,
        backfill.backfill,
        runs.why,
        plan.plan,
        trial.try_,
        campaigns.campaign,
        quarantine.quarantine,
    ),
    "Nights": (nights.coverage, nights.waive),
    "Runs and results": (runs.runs, runs.lineage, events.events),
    "Upkeep": (upkeep.doctor, system.health, upkeep.db, upkeep.charts, upkeep.completion),
}


class Program(click.Group):
    """The group of all commands: its help has sections, and its errors are read by people."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by section, in the order of a newcomer's questions."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(str(c.name), c.get_short_help_str(limit=200)) for c in commands])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; its exit code tells how it ended."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as e:
            if ctx.params["debug"] or logging.getLogger().isEnabledFor(logging.DEBUG):
                traceback.print_exc()
            context.fail(e)


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(__version__, prog_name="wfm")
@click.option("--debug", is_flag=True, help="Show where an error came from.")
def wfm(debug: bool) -> None:
    """Find every gap in the data, run it, and prove what made each product.

    \b
    Begin with:  wfm up        start everything on this machine
                 wfm demo      see it work on real telescope data
                 wfm status    see how it stands
    """


for _command in (command for commands in SECTIONS.values() for command in commands):
    wfm.add_command(_command)
wfm.add_command(system.worker, "celery-worker")


def main() -> None:
    """Entry point of the program."""
    wfm()
