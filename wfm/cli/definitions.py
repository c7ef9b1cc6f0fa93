"""What there is and what is to be done, as documents: apply, diff, get, delete; and what people ask of pipelines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from msgspec import Struct

from wfm.cli import context, output
from wfm.cli.system import show_coverage
from wfm.errors import DocumentError, NotFoundError, UsageError

if TYPE_CHECKING:
    from wfm.documents import Change, Documents
    from wfm.store import Tx
    from wfm.views import CoverageLine
    from wfm.whatif import StepEffect


# --- documents ---


class Effect(Struct, frozen=True):
    """What applying some documents does: each change, and how the pipelines that it touches stand.

    Attributes:
        steps: what becomes of their units and runs; None if that took too long to find out.
    """

    changes: list[Change]
    pipelines: list[CoverageLine]
    steps: list[StepEffect] | None


def read_documents(files: Sequence[str]) -> Documents:
    """The documents of some YAML files; ``-`` is standard input.

    Raises:
        UsageError: no file is named, or one cannot be read. NotFoundError: one does not exist.
    """
    from wfm import documents

    if not files:
        raise UsageError("name at least one file: -f FILE")
    texts = []
    for file in files:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise NotFoundError(f"{file} does not exist") from None
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"{file} cannot be read: {e}") from e
        texts.append(("standard input" if file == "-" else file, text))
    return documents.load(texts)


@contextmanager
def deployment_for(read: Documents) -> Iterator[context.Deployment]:
    """The configured deployment. Where it cannot be asked, the faults that are known without it are told at least."""
    from wfm.yamltext import refuse

    try:
        with context.deployment() as d:
            yield d
    except Exception as e:
        if not isinstance(e, DocumentError):
            refuse(read.faults)
        raise


def effects(d: context.Deployment, read: Documents) -> list[StepEffect] | None:
    """What becomes of units and runs; None, with a warning, where the catalogue is too large to find out in time."""
    from wfm import whatif
    from wfm.errors import UnavailableError

    try:
        return whatif.effects(d.store, read, d.location)
    except UnavailableError as e:
        output.warn(f"what becomes of units was not counted: {str(e).partition(',')[0]}")
        return None


def apply_documents(
    tx: Tx, read: Documents, location_id: int, steps: list[StepEffect] | None, reason: str = ""
) -> Effect:
    """Apply documents in a transaction."""
    from wfm import documents, views

    actor = context.actor(reason)
    applied = documents.apply(tx.conn, read, location_id=location_id, actor=actor.name, reason=actor.reason)
    tx.load_events(applied.event_ids)
    if not applied.pipeline_ids_changed:
        return Effect(applied.changes, [], steps)
    touched = {r.name for r in tx.all("SELECT name FROM pipeline WHERE id = ANY(:i)", i=applied.pipeline_ids_changed)}
    coverage = views.coverage_summary(tx.conn, location_id)
    return Effect(applied.changes, [line for line in coverage if line.pipeline in touched], steps)


def show_effect(effect: Effect, *, verbs: dict[str, str]) -> None:
    """Print what becomes of each document, field by field, and the units of the pipelines that this touches."""
    for c in effect.changes:
        renamed = f", renamed from {c.renamed_from}" if c.renamed_from else ""
        click.echo(f"{c.kind} {c.name}: {verbs[c.action]}{renamed}")
        for new, old in c.renamed_steps.items():
            click.echo(f"  steps.{new}: renamed from {old}")
        told = {"renamed_from"} if renamed else set()
        told |= {f"steps.{new}.renamed_from" for new in c.renamed_steps}
        for d in c.differences if c.action == "update" else ():
            if d.field not in told:
                click.echo(f"  {d.field}: {_brief(d.old)} → {_brief(d.new)}")
    if effect.pipelines:
        click.echo("\nunits of the pipelines that this touches, by what they are now:")
        show_coverage(effect.pipelines)
    if effect.steps:
        click.echo("\nwhat becomes of units and active runs:")
        rows = [(f"{s.pipeline}/{s.step}", s.stale, s.new, s.orphaned, s.runs) for s in effect.steps]
        output.table(("STEP", "STALE", "NEW", "ORPHANED", "RUNS AFFECTED"), rows, empty="")


def _brief(value: Any) -> str:
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."


_files = click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="A YAML file; - for standard input.")
_more_files = click.argument("more", nargs=-1, metavar="[FILE]...")


@click.command()
@_files
@_more_files
@context.reason
@output.as_json
def apply(files: tuple[str, ...], more: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Make the catalogue and the pipelines as YAML documents say.

    Applying the same again changes nothing. All faults of all files are reported together, and then nothing is done.

    \b
    Example:  wfm apply -f pipelines/*.yaml --reason "line fit 1.3"
    """
    read = read_documents([*files, *more])
    with deployment_for(read) as d:
        steps = effects(d, read)
        effect = d.write(lambda tx: apply_documents(tx, read, d.location, steps, reason))
    if as_json:
        output.document(effect)
    else:
        show_effect(effect, verbs={"create": "created", "update": "updated", "unchanged": "unchanged"})


