"""Runs: list, show, logs, watch, cancel, retry; and what people ask about results: why, lineage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from wfm.cli import context, output
from wfm.errors import NotFoundError, UsageError
from wfm.model import ACTIVE_STATES, FINAL_STATES, JobRef, Role, RunState, UpstreamRead

if TYPE_CHECKING:
    from wfm.acts import Moved
    from wfm.config import Settings
    from wfm.store import RunRow, Tx
    from wfm.views import LineageNode, RunDetail, RunLine, WhyLine

LOOK_SECONDS = 0.3
"""s between two looks at what is being followed."""

run_id = click.argument("run_id", metavar="ID", type=context.Key)


@click.group(cls=context.Group)
def runs() -> None:
    """List, follow and steer runs."""


# --- list, show ---


@runs.command("list")
@click.option("--pipeline", metavar="P")
@click.option("--step", metavar="S")
@click.option("--unit", metavar="U")
@click.option("--state", "states", type=click.Choice(list(RunState)), multiple=True, help="May be repeated.")
@click.option("--active", is_flag=True, help="Only those that have not ended.")
@click.option("--since", type=context.Time(), help="Only those whose state changed since.")
@click.option("--limit", type=click.IntRange(1), default=50, help="How many at most.")
@output.as_json
def list_(
    pipeline: str | None,
    step: str | None,
    unit: str | None,
    states: tuple[RunState, ...],
    active: bool,
    since: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List runs, the newest first.

    \b
    Example:  wfm runs list --pipeline ngc253-co --state FAILED
              wfm runs list --active --json
    """
    from wfm import views

    wanted = {RunState(s) for s in states} | (ACTIVE_STATES if active else set())
    with context.deployment() as d, d.read() as tx:
        found = views.runs(
            tx.conn,
            location_id=d.location,
            pipeline=pipeline,
            step=step,
            unit=context.full_key(tx, pipeline, unit) if pipeline else unit,
            states=wanted,
            since=since,
            limit=limit,
        )
    if as_json:
        output.document(found)
        return
    columns = ("ID", "PIPELINE", "STEP", "UNIT", "STATE", "ATTEMPT", "SINCE", "TOOK", "ABOUT")
    rows = [
        (
            *(r.id, r.pipeline, r.step, r.unit, r.state, r.attempt),
            *(output.when(r.state_since), output.span(r.wall_seconds), _about(r)),
        )
        for r in found
    ]
    output.table(columns, rows, empty="no such runs")


