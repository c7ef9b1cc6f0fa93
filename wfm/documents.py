"""Documents that say what there is and what is to be done: ``wfm apply``, ``diff``, ``get`` and ``delete``.

A kind is a struct, whose fields are the keys of the document, and a table (`KINDS`). A field named like a kind names
one thing of that kind; every other field goes to the column of its name. So reading, comparing and writing are the
same code for all kinds; only what lies in further tables (versions, parameters, steps, packages) has code of its own.
"""

from __future__ import annotations

import graphlib
import hashlib
import json
import re
import zoneinfo
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field, structs
from packaging.version import InvalidVersion, Version
from sqlalchemy import Column, ColumnElement, Connection, Table, Text, cast, func, or_, select, text, true, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.dialects.postgresql import insert

from wfm import catalogue, grouping, plan, schema, yamltext
from wfm.catalogue import LABEL, LABEL_TEXT, PackageIn, emit, lock, target, upsert
from wfm.decide import first_identity, renames, schedule_faults
from wfm.errors import NotFoundError, RefusedError, UsageError
from wfm.events import PipelineChanged
from wfm.grouping import unknown
from wfm.model import (
    ACTIVE_STATES,
    BackfillState,
    FanIn,
    OnStale,
    Resources,
    Schedule,
    TriggerType,
    VersionPolicy,
)
from wfm.yamltext import Document, Fault, Path, refuse

