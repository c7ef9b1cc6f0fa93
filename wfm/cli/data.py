"""Raw data packages: add, scan, list."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec
from msgspec import Struct

from wfm.cli import context, output
from wfm.cli.definitions import apply_documents, deployment_for, read_documents
from wfm.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from wfm.catalogue import PackageIn, Registered
    from wfm.views import PlanLine

F = TypeVar("F", bound=Callable[..., Any])


class Metadata(click.ParamType[dict[str, Any]]):
    """A JSON object, or one KEY=VALUE whose value is JSON or else a text."""

    name = "JSON|KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        key, equals, given = value.partition("=")
        if not value.lstrip().startswith("{"):
            if not equals or not key.strip():
                self.fail(f"{value!r} is neither a JSON object nor KEY=VALUE", param, ctx)
            try:
                return {key.strip(): msgspec.json.decode(given)}
            except msgspec.DecodeError:
                return {key.strip(): given}
        try:
            return msgspec.json.decode(value, type=dict[str, Any])
        except msgspec.DecodeError as e:
            self.fail(f"{value!r} is not a JSON object: {e}", param, ctx)


_ABOUT = (
    click.option("--module", metavar="M", help="Instrument module that took the data."),
    click.option("--instrument", metavar="I", help="Its instrument; needed if the module is new."),
    click.option("--executed-obs-unit", metavar="E", help="The observation as it was executed."),
    click.option("--obs-unit", metavar="U", help="The planned observation; needed if E is new."),
    click.option("--source", metavar="S", help="What was observed."),
    click.option("--program", metavar="P", help="Observing program."),
    click.option("--line", help="Spectral line, such as CO(4-3)."),
    click.option("--started-at", type=context.Time(), help="Start of the observation, ISO 8601, UTC."),
    click.option("--ended-at", type=context.Time(), help="Its end."),
    click.option("--scheduled", metavar="O", help="The scheduled observation it carries out; else found by time."),
    click.option("--metadata", type=Metadata(), multiple=True, help="About the package; may be repeated."),
    click.option("--location", metavar="L", help="Where the files lie; by default the disk location that holds them."),
)


def _about(command: F) -> F:
    """The options that say what a package is."""
    for option in reversed(_ABOUT):
        command = option(command)
    return command


class _Found(Struct, frozen=True):
    """A package as it lies on disk.

    Attributes:
        base: the directory that its files are named from. paths: what was named: files of `base`, or `base` itself.
    """

    name: str
    base: Path
    paths: tuple[Path, ...]

    @property
    def files(self) -> list[Path]:
        """All its files."""
        return [f for p in self.paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(f.stat().st_size for f in self.files)


@click.group(cls=context.Group)
def data() -> None:
    """Register raw data packages, and list them."""


@data.command()
@click.argument("files", nargs=-1, type=context.There(path_type=Path), metavar="[FILE]...")
@click.option("--package", metavar="NAME", help="Name of the package.")
@click.option("-f", "--file", "documents", multiple=True, metavar="YAML", help="Documents of kind raw_data_package.")
@_about
@context.reason
@output.as_json
def add(
    files: tuple[Path, ...],
    package: str | None,
    documents: tuple[str, ...],
    reason: str,
    as_json: bool,
    **about: Any,
) -> None:
    """Register files as one raw data package, or the packages of YAML files.

    FILE is a file, or a directory with all that lies in it. Checksums are made here. Every location with an enabled
    pipeline is told of the arrival. Registering the same again changes nothing.

    \b
    Example:  wfm data add scans/0142/*.fits --package 0142 --executed-obs-unit 0142 \\
                --obs-unit ngc253-map --source NGC253 --instrument CHAI --module LFA --metadata night=2026-03-01
              wfm data add -f packages.yaml
    """
    if documents:
        given = [name for name, value in {"FILE": files, "--package": package, **about}.items() if value]
        if given:
            raise UsageError(f"-f stands alone; not together with {', '.join(given)}")
        _add_documents(documents, reason, as_json)
        return
    needed = {"FILE": files, "--package": package, "--module": about["module"]}
    needed["--executed-obs-unit"] = about["executed_obs_unit"]
    if missing := [name for name, value in needed.items() if not value]:
        raise UsageError(f"missing: {', '.join(missing)}; or give documents with -f YAML")
    bases = {_base(f) for f in files}
    if len(bases) > 1:
        raise UsageError(
            "the files of a package lie in one directory, or the package is one directory; these lie in "
            + ", ".join(sorted(map(str, bases)))
        )
    _register([_Found(str(package), bases.pop(), files)], about, reason, as_json)


def _base(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _add_documents(files: Sequence[str], reason: str, as_json: bool) -> None:
    read = read_documents(files)
    if others := sorted({d.kind for d in read.items} - {"raw_data_package"}):
        raise UsageError(f"documents of kind {', '.join(others)} are for `wfm apply -f`")
    with deployment_for(read) as d:
        effect = d.write(lambda tx: apply_documents(tx, read, d.location, [], reason))
    counts: dict[str, int] = defaultdict(int)
    for change in effect.changes:
        counts[change.action] += 1
    _tell(counts["create"], counts["update"], counts["unchanged"], as_json)


@data.command()
@click.argument("directory", type=context.There(file_okay=False, path_type=Path))
@click.option("--pattern", required=True, metavar="GLOB", help="What is a package: files or directories in DIRECTORY.")
@click.option("--add", "really", is_flag=True, help="Register them; without it they are only shown.")
@_about
@context.reason
@output.as_json
def scan(directory: Path, pattern: str, really: bool, reason: str, as_json: bool, **about: Any) -> None:
    """Find packages in a directory: each file or directory that matches is one, and its name is the package's.

    Shows what would be registered; --add registers it. Without --executed-obs-unit, each package is an observation of
    its own, with the package's name.

    \b
    Example:  wfm data scan /archive/2026-03-01 --pattern "*.fits" --module LFA --obs-unit ngc253-map --add
    """
    found = [
        _Found(path.name if path.is_dir() else path.stem, _base(path), (path,))
        for path in sorted(directory.glob(pattern))
    ]
    if not found:
        raise NotFoundError(f"nothing in {directory} matches {pattern!r}")
    places: dict[str, list[str]] = defaultdict(list)
    for f in found:
        places[f.name].append(str(f.paths[0]))
    if twice := [f"{name}: {', '.join(paths)}" for name, paths in places.items() if len(paths) > 1]:
        raise UsageError("several matches would be one package:\n" + "\n".join(twice))
    if really:
        if not about["module"]:
            raise UsageError("missing: --module")
        _register(found, about, reason, as_json)
    elif as_json:
        output.document(
            [{"name": f.name, "path": str(f.paths[0]), "files": len(f.files), "size": f.size} for f in found]
        )
    else:
        rows = [(f.name, len(f.files), output.size(f.size), f.paths[0]) for f in found]
        output.table(("PACKAGE", "FILES", "SIZE", "PATH"), rows, empty="")
        click.echo(f"\n{output.plural(len(found), 'package')}; --add registers them")


def _register(found: Sequence[_Found], about: dict[str, Any], reason: str, as_json: bool) -> None:
    """Checksum and register packages in one transaction."""
    from wfm import catalogue

    def work(tx: Any) -> Registered:
        registered = catalogue.register(tx.conn, packages, actor=actor.name, reason=actor.reason)
        tx.load_events(registered.event_ids)
        return registered

    actor = context.actor(reason)
    with context.deployment() as d:
        with d.read() as tx:
            places = {f.name: _place(tx.conn, f.base, about["location"]) for f in found}
        with output.progress("checksums", sum(f.size for f in found), in_bytes=True) as advance:
            packages = [_package(f, places[f.name], about, advance) for f in found]
        done = d.write(work)
    _tell(done.new, done.changed, done.unchanged, as_json)


def _package(
    found: _Found, place: tuple[str, str], about: dict[str, Any], advance: Callable[[float], None]
) -> PackageIn:
    from wfm.catalogue import ExecutedObsUnitIn, PackageIn, scan_files

    metadata: dict[str, Any] = {}
    for item in about["metadata"]:
        metadata |= item
    return PackageIn(
        name=found.name,
        executed_obs_unit=ExecutedObsUnitIn(
            name=about["executed_obs_unit"] or found.name,
            **{k: about[k] for k in ("obs_unit", "source", "program", "line", "started_at", "ended_at", "scheduled")},
        ),
        module=about["module"],
        instrument=about["instrument"],
        metadata=metadata,
        files=tuple(scan_files(found.paths, advance)),
        location=place[0],
        path=place[1],
    )


def _place(conn: Connection, base: Path, wanted: str | None) -> tuple[str, str]:
    """The disk location that holds a directory, and the directory's path there."""
    from wfm import documents
    from wfm.grouping import unknown

    roots = {at["name"]: at["root"] for at in documents.get(conn, "location") if at["storage"] == "disk" and at["root"]}
    if wanted and wanted not in roots:
        raise NotFoundError(unknown("disk location", wanted, roots))
    here = os.path.realpath(base)
    holding = {
        name: os.path.relpath(here, os.path.realpath(root))
        for name, root in roots.items()
        if wanted in (None, name) and Path(here).is_relative_to(os.path.realpath(root))
    }
    if not holding:
        listed = ", ".join(f"{name} ({root})" for name, root in roots.items()) or "none"
        raise UsageError(
            f"{here} lies in no disk location{f' {wanted}' if wanted else ''} (there: {listed}). Apply one: "
            f"`wfm apply -f FILE` with kind: location, name, site, type: long_term_archive, root: {here}"
        )
    # The innermost one.
    name = min(holding, key=lambda name: len(Path(holding[name]).parts))
    return name, holding[name]


def _tell(new: int, changed: int, unchanged: int, as_json: bool) -> None:
    counts = {"new": new, "changed": changed, "unchanged": unchanged}
    if as_json:
        output.document(counts)
    else:
        click.echo("packages: " + ", ".join(f"{n} {what}" for what, n in counts.items()))


@data.command()
@click.option("--since", type=context.Time(), help="Planned to begin from then on; ISO 8601, or how long ago.")
@click.option("--until", type=context.Time(), help="Before then.")
@click.option("--limit", type=click.IntRange(1), default=1000, help="How many at most.")
@output.as_json
def plan(since: Any, until: Any, limit: int, as_json: bool) -> None:
    """List the scheduled observations: expected, late, executed or lost.

    \b
    Example:  wfm data plan --since 2d
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.planned(tx.conn, start=since, end=until, limit=limit)
    if as_json:
        output.document(found)
    else:
        show_plan(found)


def show_plan(lines: Sequence[PlanLine]) -> None:
    """Print scheduled observations, and what became of them."""
    rows = [
        (
            o.name,
            o.obs_unit,
            output.when(o.planned_start),
            output.when(o.planned_end),
            o.state,
            ", ".join(o.executed_by),
            ", ".join(o.missing),
            f"{o.lost_by}: {o.lost_reason}" if o.state == "lost" else "",
        )
        for o in lines
    ]
    columns = ("OBSERVATION", "OBS UNIT", "FROM", "TO", "STATE", "EXECUTED BY", "MISSING", "LOST")
    output.table(
        columns,
        rows,
        empty="nothing is planned then: see `wfm data plan`, or `wfm apply` documents of kind scheduled_observation",
    )


@data.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@context.required_reason
@output.as_json
def lost(names: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Declare scheduled observations lost: nothing waits for them any more.

    Applying one with `state: planned` takes it back. Should its data come after all, they are processed.

    \b
    Example:  wfm data lost ngc253-2026-03-01 --reason "dome was closed"
    """
    from wfm import acts

    with context.deployment() as d:
        d.write(lambda tx: acts.lose(tx, d.location, names, context.actor(reason)))
    output.done(as_json, {"lost": names}, f"lost: {', '.join(names)}")


@data.command("list")
@click.argument("pattern", required=False)
@click.option("--state", type=click.Choice(["waiting", "transferring", "archived", "failed"]), help="Only these.")
@click.option("--limit", type=click.IntRange(1), default=100, help="How many at most.")
@output.as_json
def list_(pattern: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List the packages registered last, the newest first. PATTERN is a name with * and ?.

    \b
    Example:  wfm data list "2026-03-*" --limit 1000
    """
    from wfm import views

    with context.deployment() as d, d.read() as tx:
        found = views.packages(tx.conn, pattern=pattern, state=state, limit=limit)
    if as_json:
        output.document(found)
        return
    columns = ("PACKAGE", "STATE", "FILES", "SIZE", "OBSERVATION", "MODULE", "REGISTERED", "COPIES")
    rows = [
        (
            p.name,
            p.state,
            p.files,
            output.size(p.size),
            p.executed_obs_unit,
            p.instrument_module,
            output.when(p.registered_at),
            ", ".join(f"{location}: {status}" for location, status in p.copies.items()),
        )
        for p in found
    ]
    output.table(columns, rows, empty="no such packages; `wfm data add` registers some")