@click.command()
@_files
@_more_files
@output.as_json
def diff(files: tuple[str, ...], more: tuple[str, ...], as_json: bool) -> None:
    """Show what `wfm apply` would do. Changes nothing.

    \b
    Example:  wfm diff -f pipelines/*.yaml
    """
    read = read_documents([*files, *more])
    with deployment_for(read) as d:
        steps = effects(d, read)
        with d.read() as tx:
            effect = apply_documents(tx, read, d.location, steps)
            tx.conn.rollback()
    if as_json:
        output.document(effect)
    else:
        show_effect(
            effect, verbs={"create": "would be created", "update": "would be updated", "unchanged": "unchanged"}
        )


class Kind(click.ParamType[str]):
    """A kind of document, or one of some further words."""

    name = "kind"

    def __init__(self, *more: str) -> None:
        self.more = more

    def _allowed(self) -> list[str]:
        from wfm.documents import KINDS

        return [*KINDS, *self.more]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from wfm.grouping import unknown

        if value not in self._allowed():
            self.fail(unknown("kind", value, self._allowed()), param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        """Kinds that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(kind) for kind in self._allowed() if kind.startswith(incomplete)]


PRESETS = "presets"


@click.command()
@click.argument("kind", type=Kind(PRESETS))
@click.argument("name", required=False)
@output.as_json
def get(kind: str, name: str | None, as_json: bool) -> None:
    """Print documents as they could be applied again; `presets` are ready ones, to be edited and applied.

    \b
    Example:  wfm get pipeline
              wfm get software linefit > linefit.yaml
              wfm get presets chai-per-scan > chai.yaml
    """
    from wfm import documents, yamltext

    if kind == PRESETS:
        _get_presets(name, as_json)
        return
    with context.deployment() as d, d.read() as tx:
        found = documents.get(tx.conn, kind, name)
    if as_json:
        output.document(found)
    elif found:
        click.echo(yamltext.dump(found), nl=False)
    else:
        click.echo(f"no {kind} yet", err=True)


def _get_presets(name: str | None, as_json: bool) -> None:
    from wfm import presets
    from wfm.grouping import unknown

    texts = presets.texts()
    if name is not None and name not in texts:
        raise NotFoundError(unknown("preset", name, texts))
    if as_json:
        shown = texts if name is None else {name: texts[name]}
        output.document([{"name": n, "purpose": presets.purpose(t), "text": t} for n, t in shown.items()])
    elif name is not None:
        click.echo(texts[name], nl=False)
    else:
        rows = [(n, presets.purpose(t)) for n, t in texts.items()]
        output.table(("PRESET", "FOR"), rows, empty="there are none")
        click.echo("\n`wfm get presets NAME > mine.yaml`, edit it, then `wfm apply -f mine.yaml`")


@click.command()
@click.argument("kind", type=Kind())
@click.argument("name")
@context.reason
@output.as_json
def delete(kind: str, name: str, reason: str, as_json: bool) -> None:
    """Delete a thing that nothing uses. The history of runs stays.

    \b
    Example:  wfm delete pipeline ngc253-co --reason "replaced by ngc253-co43"
    """
    from wfm import documents

    actor = context.actor(reason)

    def work(tx: Tx) -> None:
        tx.load_events(documents.delete(tx.conn, kind, name, actor=actor.name, reason=actor.reason))

    with context.deployment() as d:
        d.write(work)
    output.done(as_json, {"kind": kind, "name": name, "deleted": True}, f"{kind} {name}: deleted")


# --- pipelines ---

_target = click.argument("target", metavar="PIPELINE[/STEP]")


@click.command()
@click.argument("name", metavar="[PIPELINE]", required=False)
@output.as_json
def pipelines(name: str | None, as_json: bool) -> None:
    """List the pipelines, and when they work: the next times of those with `trigger: CRON`.

    \b
    Example:  wfm pipelines
              wfm pipelines nightly-maps --json
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.pipelines(tx.conn, d.location, pipeline=name)
    if as_json:
        output.document(found)
        return
    rows = [
        (
            p.name,
            " ".join(filter(None, (p.trigger, p.cron, p.timezone))),
            "disabled" if not p.enabled else f"paused by {p.paused_by}" if p.paused_by else "enabled",
            p.priority,
            output.when(p.fired_for),
            "; ".join(f"{output.when(t.utc)} ({t.local})" for t in p.next),
        )
        for p in found
    ]
    output.table(
        ("PIPELINE", "TRIGGER", "STATE", "PRIORITY", "FIRED FOR", "NEXT TIMES"), rows, empty="no pipelines yet"
    )


@click.command()
@_target
@click.argument("unit", required=False)
@context.reason
@output.as_json
def trigger(target: str, unit: str | None, reason: str, as_json: bool) -> None:
    """Ask for gaps to run now: of a pipeline, of one step, of one unit.

    This is how pipelines with `trigger: MANUAL` run; those with CRON need not wait then. What is covered stays covered.

    \b
    Example:  wfm trigger ngc253-co
              wfm trigger ngc253-co/map ngc253-co43
    """
    from wfm import acts

    pipeline, step = context.split(target)

    def work(tx: Tx) -> int:
        return acts.trigger(tx, pipeline, step, context.full_key(tx, pipeline, unit), context.actor(reason))

    with context.deployment() as d:
        asked = d.write(work)
    output.done(
        as_json,
        {"pipeline": pipeline, "step": step, "units": asked},
        f"asked for the gaps among {output.plural(asked, 'unit')}; `wfm why {target}` shows what becomes of them",
    )


@click.command()
@_target
@click.argument("unit", required=False)
@context.reason
@output.as_json
def pause(target: str, unit: str | None, reason: str, as_json: bool) -> None:
    """Start nothing new in a pipeline, a step or a unit; what runs goes on.

    \b
    Example:  wfm pause ngc253-co/map --reason "waiting for the new beam"
              wfm pause ngc253-co/calibrate 0142
    """
    from wfm import acts

    pipeline, step = context.split(target)

    def work(tx: Tx) -> str | None:
        key = context.full_key(tx, pipeline, unit)
        acts.pause(tx, pipeline, step, key, context.actor(reason))
        return key

    with context.deployment() as d:
        key = d.write(work)
    what = f"{target} {key}" if key else target
    said = f"{what} is paused; `wfm resume {what}` lets it go on"
    output.done(as_json, {"pipeline": pipeline, "step": step, "unit": key, "paused": True}, said)


@click.command()
@_target
@click.argument("unit", required=False)
@context.reason
@output.as_json
def resume(target: str, unit: str | None, reason: str, as_json: bool) -> None:
    """Undo `wfm pause`.

    \b
    Example:  wfm resume ngc253-co/map
    """
    from wfm import acts

    pipeline, step = context.split(target)

    def work(tx: Tx) -> tuple[str | None, bool]:
        key = context.full_key(tx, pipeline, unit)
        return key, acts.resume(tx, pipeline, step, key, context.actor(reason))

    with context.deployment() as d:
        key, was = d.write(work)
    what = f"{target} {key}" if key else target
    said = f"{what} goes on" if was else f"{what} was not paused; `wfm status` lists what is"
    output.done(as_json, {"pipeline": pipeline, "step": step, "unit": key, "paused": False, "was_paused": was}, said)


@click.command()
@click.argument("pipeline")
@context.reason
@output.as_json
def enable(pipeline: str, reason: str, as_json: bool) -> None:
    """Let a pipeline work.

    \b
    Example:  wfm enable ngc253-co
    """
    _set_enabled(pipeline, True, reason, as_json)


@click.command()
@click.argument("pipeline")
@context.reason
@output.as_json
def disable(pipeline: str, reason: str, as_json: bool) -> None:
    """Have a pipeline do nothing until `wfm enable`; what runs goes on.

    \b
    Example:  wfm disable ngc253-co --reason "season is over"
    """
    _set_enabled(pipeline, False, reason, as_json)


def _set_enabled(pipeline: str, enabled: bool, reason: str, as_json: bool) -> None:
    from wfm import acts

    with context.deployment() as d:
        d.write(lambda tx: acts.set_enabled(tx, pipeline, enabled, context.actor(reason)))
    said = f"{pipeline} is {'enabled' if enabled else 'disabled'}"
    output.done(as_json, {"pipeline": pipeline, "enabled": enabled}, said)