def _about(r: RunLine) -> str:
    """What is to be said of a run beside its state."""
    if r.state in FINAL_STATES:
        passed = "passed" if r.probe_of else "superseded" if r.superseded else ""
        said = passed if r.state is RunState.COMPLETED else _one_line(r.message)
    else:
        said = f"waits: {r.waiting_for}" if r.waiting_for else _one_line(r.message)
    return ": ".join(filter(None, (f"probe of run {r.probe_of}" if r.probe_of else "", said)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


@runs.command()
@run_id
@output.as_json
def show(run_id: int, as_json: bool) -> None:
    """Show all about one run: inputs, job, products, history, tasks.

    \b
    Example:  wfm runs show 42
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.run_detail(tx.conn, run_id)
    if as_json:
        output.document(found)
    else:
        _show(found)


def _show(r: RunDetail) -> None:
    inputs = r.packages[:5] + [f"{u.step} {u.unit} (run {u.id})" for u in r.upstream[:5]]
    total = max(r.upstream_total or r.packages_total, len(inputs))
    output.facts(
        [
            ("run", f"{r.id} {r.pipeline}/{r.step} {r.unit}"),
            ("state", f"{r.state} since {output.when(r.state_since)}"),
            ("waits for", r.waiting_for),
            ("attempt", f"{r.attempt}; {r.failures} of {r.max_retries + 1} allowed have failed"),
            ("failure", ": ".join(filter(None, (r.failure, r.message)))),
            ("exit code", r.exit_code),
            ("result", "accepted: coverage rests on it" if r.accepted else "superseded" if r.superseded else ""),
            ("software", f"{r.software} {r.software_version}"),
            ("config", f"{r.config} revision {r.config_revision}" if r.config else ""),
            ("inputs", f"{total}: {', '.join(inputs)}{', ...' if total > len(inputs) else ''}"),
            ("without", "; ".join(map(_missing, r.partial))),
            ("quarantined", "; ".join(f"{q.member}: {_one_line(q.reason)}" for q in r.quarantined)),
            ("examines", f"run {r.probe_of}: {r.probe}" if r.probe else ""),
            ("asked for", f"{r.cpu:g} cores, {r.memory_gb:g} GB"),
            ("used", _used(r)),
            ("node", r.node),
            ("job", f"{r.job.name} on {r.backend or 'no backend yet'}" if r.job else ""),
            ("handle", r.handle),
            ("directory", r.job.directory if r.job else ""),
            ("created", output.when(r.created_at)),
            ("next look", output.when(r.due_at)),
        ]
    )
    click.echo()
    columns = ("VERSION", "AT", "TRIGGER", "STATE", "ATTEMPT", "BY", "REASON")
    history = [(t.version, output.when(t.at), t.trigger, t.dest, t.attempt, t.actor, t.reason) for t in r.history]
    output.table(columns, history, empty="no history")
    if r.products:
        click.echo()
        products = [(p.id, p.attempt, p.type, output.size(p.size), p.superseded_by, p.path) for p in r.products]
        output.table(("PRODUCT", "ATTEMPT", "TYPE", "SIZE", "SUPERSEDED BY", "PATH"), products, empty="")
    if r.tasks:
        click.echo()
        tasks = [(t.kind, t.attempt, t.state, t.tries, t.owner, _one_line(t.error)) for t in r.tasks]
        output.table(("TASK", "ATTEMPT", "STATE", "TRIES", "OWNER", "ERROR"), tasks, empty="")


def _missing(u: UpstreamRead) -> str:
    if u.read == u.units:
        return ""
    listed = ", ".join(u.missing) + (", ..." if len(u.missing) < u.units - u.read else "")
    return f"{u.units - u.read} of {u.units} units of {u.step}: {listed}"


def _used(r: RunDetail) -> str:
    used = []
    if r.wall_seconds is not None:
        used.append(output.span(r.wall_seconds))
    if r.cpu_hours is not None:
        used.append(f"{r.cpu_hours:.3g} CPU hours")
    if r.peak_memory_gb is not None:
        used.append(f"{r.peak_memory_gb:.3g} GB at most")
    return ", ".join(used)


# --- logs ---


@runs.command()
@run_id
@click.option("-f", "--follow", is_flag=True, help="Go on until the job has ended.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="An earlier attempt; by default the present one.")
def logs(run_id: int, follow: bool, attempt: int | None) -> None:
    """Print what the software of a run wrote to its output.

    \b
    Example:  wfm runs logs 42 -f
              wfm runs logs 42 --attempt 1
    """
    from wfm.backends import open_backend

    with context.deployment() as d:
        backend = open_backend(d.settings)
        run = _run(d, run_id)
        while follow and attempt is None and run.job is None and run.state not in FINAL_STATES:
            time.sleep(LOOK_SECONDS)
            run = _run(d, run_id)
        said = backend.logs(run.ref if attempt in (None, run.attempt) else _earlier(run, attempt, d.settings))
        if not os.path.isabs(said) or "\n" in said:  # its text, not its path
            click.echo(said, nl=False)
            return
        shown, end = attempt or run.attempt, 0
        while True:
            run = _run(d, run_id)  # looked at before the file, so that nothing that was written is missed
            end = print_from(Path(said), end)
            if not follow or run.attempt != shown or run.state not in _MAY_WRITE:
                break
            time.sleep(LOOK_SECONDS)
        if not end and not os.path.exists(said):
            raise NotFoundError(
                f"run {run_id} has no log of attempt {shown} (now: {run.state}): no file {said}; "
                f"`wfm runs show {run_id}` says how far it came"
            )
        if not end:
            output.warn(f"it wrote nothing there; `wfm runs show {run_id}` names the log files among its products")


def _earlier(run: RunRow, attempt: int, settings: Settings) -> JobRef:
    from wfm.jobs import attempt_directory, job_name

    base = str(settings.pipeline_base_dir)
    directory = attempt_directory(base, run.pipeline_name, run.step_name, run.unit, run.id, attempt)
    return JobRef(job_name(run.location_id, run.id, attempt), directory)


_MAY_WRITE = {RunState.STAGING_DATA, RunState.SUBMITTED, RunState.RUNNING, RunState.CANCELLING}


def _run(d: context.Deployment, run_id: int) -> RunRow:
    with d.read() as tx:
        found = tx.find_runs("r.id = :id", id=run_id)
    if run_id not in found:
        raise NotFoundError(f"unknown run {run_id}; see `wfm runs list`")
    return found[run_id]


def print_from(path: Path, start: int, *, err: bool = False) -> int:
    """Print a file from an offset; returns its end."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(1 << 16):
                click.echo(block, nl=False, err=err)
            return file.tell()
    except FileNotFoundError:
        return start


# --- watch ---


class Change(Struct, frozen=True):
    """A run that entered a state. `probe_of`: the failed run that it examines; None of other runs."""

    id: int
    pipeline: str
    step: str
    unit: str
    state: RunState
    attempt: int
    at: datetime
    message: str
    probe_of: int | None = None


@runs.command()
@click.argument("run_id", metavar="[ID]", type=context.Key, required=False)
@output.as_json
def watch(run_id: int | None, as_json: bool) -> None:
    """Follow a run to its end, or all runs until nothing is left to do.

    Ends with 1 if a run that was followed failed or was cancelled.

    \b
    Example:  wfm runs watch
              wfm runs watch 42
    """
    unhappy: set[int] = set()
    seen = False
    with context.deployment() as d:
        for c in _one(d, run_id) if run_id else _all(d):
            seen = True
            # That a part of a unit fails is what a search is to find out: no failure of its own.
            if c.state in FINAL_STATES and c.probe_of is None:
                (unhappy.discard if c.state is RunState.COMPLETED else unhappy.add)(c.id)
            if as_json:
                output.line(c)
            else:
                name = f"run {c.id} {c.pipeline}/{c.step} {c.unit}"
                more = [f"attempt {c.attempt}"] if c.attempt > 1 else []
                more += [_one_line(c.message)] if c.message else []
                click.echo("  ".join([output.when(c.at), name, c.state, *more]))
                sys.stdout.flush()
    if not seen:
        click.echo("nothing is under way; `wfm runs list` shows what there was, `wfm status` how it stands", err=True)
    if unhappy:
        click.get_current_context().exit(1)


def _one(d: context.Deployment, run_id: int) -> Iterator[Change]:
    """Every transition of a run, until it has ended."""
    from wfm import views

    version = 0
    while True:
        with d.read() as tx:
            r = views.run_detail(tx.conn, run_id)
        for t in r.history[version:]:
            now = t.version == r.version
            yield Change(
                r.id, r.pipeline, r.step, r.unit, RunState(t.dest), t.attempt, t.at, r.message if now else t.reason
            )
        version = r.version
        if r.state in FINAL_STATES:
            return
        time.sleep(LOOK_SECONDS)


_OVERLAP = timedelta(minutes=5)
"""A transaction that commits now may have begun, and be dated, that much earlier."""


def _all(d: context.Deployment) -> Iterator[Change]:
    """The runs under way, and then every run that is seen in another state, until none is left and none will come."""
    from wfm import views

    def ask(tx: Tx, **which: Any) -> list[RunLine]:
        return views.runs(tx.conn, location_id=d.location, limit=1_000_000, **which)

    with d.read() as tx:
        since = _now(tx) - _OVERLAP
        seen = {r.id: r.version for r in ask(tx, since=since, states=FINAL_STATES)}
        found = ask(tx, states=ACTIVE_STATES)
    nothing_left = False
    while True:
        for r in reversed(found):
            if seen.get(r.id) != r.version:
                seen[r.id] = r.version
                said = _about(r)
                yield Change(r.id, r.pipeline, r.step, r.unit, r.state, r.attempt, r.state_since, said, r.probe_of)
        if nothing_left:
            return
        time.sleep(LOOK_SECONDS)
        with d.read() as tx:
            counts = views.counts(tx.conn, d.location)  # before the runs, so that what ends now is seen below
            found = ask(tx, since=since)
            since = _now(tx) - _OVERLAP
        deciding = any(p.recipient in (Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER) for p in counts.pending)
        nothing_left = not deciding and not any(counts.runs[state] for state in ACTIVE_STATES)


def _now(tx: Tx) -> datetime:
    now: datetime = tx.all("SELECT now() AS now")[0].now
    return now


# --- cancel, retry ---


@runs.command()
@click.argument("ids", metavar="[ID]...", type=context.Key, nargs=-1)
@click.option("--pipeline", metavar="P", help="All runs of a pipeline that have not ended.")
@context.reason
@output.as_json
def cancel(ids: tuple[int, ...], pipeline: str | None, reason: str, as_json: bool) -> None:
    """Cancel runs. A run that may have a job is CANCELLED when its backend has confirmed.

    \b
    Example:  wfm runs cancel 42 43 --reason "wrong config"
              wfm runs cancel --pipeline ngc253-co
    """
    from wfm import acts, views

    if bool(ids) == bool(pipeline):
        raise UsageError("name runs by ID, or a pipeline with --pipeline")

    def work(tx: Tx) -> Moved:
        chosen: Sequence[int] = ids
        if pipeline:
            states = ACTIVE_STATES - {RunState.CANCELLING}
            found = views.runs(tx.conn, location_id=d.location, pipeline=pipeline, states=states, limit=1_000_000)
            chosen = [r.id for r in found]
        return acts.cancel_runs(tx, chosen, context.actor(reason))

    with context.deployment() as d:
        tell(d.write(work), as_json)


@runs.command()
@click.argument("ids", metavar="ID...", type=context.Key, nargs=-1, required=True)
@context.reason
@output.as_json
def retry(ids: tuple[int, ...], reason: str, as_json: bool) -> None:
    """Begin another attempt of runs that FAILED or were CANCELLED, with all their retries.

    \b
    Example:  wfm runs retry 42 --reason "disk was full"
    """
    from wfm import acts

    with context.deployment() as d:
        tell(d.write(lambda tx: acts.retry_runs(tx, ids, context.actor(reason))), as_json)


def tell(done: Moved, as_json: bool) -> None:
    """Which runs moved, and why the others did not; the command fails if there are such."""
    if as_json:
        refused = {i: str(e) for i, e in sorted(done.refused.items())}
        output.document({"moved": {i: r.state for i, r in sorted(done.moved.items())}, "refused": refused})
    else:
        for i, r in sorted(done.moved.items()):
            click.echo(f"run {i} {r.pipeline}/{r.step} {r.unit}: {r.state}")
        for i, e in sorted(done.refused.items()):
            click.echo(f"run {i}: refused: {str(e).removeprefix(f'run {i}: ')}", err=True)
        if done.refused:
            click.echo("`wfm events replay --run ID` has an ended run begin another attempt", err=True)
        if not done.moved and not done.refused:
            click.echo("no such runs")
    if done.refused:
        click.get_current_context().exit(1)


# --- why, lineage ---


@click.command()
@click.argument("target", metavar="[PIPELINE[/STEP]]", required=False)
@click.argument("unit", required=False)
@click.option("--package", metavar="NAME", help="Ask about a raw data package instead.")
@click.option("--limit", type=click.IntRange(1), default=1000, help="How many units at most.")
@output.as_json
def why(target: str | None, unit: str | None, package: str | None, limit: int, as_json: bool) -> None:
    """Say why each unit has, or has not, been processed, and what would change that.

    Those that need somebody come first.

    \b
    Example:  wfm why ngc253-co/calibrate 0142
              wfm why --package 0142
    """
    from wfm import views

    if bool(target) == bool(package):
        raise UsageError("name a pipeline (PIPELINE or PIPELINE/STEP), or a package with --package")
    with context.deployment() as d, d.read() as tx:
        if package:
            about = views.why_package(tx.conn, package, location_id=d.location)
            if as_json:
                output.document(about)
                return
            click.echo(f"package {about.package} is {about.state}: {about.summary}\n")
            _explain(about.units)
            if about.not_selected:
                click.echo()
                others = [(n.pipeline, n.reason) for n in about.not_selected]
                output.table(("PIPELINE WITHOUT IT", "REASON"), others, empty="")
            return
        pipeline, step = context.split(str(target))
        unit = context.full_key(tx, pipeline, unit)
        found = views.why(tx.conn, pipeline=pipeline, step=step, unit=unit, location_id=d.location, limit=limit)
        if unit:
            found = [_with_logs(tx, line, d.settings) for line in found]
    if as_json:
        output.document(found)
        return
    _explain(found)
    for line in found if unit else ():
        _show_failures(line)
        _show_quarantined(line)


def _with_logs(tx: Tx, line: WhyLine, settings: Settings) -> WhyLine:
    """What is known of a unit, each failure with the last line of its log."""
    from msgspec import structs

    from wfm.backends import open_backend

    if not line.last_failures:
        return line
    backend = open_backend(settings)
    runs = tx.find_runs("r.id = ANY(:ids)", ids=[f.run for f in line.last_failures])

    def log(run: int, attempt: int) -> str:
        said = backend.logs(_earlier(runs[run], attempt, settings))
        return last_line(Path(said)) if os.path.isabs(said) and "\n" not in said else said.rstrip().rpartition("\n")[2]

    failures = [structs.replace(f, log=log(f.run, f.attempt)) for f in line.last_failures]
    return structs.replace(line, last_failures=failures)


def last_line(path: Path) -> str:
    """The last line of a file that is not empty, from its last 4 kB; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            return file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
    except OSError:
        return ""


def _show_failures(line: WhyLine) -> None:
    if not line.failures:
        return
    times = output.plural(line.failures, "failure")
    click.echo(
        f"\n{line.pipeline}/{line.step}: {times} with the input, version and config that are wanted now; the last:"
    )
    rows = [
        (f.run, f.attempt, output.when(f.at), f.failure, f.exit_code, _one_line(f.message), _one_line(f.log))
        for f in line.last_failures
    ]
    output.table(("RUN", "ATTEMPT", "AT", "CLASS", "EXIT CODE", "MESSAGE", "LAST LINE OF ITS LOG"), rows, empty="")


def _show_quarantined(line: WhyLine) -> None:
    if line.quarantined:
        click.echo(f"\n{line.pipeline}/{line.step}: in quarantine, it is run without these:")
        rows = [(q.member, output.when(q.at), q.run, q.probe, _one_line(q.error)) for q in line.quarantined]
        output.table(("MEMBER", "SINCE", "FAILED RUN", "FAILED ALONE", "MESSAGE"), rows, empty="")


def _explain(lines: Sequence[WhyLine]) -> None:
    rows = [(f"{w.pipeline}/{w.step}", w.unit, w.state, _one_line(w.reason), w.change) for w in lines]
    output.table(("STEP", "UNIT", "STATE", "REASON", "WHAT WOULD CHANGE IT"), rows, empty="no units: no data fits yet")


@click.command()
@click.argument("thing", metavar="PRODUCT|PACKAGE|RUN")
@output.as_json
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Print a Mermaid flowchart.")
def lineage(thing: str, as_json: bool, as_mermaid: bool) -> None:
    """Show what a thing was made from, and what was made from it.

    A number is a run; anything else is the name of a package or the path of a product. `run:`, `package:` and
    `product:` before it say which is meant, and a product may then be named by its id.

    \b
    Example:  wfm lineage 42
              wfm lineage science/NGC253.fits --mermaid
              wfm lineage product:7 --json
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        node = _lineage(tx, thing)
    if as_json:
        output.document(node)
    else:
        click.echo(views.mermaid(node) if as_mermaid else views.tree(node), nl=False)


def _lineage(tx: Tx, thing: str) -> LineageNode:
    from wfm.views import LineageKind, lineage

    prefix, colon, name = thing.partition(":")
    if colon and prefix in list(LineageKind):
        return lineage(tx.conn, LineageKind(prefix), name)
    if thing.isdecimal():
        return lineage(tx.conn, LineageKind.RUN, thing)
    faults = []
    for kind in (LineageKind.PACKAGE, LineageKind.PRODUCT):
        try:
            return lineage(tx.conn, kind, thing)
        except NotFoundError as e:
            faults.append(str(e))
    raise NotFoundError("\n".join([f"{thing!r} is neither a package nor a product", *faults]))