Label = Annotated[str, Meta(pattern=LABEL, description=LABEL_TEXT)]
DirectoryName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z",
        description="a name that can be a directory: 1 to 63 of A-Z a-z 0-9 . _ -, the first a letter or digit",
    ),
]
Small = Annotated[int, Meta(ge=-1_000_000, le=1_000_000, description="a whole number between -1000000 and 1000000")]
NotNegative = Annotated[float, Meta(ge=0, description="a number, not negative")]
Weight = Annotated[float, Meta(gt=0, le=1_000_000, description="a number above 0 and up to 1000000")]
Runs = Annotated[int, Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")]


# --- kinds ---


class Site(Struct, frozen=True, kw_only=True):
    """A place. Its nights last from noon to noon in `time_zone`, an IANA name such as America/Santiago."""

    name: Label
    description: str = ""
    time_zone: str = "UTC"


class Location(Struct, frozen=True, kw_only=True):
    """A place for data. `id` may be chosen for a new one (instances know their location by it)."""

    name: Label
    site: str
    type: Literal["source", "buffer", "long_term_archive", "processing"]
    storage: Literal["disk", "s3", "tape"] = "disk"
    root: str = ""
    priority: Small = 0
    id: Annotated[int, Meta(ge=1, le=1 << 53, description="a whole number, 1 or more")] | None = None


class Instrument(Struct, frozen=True, kw_only=True):
    """An instrument. `site` is where it observes: the night of its data follows from the time zone there."""

    name: Label
    site: str | None = None
    description: str = ""


class Module(Struct, frozen=True, kw_only=True):
    """A part of an instrument that takes data of its own; longer without new data than expected is an absence."""

    name: Label
    instrument: str
    description: str = ""
    expect_every_hours: Annotated[float, Meta(gt=0, description="a number, more than 0")] | None = None


class Source(Struct, frozen=True, kw_only=True):
    """What is observed."""

    name: Label
    type: str = "fixed"
    metadata: dict[str, Any] = {}


class Program(Struct, frozen=True, kw_only=True):
    """An observing program."""

    name: Label
    description: str = ""


class ObsUnit(Struct, frozen=True, kw_only=True):
    """A planned observation, which may be executed many times."""

    name: Label
    source: str | None = None
    program: str | None = None
    line: str = ""
    metadata: dict[str, Any] = {}


class ScheduledObservation(Struct, frozen=True, kw_only=True):
    """What the observing plan says of one observation. `state` stays as it is where it is not given.

    `modules` are those that are to take data; without them, any package will do. When it is not carried out so many
    hours after its planned end, that is an absence.
    """

    name: Label
    obs_unit: str
    planned_start: datetime
    planned_end: datetime
    modules: tuple[str, ...] = ()
    late_after_hours: NotNegative = 12.0
    state: Literal["planned", "lost"] | None = None


class SoftwareVersion(Struct, frozen=True, kw_only=True):
    """One version of a reduction software. `state` stays as it is where it is not given."""

    version: str
    command: tuple[str, ...]
    image: str = ""
    sif: str = ""
    state: Literal["active", "deprecated", "revoked"] | None = None


class Software(Struct, frozen=True, kw_only=True):
    """A reduction software. Versions that are not named stay."""

    name: Label
    description: str = ""
    versions: tuple[SoftwareVersion, ...] = ()


class Config(Struct, frozen=True, kw_only=True):
    """Parameters of a reduction software; changed parameters make a new revision."""

    name: Label
    description: str = ""
    parameters: dict[str, Any] = {}


class Grouping(Struct, frozen=True, kw_only=True):
    """A data grouping; each rule as in `wfm.grouping.Rule` or `wfm.grouping.AnyOf`. `renamed_from` is its old name."""

    name: Label
    renamed_from: Label | None = None
    description: str = ""
    rules: tuple[Any, ...] = ()


class Step(Struct, frozen=True, kw_only=True):
    """A reduction step.

    Attributes:
        renamed_from: its old name; it stays what it is, with all that was made.
        fan_in: which units of the steps it depends on must be covered; complete: all, and what is planned has arrived.
        fan_in_deadline_hours: so long after the last planned end of a unit, nothing planned is waited for any more.
        quarantine_at_most: so many members of a unit may be left out since it fails on them; 0: none is looked for.
        cooldown_seconds: a unit runs no more often than that.
        settle_seconds: a unit runs when what it reads has not changed for so long; at most `settle_at_most_seconds`
            after it could have run (None: ten times as long).
        retention_days: None keeps results for ever.
        on_stale: what becomes of units that another version or config made stale.
        approval_units, approval_core_hours: limits above which these wait for approval; None: those of the settings.
    """

    name: DirectoryName
    renamed_from: DirectoryName | None = None
    description: str = ""
    software: str
    version: str = ""
    version_policy: VersionPolicy = VersionPolicy.COMPATIBLE
    config: str | None = None
    group_by: tuple[str, ...] = ()
    depends_on: tuple[str, ...] = ()
    fan_in: FanIn = FanIn.ALL
    fan_in_deadline_hours: NotNegative | None = None
    resources: Resources = Resources()
    environment: dict[str, str] = {}
    max_retries: Annotated[int, Meta(ge=0, le=1000, description="a whole number from 0 to 1000")] = 3
    quarantine_at_most: Annotated[int, Meta(ge=0, le=1000, description="a whole number from 0 to 1000")] = 0
    cooldown_seconds: NotNegative = 0.0
    settle_seconds: NotNegative = 0.0
    settle_at_most_seconds: NotNegative | None = None
    on_stale: OnStale = OnStale.RUN
    approval_units: Annotated[int, Meta(ge=0, le=1 << 53, description="a whole number, not negative")] | None = None
    approval_core_hours: NotNegative | None = None
    retention_days: NotNegative | None = None
    max_in_flight: Runs | None = None


class Pipeline(Struct, frozen=True, kw_only=True):
    """A pipeline. Where `enabled` is not given it stays as it is; so does `location` (at first, the instance's own).

    `weight` is its share of the slots among pipelines of equal priority; `max_in_flight` None sets no limit of its own.
    `stale_priority`, if given, is that of runs whose raw data have a result already. `renamed_from` is its old name.
    """

    name: DirectoryName
    renamed_from: DirectoryName | None = None
    description: str = ""
    grouping: str
    location: str | None = None
    trigger_type: TriggerType = field(default=TriggerType.CONTINUOUS, name="trigger")
    trigger_config: Schedule = Schedule()
    enabled: bool | None = None
    priority: Small = 0
    weight: Weight = 1.0
    max_in_flight: Runs | None = None
    stale_priority: Small | None = None
    steps: tuple[Step, ...]


class Kind(Struct, frozen=True):
    """What a document of a kind says (`spec`), and the table of its things."""

    spec: type[Struct]
    table: Table


KINDS: dict[str, Kind] = {
    "site": Kind(Site, schema.site),
    "location": Kind(Location, schema.data_location),
    "instrument": Kind(Instrument, schema.instrument),
    "module": Kind(Module, schema.instrument_module),
    "source": Kind(Source, schema.source),
    "program": Kind(Program, schema.observing_program),
    "obs_unit": Kind(ObsUnit, schema.obs_unit),
    "scheduled_observation": Kind(ScheduledObservation, schema.scheduled_observation),
    "software": Kind(Software, schema.software),
    "config": Kind(Config, schema.config),
    "grouping": Kind(Grouping, schema.data_grouping),
    "pipeline": Kind(Pipeline, schema.pipeline),
    "raw_data_package": Kind(PackageIn, schema.raw_data_package),
}
"""All kinds, each after those it refers to: the order in which documents are applied."""


class Documents(Struct, frozen=True):
    """What some texts say, in the order in which it is applied.

    Attributes:
        faults: those that are found without a database. Documents with faults are refused when they are applied,
            together with all that does not fit the database then.
        unread: parts of the texts that could not be read, so that nobody knows what else they name.
    """

    items: tuple[Document, ...]
    faults: tuple[Fault, ...] = ()
    unread: tuple[str, ...] = ()

    def of(self, kind: str) -> dict[str, Document]:
        """The documents of a kind, by name."""
        return {d.spec.name: d for d in self.items if d.kind == kind}


# --- faults of documents by themselves ---

_NoteAt = Callable[[Path, str], None]
"""Notes a fault at a part of a document."""


def load(sources: Sequence[tuple[str, str]]) -> Documents:
    """Read documents, and find every fault that can be found without a database.

    Args:
        sources: (file name, YAML text) each; a text may hold many documents.
    """
    reading = yamltext.read(sources, {name: kind.spec for name, kind in KINDS.items()})
    faults = list(reading.faults)
    found: list[Document] = []
    first: dict[tuple[str, str], Document] = {}
    for document in reading.documents:
        own = _own_faults(document)
        kind, name = key = document.kind, document.spec.name
        if name and first.setdefault(key, document) is not document:
            place = f"{first[key].file}:{first[key].lines[()]}"
            own.append(document.fault(("name",), f"{kind} {name!r} comes twice (first in {place})"))
        found.append(structs.replace(document, sound=document.sound and not own))
        faults += own
    order = list(KINDS)
    found.sort(key=lambda d: order.index(d.kind))
    return Documents(tuple(found), tuple(faults), tuple(reading.unread))


def _own_faults(document: Document) -> list[Fault]:
    """What a document's parts have against each other."""
    faults: list[Fault] = []
    if document.sound or document.kind != "raw_data_package":  # that needs all parts of a package
        _check(document.spec, lambda path, message: faults.append(document.fault(path, message)))
    return faults


def _check(spec: Any, note: _NoteAt) -> None:
    match spec:
        case Site() if spec.time_zone not in (zones := zoneinfo.available_timezones()):
            note(("time_zone",), unknown("time zone", spec.time_zone, zones))
        case Software():
            _check_versions(spec, note)
        case ScheduledObservation() if _moment(spec.planned_end) <= _moment(spec.planned_start):
            note(("planned_end",), f"planned_end: {spec.planned_end} does not lie after planned_start")
        case Grouping():
            for n, rule in enumerate(spec.rules):
                for at, fault in grouping.rule_faults(rule, (n,)):
                    note(("rules", *at), f"rule {grouping.number(at)}: {fault}")
        case Pipeline():
            _check_pipeline(spec, note)
        case PackageIn():
            for fault in catalogue.package_faults(spec):
                note(tuple(fault.split(":")[0].split(".")), fault)


def _moment(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _check_versions(spec: Software, note: _NoteAt) -> None:
    known: dict[Version | None, str] = {}
    for n, v in enumerate(spec.versions):
        version = _version(v.version, ("versions", n, "version"), note)
        if version in known:
            note(("versions", n, "version"), f"version {v.version} comes twice (first as {known[version]})")
        elif version:
            known[version] = v.version


def _version(text: str, path: Path, note: _NoteAt) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        policy = f"; for the policy: version_policy: {text}" if text in list(VersionPolicy) else ""
        note(path, f"{text!r} is not a version such as 1.4.0{policy}")
        return None


# What nobody has means a slip of the pen: (allowed from, up to, unit); the lower bound of all but gpu is excluded.
_RESOURCE_LIMITS = {
    "cpu": (0, 4096, "cores"),
    "memory_gb": (0, 65_536, "GB"),
    "time_hours": (0, 8784, "hours"),
    "gpu": (-1, 1024, "GPUs"),
}


def _check_pipeline(spec: Pipeline, note: _NoteAt) -> None:
    _check_trigger(spec, note)
    steps: dict[str, Step] = {}
    for n, step in enumerate(spec.steps):
        if step.name and steps.setdefault(step.name, step) is not step:
            note(("steps", n, "name"), f"step {step.name!r} comes twice")
    for n, step in enumerate(spec.steps):
        _check_step(step, steps, lambda path, message, n=n: note(("steps", n, *path), message))  # type: ignore[misc]
    graph = {name: [d for d in step.depends_on if d in steps] for name, step in steps.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        cycle = e.args[1][::-1]
        first = next(n for n, step in enumerate(spec.steps) if step.name == cycle[0])
        note(("steps", first, "depends_on"), f"steps depend on each other in a circle: {' → '.join(cycle)}")


def _check_trigger(spec: Pipeline, note: _NoteAt) -> None:
    schedule = spec.trigger_config
    if spec.trigger_type is not TriggerType.CRON:
        for key in msgspec.to_builtins(schedule):
            message = f"trigger_config: {key} belongs to trigger: CRON, and this one is {spec.trigger_type}"
            note(("trigger_config", key), message)
    elif not schedule.cron:
        example = '{cron: "0 6 * * *", timezone: America/Santiago}'
        note(("trigger",), f"trigger: CRON needs a cron expression: trigger_config: {example}")
    else:
        for key, fault in schedule_faults(schedule):
            note(("trigger_config", key), f"trigger_config: {key} {getattr(schedule, key)!r} {fault}")


def _check_step(step: Step, steps: Mapping[str, Step], note: _NoteAt) -> None:
    if step.version:
        _version(step.version, ("version",), note)
    elif step.version_policy is VersionPolicy.PINNED:
        note(("version_policy",), f"step {step.name!r} is pinned: it needs a version")
    for fault in grouping.validate_group_by(step.group_by):
        note(("group_by",), f"group_by: {fault}")
    for n, name in enumerate(step.depends_on):
        if name in step.depends_on[:n]:
            note(("depends_on", n), f"depends_on: {name!r} comes twice")
        elif name not in steps:
            note(("depends_on", n), unknown("step", name, steps))
        elif not any(map(grouping.validate_group_by, (steps[name].group_by, step.group_by))):
            finer = ", ".join(steps[name].group_by) or "nothing"
            for dimension in grouping.determines(steps[name].group_by, step.group_by):
                text = f"is grouped by {dimension}, which the units of {name!r} (grouped by {finer}) do not determine"
                given = steps[name].group_by
                also = [d for d in grouping.DIMENSIONS if not grouping.determines([*given, d], [dimension])]
                advice = f"; group {name!r} also by one of: {', '.join(also)}" if also else ""
                note(
                    ("depends_on", n),
                    f"step {step.name!r} {text}: a step must be as coarse as what it depends on{advice}",
                )
    if (step.fan_in is FanIn.COMPLETE) != (step.fan_in_deadline_hours is not None):
        text = "fan_in: complete, and fan_in_deadline_hours: how long after the last planned end it waits"
        note(("fan_in",), f"step {step.name!r}: only together: {text}")
    if step.fan_in is FanIn.COMPLETE and not grouping.validate_group_by(step.group_by):
        for fault in plan.dimension_faults(step.group_by):
            note(("fan_in",), f"fan_in: complete, but {fault}")
    if step.fan_in is FanIn.ANY and not step.depends_on:
        note(("fan_in",), f"fan_in: {step.fan_in}, but step {step.name!r} depends on no other step")
    at_most = step.settle_at_most_seconds
    if at_most is not None and at_most < step.settle_seconds:
        text = f"settle_at_most_seconds {at_most:g} is less than settle_seconds {step.settle_seconds:g}"
        note(("settle_at_most_seconds",), text)
    for resource, (low, high, unit) in _RESOURCE_LIMITS.items():
        value = getattr(step.resources, resource)
        if value is not None and not low < value <= high:
            note(("resources", resource), f"resources: {resource} {value:g} is not between 0 and {high} {unit}")
    for variable in step.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            note(("environment", variable), f"environment: {variable!r} is not the name of a variable")
        elif variable.startswith("WORKFLOW_"):
            note(("environment", variable), f"environment: {variable} belongs to wfm: WORKFLOW_* cannot be set")


# --- reading ---


def _plain(spec: Struct) -> dict[str, Any]:
    """A struct as the JSON that it makes."""
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(spec))
    return plain


def get(conn: Connection, kind: str, name: str | None = None) -> list[dict[str, Any]]:
    """Documents as they could be applied again, in the order of their names; JSON-safe.

    Raises:
        UsageError: no such kind. NotFoundError: no such name.
    """
    _known_kind(kind)
    found = _read(conn, kind, None if name is None else [name])
    if name is not None and not found:
        raise NotFoundError(_unknown(conn, kind, name))
    for document in found.values():  # names that it had are no part of what it is
        for thing in (document, *document.get("steps", ())):
            thing.pop("renamed_from", None)
    return [{"kind": kind, **document} for document in found.values()]


def _known_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(unknown("kind", kind, KINDS))


def _names(conn: Connection, kind: str) -> list[str]:
    table = KINDS[kind].table
    there = [table.c.deleted_at.is_(None)] if "deleted_at" in table.c else []
    return list(conn.scalars(select(table.c.name).where(*there).order_by(table.c.name)))


def _unknown(conn: Connection, kind: str, name: str, allowed: Collection[str] | None = None) -> str:
    allowed = _names(conn, kind) if allowed is None else allowed
    return unknown(kind, name, allowed, catalogue.called_now(conn, KINDS[kind].table, name))


def _columns(spec: type[Struct], table: Table) -> dict[str, Column[Any]]:
    """By key of a document, the column it goes to."""
    found = {}
    for f in structs.fields(spec):
        if f.name in table.c:
            found[f.encode_name] = table.c[f.name]
        elif f.name in KINDS:
            (found[f.encode_name],) = (c for c in table.c if target(c) is KINDS[f.name].table)
    return found


def _rows(
    conn: Connection, spec: type[Struct], table: Table, *where: ColumnElement[bool], order: Column[Any]
) -> list[tuple[Any, dict[str, Any]]]:
    """Rows of a table, each also in a document's words."""
    shown: list[Any] = []
    columns = _columns(spec, table)
    for key, column in columns.items():
        referred = target(column)
        named = (
            select(referred.c.name).where(referred.c.id == column).scalar_subquery() if referred is not None else column
        )
        shown.append(named.label(f"document_{key}"))
    rows = conn.execute(select(table, *shown).where(*where).order_by(order)).mappings()
    return [(row, {key: row[f"document_{key}"] for key in columns}) for row in rows]


def _read(conn: Connection, kind: str, names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """By name, documents without their kind."""
    if kind == "raw_data_package":
        return {name: _plain(package) for name, package in catalogue.read(conn, names).items()}
    table = KINDS[kind].table
    where = [] if names is None else [table.c.name.in_(names)]
    if kind == "pipeline":
        where.append(table.c.deleted_at.is_(None))
    things = {row["id"]: thing for row, thing in _rows(conn, KINDS[kind].spec, table, *where, order=table.c.name)}
    match kind:
        case "software":
            _read_versions(conn, things)
        case "config":
            _read_parameters(conn, things)
        case "grouping":
            for thing in things.values():
                thing["rules"] = [grouping.in_order(rule) for rule in thing["rules"]]
        case "scheduled_observation":
            for thing in things.values():
                _in_utc(thing)
        case "pipeline":
            _read_steps(conn, things)
    return {thing["name"]: thing for thing in things.values()}


def _in_utc(plan: dict[str, Any]) -> None:
    """Write the times of a scheduled observation in the one way in which they can be compared."""
    for key in ("planned_start", "planned_end"):
        time = plan[key] if isinstance(plan[key], datetime) else datetime.fromisoformat(plan[key])
        plan[key] = msgspec.to_builtins(_moment(time))


_Things = Mapping[int, dict[str, Any]]
"""Documents by the ids of their rows."""


def _read_versions(conn: Connection, software: _Things) -> None:
    table = schema.software_version
    for thing in software.values():
        thing["versions"] = []
    for row, version in _rows(conn, SoftwareVersion, table, table.c.software_id.in_(software), order=table.c.id):
        software[row["software_id"]]["versions"].append(version)


def _read_parameters(conn: Connection, configs: _Things) -> None:
    table = schema.config_revision
    other = table.alias()
    counts = (other.c.config_id == table.c.config_id) & (other.c.revoked_by == "")
    newest = select(func.max(other.c.revision)).where(counts).scalar_subquery()
    rows = select(table.c.config_id, table.c.parameters).where(
        table.c.config_id.in_(configs), table.c.revision == newest
    )
    for thing in configs.values():
        thing["parameters"] = {}
    for config_id, parameters in conn.execute(rows):
        configs[config_id]["parameters"] = parameters


def _read_steps(conn: Connection, pipelines: _Things) -> None:
    table, edge = schema.reduction_step, schema.step_dependency.c
    upstream = table.alias()
    depends = select(edge.step_id, upstream.c.name).join(upstream, upstream.c.id == edge.upstream_id)
    steps = {}
    for thing in pipelines.values():
        thing["steps"] = []
    mine = table.c.pipeline_id.in_(pipelines)
    for row, step in _rows(conn, Step, table, mine, table.c.active, order=table.c.position):
        steps[row["id"]] = step | {"depends_on": []}
        pipelines[row["pipeline_id"]]["steps"].append(steps[row["id"]])
    for step_id, name in conn.execute(depends.where(edge.step_id.in_(steps)).order_by(upstream.c.name)):
        steps[step_id]["depends_on"].append(name)


# --- comparing ---


class Difference(Struct, frozen=True):
    """One field that is, or will be, another; None where there is none."""

    field: str
    old: Any
    new: Any


class Change(Struct, frozen=True):
    """What applying a document does.

    Attributes:
        renamed_from: what it was called until now, if that changes. renamed_steps: of its steps the same, by new name.
    """

    kind: str
    name: str
    action: Literal["create", "update", "unchanged"]
    differences: tuple[Difference, ...] = ()
    renamed_from: str = ""
    renamed_steps: dict[str, str] = {}


_LISTS_BY = {"steps": "name", "versions": "version", "files": "name"}
"""Lists whose items are told apart by a key, not by their place."""


def _same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal as jsonb sees it: true is not 1, but 1e23 is the whole number."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in (a, b)):
        return type(a) is type(b) and bool(a == b)
    return Decimal(repr(a)) == Decimal(repr(b))


def _differences(old: Any, new: Any, path: str = "") -> Iterator[Difference]:
    by = _LISTS_BY.get(path)
    if by and isinstance(old, list) and isinstance(new, list):
        old, new = ({item[by]: item for item in items} for items in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif not _same(old, new):
        yield Difference(path, old, new)


class _Compared(Struct, frozen=True):
    """A document, what there is (empty if nothing), what is to be, and how they differ."""

    document: Document
    old: dict[str, Any]
    new: dict[str, Any]
    change: Change


_Planned = Mapping[tuple[str, str], Mapping[str, Any]]
"""By kind and name, what is to be; empty where it is not known."""


class _Renamed(Struct, frozen=True):
    """What was renamed, by new name the old one: things by kind, steps by the (new) name of their pipeline."""

    things: dict[str, dict[str, str]]
    steps: dict[str, dict[str, str]]
    faults: list[Fault]


def _rename(conn: Connection, documents: Documents) -> _Renamed:
    """Give things their new names, so that all else meets them under these."""
    done = _Renamed({}, {}, [])

    def rename(
        kind: str, at: Mapping[str, tuple[Document, Path, str | None]], *where: Any, live: Any
    ) -> dict[str, str]:
        asked = [(new, old) for new, (_, _, old) in at.items() if new and old]
        if not asked:
            return {}
        table = schema.reduction_step if kind == "step" else KINDS[kind].table
        rows = conn.execute(
            select(table.c.id, table.c.name, table.c.renamed_from, live.label("live")).where(*where)
        ).all()
        decided = renames(
            kind,
            asked,
            {r.name: r.renamed_from for r in rows if r.live},
            {r.name: r.renamed_from for r in rows if not r.live},
        )
        for new, fault in decided.faults.items():
            document, path, _ = at[new]
            done.faults.append(document.fault((*path, "renamed_from"), fault))
        _give_names(conn, table, {r.id: new for new, old in decided.todo.items() for r in rows if r.name == old})
        return decided.todo

    for kind, live in (("grouping", true()), ("pipeline", schema.pipeline.c.deleted_at.is_(None))):
        named = documents.of(kind)
        done.things[kind] = rename(kind, {n: (d, (), d.spec.renamed_from) for n, d in named.items()}, live=live)
    step, pipeline = schema.reduction_step.c, schema.pipeline.c
    for name, d in documents.of("pipeline").items():
        steps = {s.name: (d, ("steps", n), s.renamed_from) for n, s in enumerate(d.spec.steps)}
        mine = step.pipeline_id.in_(select(pipeline.id).where(pipeline.name == name))
        done.steps[name] = rename("step", steps, mine, live=step.active)
    return done


def _give_names(conn: Connection, table: Table, names: Mapping[int, str]) -> None:
    """Rename rows, by id; they may take over names of each other."""
    if names:
        # Names are compared row by row, so all of them make room first; nothing is called like that.
        room = update(table).where(table.c.id.in_(names)).values(name="/" + cast(table.c.id, Text))
        conn.execute(room)
        new = catalogue.records([{"id": i, "name": name} for i, name in names.items()], [table.c.id, table.c.name])
        conn.execute(update(table).where(table.c.id == new.c.id).values(name=new.c.name))


def _compare(conn: Connection, documents: Documents, location_id: int) -> list[_Compared]:
    renamed = _rename(conn, documents)
    own = _own_location(conn, documents, location_id)
    compared = []
    for kind in KINDS:
        named = documents.of(kind)
        if kind == "raw_data_package":
            named = {name: document for name, document in named.items() if document.sound}  # all parts are needed
            at = {name: document.spec.location for name, document in named.items()}
            there = {n: _plain(p) for n, p in catalogue.read(conn, list(at), at=at).items()}
        else:
            there = _read(conn, kind, list(named)) if named else {}
        for name, document in named.items():
            old = there.get(name, {})
            new = _completed(kind, _plain(document.spec), old, own)
            differences = tuple(_differences(old, new))
            action: Literal["create", "update", "unchanged"] = "update" if differences else "unchanged"
            change = Change(
                kind=kind,
                name=name,
                action=action if old else "create",
                differences=differences,
                renamed_from=renamed.things.get(kind, {}).get(name, ""),
                renamed_steps=renamed.steps.get(name, {}) if kind == "pipeline" else {},
            )
            compared.append(_Compared(document, old, new, change))
    faults = [
        *documents.faults,
        *renamed.faults,
        *_reference_faults(conn, documents),
        *_package_faults(conn, documents),
    ]
    # Of what has faults itself only the name is sure.
    planned = {(c.document.kind, c.change.name): c.new if c.document.sound else {} for c in compared}
    for kind, check in (
        ("site", _site_faults),
        ("location", _location_faults),
        ("software", _version_faults),
        ("config", _config_faults),
        ("pipeline", _pipeline_faults),
    ):
        faults += check(conn, [c for c in compared if c.document.kind == kind], planned)
    refuse(faults)
    return compared


def _own_location(conn: Connection, documents: Documents, location_id: int) -> str | None:
    table = schema.data_location.c
    planned = [name for name, document in documents.of("location").items() if document.spec.id == location_id]
    return next(iter(planned), None) or conn.scalar(select(table.name).where(table.id == location_id))


def _completed(kind: str, new: dict[str, Any], old: Mapping[str, Any], own: str | None) -> dict[str, Any]:
    """What a document leaves open, taken from what is there; and lists without order in one order."""
    match kind:
        case "location":
            new["id"] = new["id"] or old.get("id")
        case "software":
            had = {v["version"]: v for v in old.get("versions", ())}
            for version in new["versions"]:
                before = had.pop(version["version"], {})
                version["state"] = version["state"] or before.get("state", "active")
            new["versions"] = [*had.values(), *new["versions"]]
        case "scheduled_observation":
            new["state"] = new["state"] or old.get("state", "planned")
            _in_utc(new)
        case "grouping":
            _keep_renamed_from(new, old)
        case "pipeline":
            new["location"] = new["location"] or old.get("location", own)
            new["enabled"] = old.get("enabled", True) if new["enabled"] is None else new["enabled"]
            _keep_renamed_from(new, old)
            before = {step["name"]: step for step in old.get("steps", ())}
            for step in new["steps"]:
                _keep_renamed_from(step, before.get(step["name"], {}))
                step["group_by"], step["depends_on"] = sorted(step["group_by"]), sorted(step["depends_on"])
        case "raw_data_package":
            before, observation = old.get("executed_obs_unit", {}), new["executed_obs_unit"]
            new["executed_obs_unit"] = {k: before.get(k) if v is None else v for k, v in observation.items()}
            new["instrument"] = new["instrument"] or old.get("instrument")
    return new


def _keep_renamed_from(new: dict[str, Any], old: Mapping[str, Any]) -> None:
    """What was done stays known also when a document says it no more."""
    new["renamed_from"] = new["renamed_from"] or old.get("renamed_from", "")


def _references(spec: Struct, path: Path = ()) -> Iterator[tuple[Path, str, str]]:
    """Everything a document names: where, its kind, its name."""
    for f in structs.fields(spec):
        value, here = getattr(spec, f.name), (*path, f.encode_name)
        if f.name in KINDS and value is not None:
            yield here, f.name, value
        elif isinstance(value, tuple):
            for n, item in enumerate(value):
                if isinstance(item, Struct):
                    yield from _references(item, (*here, n))
                elif (kind := f.name.removesuffix("s")) in KINDS:
                    yield (*here, n), kind, item


def _reference_faults(conn: Connection, documents: Documents) -> Iterator[Fault]:
    """Names that nothing has; those that something unreadable may have are left for when it can be read."""
    known: dict[str, list[str]] = {}
    for document in documents.items:
        if document.kind == "raw_data_package":
            continue  # what it names is created with it
        for path, kind, name in _references(document.spec):
            if kind not in known:
                known[kind] = sorted({*_names(conn, kind), *documents.of(kind)})
            unsaid = not name and not document.sound  # it has a fault of its own there
            if name not in known[kind] and not unsaid and not any(name in text for text in documents.unread):
                yield document.fault(path, _unknown(conn, kind, name, known[kind]))


def _package_faults(conn: Connection, documents: Documents) -> Iterator[Fault]:
    packages = [p for p in documents.of("raw_data_package").values() if p.sound]
    if packages:
        planned = {kind.table.name: documents.of(name) for name, kind in KINDS.items()}
        for n, message in catalogue.check(conn, [p.spec for p in packages], planned=planned):
            yield packages[n].fault((), message)


def _site_faults(conn: Connection, sites: Sequence[_Compared], _: _Planned) -> Iterator[Fault]:
    """Nights are worked out by the database, which must know the time zone too."""
    changed = {c.new["time_zone"]: c for c in sites if c.new["time_zone"] != c.old.get("time_zone", "UTC")}
    known = text("SELECT name FROM pg_timezone_names WHERE name = ANY(:names)")
    there = set(conn.scalars(known, {"names": list(changed)})) if changed else set()
    for zone, c in changed.items():
        if c.document.sound and zone not in there:
            yield c.document.fault(("time_zone",), f"time zone {zone!r} is not known to this Postgres")


def _location_faults(conn: Connection, locations: Sequence[_Compared], _: _Planned) -> Iterator[Fault]:
    table = schema.data_location.c
    taken = {i: name for name, i in conn.execute(select(table.name, table.id))} if locations else {}
    for c in locations:
        i, name = c.new["id"], c.change.name
        if c.old and i != c.old["id"]:
            yield c.document.fault(("id",), f"location {name!r} has the id {c.old['id']}, which cannot change")
        elif i is not None and taken.setdefault(i, name) != name:
            yield c.document.fault(("id",), f"id {i} belongs to location {taken[i]!r}")


def _version_faults(conn: Connection, software: Sequence[_Compared], _: _Planned) -> Iterator[Fault]:
    """What a version runs is part of the history of its runs."""
    version, run = schema.software_version.c, schema.run.c
    for c in software:
        if not c.document.sound:
            continue  # what could not be read has not changed for that
        had = {v["version"]: v for v in c.old.get("versions", ())}
        for n, v in enumerate(c.document.spec.versions):
            new = next(w for w in c.new["versions"] if w["version"] == v.version)
            before = had.get(v.version, new)
            changed = [key for key in ("command", "image", "sif") if not _same(before[key], new[key])]
            used = select(run.id).where(
                run.software_version_id == version.id,
                version.version == v.version,
                version.software_id == schema.software.c.id,
                schema.software.c.name == c.change.name,
            )
            if changed and conn.scalar(used.limit(1)) is not None:
                yield c.document.fault(
                    ("versions", n, changed[0]),
                    f"version {v.version} of {c.change.name!r} has been used by a run: its {', '.join(changed)}"
                    " cannot change any more; give a new version",
                )


def _config_faults(conn: Connection, configs: Sequence[_Compared], _: _Planned) -> Iterator[Fault]:
    """What was revoked does not come back under another number."""
    revision = schema.config_revision.c
    for c in configs:
        if not c.document.sound:
            continue
        same = select(revision.revision, revision.revoked_by, revision.revoked_reason).where(
            revision.config_id == schema.config.c.id,
            schema.config.c.name == c.change.name,
            revision.hash == _parameters_hash(c.new["parameters"]),
            revision.revoked_by != "",
        )
        for n, by, reason in conn.execute(same.order_by(revision.revision.desc()).limit(1)):
            yield c.document.fault(
                ("parameters",),
                f"these parameters of {c.change.name!r} are those of revision {n}, revoked by {by}: {reason};"
                f" `wfm revoke config {c.change.name} {n} --restore` undoes that",
            )


def _pipeline_faults(conn: Connection, pipelines: Sequence[_Compared], planned: _Planned) -> Iterator[Fault]:
    def thing(kind: str, name: str) -> Mapping[str, Any]:
        return planned[kind, name] if (kind, name) in planned else _read(conn, kind, [name]).get(name, {})

    for c in pipelines:
        yield from _campaign_faults(conn, c)
        name, location = c.change.name, c.new["location"]
        if location is None:
            yield c.document.fault(("location",), "location: name one; this instance's own is not in the catalogue")
        elif thing("location", location).get("type", "processing") != "processing":
            kind = thing("location", location)["type"]
            yield c.document.fault(("location",), f"location {location!r} is of type {kind}; allowed: processing")
        home = _home_of_runs(conn, name)
        if home not in (None, location):
            yield c.document.fault(
                ("location",), f"pipeline {name!r} has results at {home!r} and cannot move to {location!r}"
            )
        for n, step in enumerate(c.document.spec.steps):
            software = thing("software", step.software)
            versions = [v["version"] for v in software.get("versions", ())]
            pinned = step.version_policy is VersionPolicy.PINNED and step.version
            if software and pinned and step.version not in versions:
                message = unknown(f"version of {step.software!r}", step.version, versions)
                yield c.document.fault(("steps", n, "version"), message)


_CAMPAIGN_MAY_CHANGE = {"description", "enabled", "priority", "renamed_from"}


def _campaign_faults(conn: Connection, c: _Compared) -> Iterator[Fault]:
    p = schema.pipeline.c
    changed = {d.field.split(".")[0] for d in c.change.differences} - _CAMPAIGN_MAY_CHANGE
    frozen = select(p.id).where(p.name == c.change.name, p.frozen_at.is_not(None))
    if changed and conn.scalar(frozen) is not None:
        message = f"pipeline {c.change.name!r} is a campaign: its {', '.join(sorted(changed))} cannot change any more"
        yield c.document.fault((), f"{message}; `wfm campaign create` makes another one")


def _home_of_runs(conn: Connection, pipeline: str) -> str | None:
    """The location of a pipeline (also a deleted one) that has runs."""
    p, location = schema.pipeline.c, schema.data_location
    has_runs = select(schema.run.c.id).where(schema.run.c.pipeline_id == p.id).exists()
    home = select(location.c.name).join(schema.pipeline, p.location_id == location.c.id)
    return conn.scalar(home.where(p.name == pipeline, has_runs))


# --- applying ---


class Applied(Struct, frozen=True):
    """What `apply` did; the events are to be published after the commit."""

    changes: list[Change]
    pipeline_ids_changed: list[int]
    event_ids: list[int]


def apply(conn: Connection, documents: Documents, *, location_id: int, actor: str, reason: str = "") -> Applied:
    """Make the database say what the documents say; applying the same again changes nothing.

    What gets another name stays what it is: nothing that was made from it, or is to be, becomes another thing.

    Every pipeline that changed, or that uses something that changed, gets a ``pipeline.changed`` event.

    Args:
        location_id: the instance's own location, for pipelines that name none.

    Raises:
        DocumentError: with every fault of the documents, and everything that does not fit the database; nothing was
            written.
    """
    lock(conn)
    with conn.begin_nested():  # names are changed before the faults are known
        compared = _compare(conn, documents, location_id)
    changes = [c.change for c in compared]
    for kind in KINDS:
        todo = [c for c in compared if c.document.kind == kind and c.change.action != "unchanged"]
        if todo and kind != "raw_data_package":
            _write(conn, kind, todo)
    if any(c.kind == "scheduled_observation" for c in changes):
        plan.look_again(conn)
    affected = _affected(conn, changes)
    events = [(p.location_id, PipelineChanged(pipeline=p.name, pipeline_id=p.id)) for p in affected]
    event_ids = emit(conn, events, actor=actor, reason=reason)
    packages = [c.document.spec for c in compared if c.document.kind == "raw_data_package"]
    if packages:
        event_ids += catalogue.register(conn, packages, actor=actor, reason=reason).event_ids
    return Applied(changes, [p.id for p in affected], event_ids)


def _write(conn: Connection, kind: str, todo: Sequence[_Compared]) -> None:
    spec, table = KINDS[kind].spec, KINDS[kind].table
    rows = _values(conn, spec, table, [c.new for c in todo])
    if kind == "location":
        # Chosen ids and ids of the sequence would collide, so all are chosen here; `lock` makes that safe.
        last = conn.scalar(select(func.coalesce(func.max(table.c.id), 0))) or 0
        last = max([last, *(row["id"] or 0 for row in rows)])
        for row in rows:
            row["id"] = row["id"] or (last := last + 1)
    if kind == "pipeline":
        rows = [{**row, "deleted_at": None} for row in rows]
    if kind == "scheduled_observation":
        rows = [{**row, "arrived_at": None} for row in rows]
    ids = upsert(conn, table, rows)
    match kind:
        case "software":
            version = schema.software_version
            for i, c in zip(ids, todo, strict=True):
                versions = _values(conn, SoftwareVersion, version, c.new["versions"])
                upsert(conn, version, [{"software_id": i, **v} for v in versions], ("software_id", "version"))
        case "config":
            for i, c in zip(ids, todo, strict=True):
                if not c.old or not _same(c.old["parameters"], c.new["parameters"]):
                    _write_revision(conn, i, c.new["parameters"])
        case "pipeline":
            for i, c in zip(ids, todo, strict=True):
                _write_steps(conn, i, c.new["steps"])


def _values(
    conn: Connection, spec: type[Struct], table: Table, things: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of a table, by column name: names become ids."""
    columns = _columns(spec, table)
    ids: dict[str, dict[str, int]] = {}
    for key, column in columns.items():
        referred = target(column)
        if referred is not None:
            named = referred.c.name.in_({thing[key] for thing in things} - {None})
            ids[key] = dict(conn.execute(select(referred.c.name, referred.c.id).where(named)).all())
    return [
        {c.name: ids[key].get(thing[key]) if key in ids else thing[key] for key, c in columns.items()}
        for thing in things
    ]


def _write_revision(conn: Connection, config_id: int, parameters: Mapping[str, Any]) -> None:
    table = schema.config_revision
    last = select(func.coalesce(func.max(table.c.revision), 0) + 1).where(table.c.config_id == config_id)
    conn.execute(
        insert(table).values(
            config_id=config_id,
            revision=last.scalar_subquery(),
            parameters=parameters,
            hash=_parameters_hash(parameters),
        )
    )


def _parameters_hash(parameters: Mapping[str, Any]) -> str:
    text = json.dumps(parameters, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _write_steps(conn: Connection, pipeline_id: int, steps: Sequence[Mapping[str, Any]]) -> None:
    table, edge = schema.reduction_step, schema.step_dependency
    steps = _topological(steps)
    mine = table.c.pipeline_id == pipeline_id
    taken = list(conn.scalars(select(table.c.identity).where(mine)))
    upstream = {name for step in steps for name in step["depends_on"]}
    rows = [
        {
            **row,
            "pipeline_id": pipeline_id,
            "identity": first_identity(row["name"], taken),
            "position": n,
            "dims": grouping.canonical(row["group_by"]),
            "final": row["name"] not in upstream,
            "active": True,
        }
        for n, row in enumerate(_values(conn, Step, table, steps))
    ]
    written = upsert(conn, table, rows, ("pipeline_id", "name"), first=("identity",))
    ids = dict(zip((row["name"] for row in rows), written, strict=True))
    gone = update(table).where(mine, table.c.name.not_in(ids))
    conn.execute(gone.values(active=False, paused_by="", paused_reason=""))
    conn.execute(sql_delete(edge).where(edge.c.step_id.in_(select(table.c.id).where(mine))))
    edges = [{"step_id": ids[step["name"]], "upstream_id": ids[name]} for step in steps for name in step["depends_on"]]
    if edges:
        conn.execute(insert(edge), edges)


def _topological(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Steps after those they depend on, otherwise in the order given; `load` has excluded circles."""
    ordered: list[Mapping[str, Any]] = []
    left = list(steps)
    while left:
        done = {step["name"] for step in ordered}
        ordered.append(next(step for step in left if done.issuperset(step["depends_on"])))
        left.remove(ordered[-1])
    return ordered


def _affected(conn: Connection, changes: Sequence[Change]) -> Sequence[Any]:
    """Id, name and location of the pipelines that changed or use what changed."""
    names = defaultdict(list)
    for c in changes:
        if c.action != "unchanged":
            names[c.kind].append(c.name)
    p, step = schema.pipeline.c, schema.reduction_step.c

    def ids(kind: str) -> Any:
        table = KINDS[kind].table
        return select(table.c.id).where(table.c.name.in_(names[kind]))

    using = step.software_id.in_(ids("software")) | step.config_id.in_(ids("config"))
    uses = p.id.in_(select(step.pipeline_id).where(step.active, using)) | p.grouping_id.in_(ids("grouping"))
    affected: ColumnElement[bool] = p.name.in_(names["pipeline"]) | uses
    seen = {k for k, kind in KINDS.items() if kind.table.name in grouping.TABLES} - {"raw_data_package"}
    if any(c.action == "update" and c.kind in seen for c in changes):
        affected = true()  # any rule may look at any entry of the catalogue
    live = select(p.id, p.name, p.location_id).where(p.deleted_at.is_(None), affected)
    return conn.execute(live.order_by(p.id)).all()


# --- deleting ---

_OWNED = {
    "software": (schema.software_version,),
    "config": (schema.config_revision,),
    "raw_data_package": (schema.raw_data_file, schema.physical_copy),
}
"""Rows that go with the thing they belong to."""


def delete(conn: Connection, kind: str, name: str, *, actor: str, reason: str = "") -> list[int]:
    """Delete a thing that nothing uses. A pipeline is only marked: its steps, runs and products stay as history.

    Returns:
        ids of the events to publish after the commit.

    Raises:
        UsageError: no such kind. NotFoundError: no such name.
        RefusedError: it is used (the text lists by what), or the pipeline has active runs.
    """
    _known_kind(kind)
    lock(conn)
    table = KINDS[kind].table
    if name not in (names := _names(conn, kind)):
        raise NotFoundError(_unknown(conn, kind, name, names))
    i = conn.execute(select(table.c.id).where(table.c.name == name).with_for_update()).scalar_one()
    if kind == "pipeline":
        return _delete_pipeline(conn, i, name, actor, reason)
    owned = {t: next(c for c in t.c if target(c) is table) for t in _OWNED.get(kind, ())}
    things = {table: [i], **{t: list(conn.scalars(select(t.c.id).where(c == i))) for t, c in owned.items()}}
    users = list(_users(conn, things, owned))
    if users:
        raise RefusedError(f"{kind} {name!r} is used by {'; '.join(users)}; what is used, or was, stays")
    for t in reversed(things):
        conn.execute(sql_delete(t).where(t.c.id.in_(things[t])))
    return []


def _delete_pipeline(conn: Connection, i: int, name: str, actor: str, reason: str) -> list[int]:
    p, step, run = schema.pipeline, schema.reduction_step, schema.run.c
    active = conn.scalar(select(func.count()).where(run.pipeline_id == i, run.state.in_(ACTIVE_STATES)))
    if active:
        hint = "cancel them, or disable the pipeline and let them end"
        raise RefusedError(f"pipeline {name!r} has {active} active runs: {hint}, then delete it")
    quiet = {"paused_by": "", "paused_reason": ""}
    conn.execute(update(step).where(step.c.pipeline_id == i).values(active=False, **quiet))
    fill = schema.backfill
    going_on = update(fill).where(fill.c.pipeline_id == i, fill.c.finished_at.is_(None))
    conn.execute(going_on.values(state=BackfillState.CANCELLED, finished_at=func.now(), **quiet))
    marked = update(p).where(p.c.id == i).values(deleted_at=func.now(), **quiet).returning(p.c.location_id)
    event = PipelineChanged(pipeline=name, pipeline_id=i)
    return emit(conn, [(conn.execute(marked).scalar_one(), event)], actor=actor, reason=reason)


def _users(
    conn: Connection, things: Mapping[Table, Sequence[int]], owned: Mapping[Table, Column[Any]]
) -> Iterator[str]:
    """What refers to some rows, by table: names where there are some, else how many."""
    for table in schema.metadata.sorted_tables:
        refers = [
            c.in_(ids) for t, ids in things.items() for c in table.c if target(c) is t and c is not owned.get(table)
        ]
        count = conn.scalar(select(func.count()).select_from(table).where(or_(*refers))) if refers else 0
        if not count:
            continue
        if "name" not in table.c:
            yield f"{count} × {table}"
            continue
        label: ColumnElement[str] = table.c.name
        if table is schema.reduction_step:
            pipeline = select(schema.pipeline.c.name).where(schema.pipeline.c.id == table.c.pipeline_id)
            label = pipeline.scalar_subquery() + "/" + table.c.name
        named = conn.scalars(select(label).where(or_(*refers)).order_by(label).limit(5))
        yield f"{table} {', '.join(named)}" + (f" and {count - 5} more" if count > 5 else "")
