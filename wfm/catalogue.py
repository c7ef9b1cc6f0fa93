"""Raw data packages into the catalogue: checked as a whole, written as a whole, announced as a whole."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct, structs
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Table,
    TableValuedAlias,
    Text,
    and_,
    any_,
    cast,
    delete,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy import column as sql_column
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert

from wfm.decide import item_hash
from wfm.errors import DocumentError, NotFoundError
from wfm.events import ENTRANCES, DataArrived, Event
from wfm.grouping import storable, unknown
from wfm.schema import (
    data_location,
    executed_obs_unit,
    instrument,
    instrument_module,
    obs_unit,
    observing_program,
    physical_copy,
    pipeline,
    raw_data_file,
    raw_data_package,
    reduction_step,
    source,
)
from wfm.store import encode, insert_events

LABEL = r"^[^\s\x00-\x1f\x7f]([^\x00-\x1f\x7f]{0,198}[^\s\x00-\x1f\x7f])?\Z"
"""What a name in the catalogue looks like."""
LABEL_TEXT = "a name: 1 to 200 characters on one line, no space at its ends"

PackageState = Literal["waiting", "transferring", "archived", "failed"]

READABLE = ("present", "staged")
"""Statuses of a physical copy that a job can read."""

REPUBLISH_SECONDS = 60.0
"""The caller publishes at once after its commit; this is when the relay looks whether that worked."""


class FileIn(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of a package.

    Attributes:
        name: path below the package's directory. size: bytes. checksum: ``sha256:`` and 64 hexadecimal digits.
    """

    name: str
    size: int
    checksum: str


class ExecutedObsUnitIn(Struct, frozen=True, forbid_unknown_fields=True):
    """The observation that made a package. What is None stays as the catalogue has it.

    `scheduled` names the scheduled observation that it carries out; without it, that is found by time (`wfm.plan`).
    A new one needs its `obs_unit`; obs_unit, source and program are created when the catalogue lacks them.
    What the catalogue has already must agree.
    """

    name: str
    obs_unit: str | None = None
    source: str | None = None
    program: str | None = None
    line: str | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    scheduled: str | None = None


class PackageIn(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A raw data package and where it lies.

    Attributes:
        instrument: needed only where `module` is new.
        location: name of a data location. path: the package's directory there, relative to its root or absolute.
    """

    name: str
    executed_obs_unit: ExecutedObsUnitIn
    module: str
    instrument: str | None = None
    state: PackageState = "archived"
    metadata: dict[str, Any] = {}
    files: tuple[FileIn, ...]
    location: str
    path: str

    @property
    def item(self) -> int:
        """The package's term in the digest of a unit: 128 bits over its name and its files' checksums."""
        files = sorted((f.name, f.checksum) for f in self.files)
        return item_hash("package", self.name, *(part for file in files for part in file))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


class Registered(Struct, frozen=True):
    """What became of the packages: how many were new, changed, unchanged; the events to publish after the commit."""

    new: int
    changed: int
    unchanged: int
    event_ids: list[int]


Fault = tuple[int, str]
"""Index of the package, and what is wrong with it."""


def lock(conn: Connection) -> None:
    """Let one transaction at a time write catalogue and definitions, so that what was checked still holds."""
    conn.execute(text("SELECT pg_advisory_xact_lock(hashtext('wfm:' || current_schema()))"))


def emit(conn: Connection, events: Sequence[tuple[int, Event]], *, actor: str, reason: str = "") -> list[int]:
    """Write ledger rows for events that other things than runs cause.

    Args:
        events: each with the id of its processing location.

    Returns:
        the ids of the rows, to be published after the commit.
    """
    rows = []
    for location, what in events:
        body = msgspec.to_builtins(what)
        about = {"loc": location, "type": body["type"], "recipient": ENTRANCES.get(body["type"], ""), "body": body}
        rows.append({**about, "actor": actor, "reason": reason})
    return [row.id for row in insert_events(conn, rows, REPUBLISH_SECONDS)]


# --- checks ---


def package_faults(package: PackageIn) -> list[str]:
    """Everything that is wrong with one package by itself."""
    o = package.executed_obs_unit
    names = {
        "name": package.name,
        "executed_obs_unit.name": o.name,
        "executed_obs_unit.obs_unit": o.obs_unit,
        "executed_obs_unit.source": o.source,
        "executed_obs_unit.program": o.program,
        "executed_obs_unit.scheduled": o.scheduled,
        "module": package.module,
        "instrument": package.instrument,
    }
    faults = [
        f"{field}: {name!r} is not {LABEL_TEXT}"
        for field, name in names.items()
        if name is not None and not (re.match(LABEL, name) and storable(name))
    ]
    if package.state not in get_args(PackageState):
        faults.append(unknown("state", package.state, get_args(PackageState)))
    if o.line is not None and not storable(o.line):
        faults.append(f"executed_obs_unit.line: {o.line!r} has characters that Postgres cannot store")
    started, ended = _utc(o.started_at), _utc(o.ended_at)
    if started and ended and ended < started:
        faults.append(f"executed_obs_unit: ended_at {o.ended_at} lies before started_at {o.started_at}")
    if not _is_json(package.metadata):
        faults.append("metadata: values must be JSON: finite numbers, no NUL characters")
    if not storable(package.path) or not package.path or ".." in package.path.split("/"):
        faults.append(f"path: {package.path!r} is not a directory: give it without '..'")
    if not package.files:
        faults.append("files: a package needs at least one file")
    faults += [f"files: {n!r} is named {c} times" for n, c in Counter(f.name for f in package.files).items() if c > 1]
    for f in package.files:
        if not storable(f.name) or len(f.name.encode()) > 1000 or not all(p.strip(".") for p in f.name.split("/")):
            faults.append(f"files: name {f.name!r} is not a path below the package's directory (without '.' and '..')")
        if not 0 <= f.size < 1 << 53:
            faults.append(f"files: size {f.size} of {f.name!r} is not a number of bytes")
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", f.checksum):
            faults.append(f"files: checksum {f.checksum!r} of {f.name!r} is not sha256: and 64 hexadecimal digits")
    return faults


def _is_json(value: object) -> bool:
    match value:
        case dict():
            return all(isinstance(k, str) and storable(k) and _is_json(v) for k, v in value.items())
        case list() | tuple():
            return all(map(_is_json, value))
        case str():
            return storable(value)
        case float():
            return math.isfinite(value)
        case _:
            return value is None or isinstance(value, int)


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time and time.tzinfo is None else time


# The catalogue entries that packages name, in the order of their references, with what a package can say of them.
_ENTRIES: dict[Table, tuple[Column[Any], ...]] = {
    instrument: (),
    instrument_module: (instrument_module.c.instrument_id,),
    source: (),
    observing_program: (),
    obs_unit: (obs_unit.c.source_id, obs_unit.c.observing_program_id, obs_unit.c.line),
    executed_obs_unit: (
        executed_obs_unit.c.obs_unit_id,
        executed_obs_unit.c.started_at,
        executed_obs_unit.c.ended_at,
        executed_obs_unit.c.scheduled,
    ),
}
_EMPTY = (None, "")


class _Entry(Struct):
    """What the packages say of one entry, references as names; `package` is the index of the first that names it."""

    package: int
    values: dict[Column[Any], Any]


_Entries = dict[Table, dict[str, _Entry]]


def check(
    conn: Connection, packages: Sequence[PackageIn], *, planned: Mapping[str, Collection[str]] | None = None
) -> list[Fault]:
    """Every fault of some packages, by themselves, among each other and against the catalogue.

    Args:
        planned: by table, the names of entries that will have been written before the packages are registered.
    """
    return _examine(conn, packages, planned or {})[1]


def _examine(
    conn: Connection, packages: Sequence[PackageIn], planned: Mapping[str, Collection[str]]
) -> tuple[_Entries, list[Fault]]:
    faults = [(n, f"package {p.name!r}: {fault}") for n, p in enumerate(packages) for fault in package_faults(p)]
    first: dict[str, int] = {}
    faults += [
        (n, f"package {p.name!r} comes twice") for n, p in enumerate(packages) if first.setdefault(p.name, n) != n
    ]
    locations = sorted({*conn.scalars(select(data_location.c.name)), *planned.get(data_location.name, ())})
    faults += [
        (n, f"package {p.name!r}: {unknown('location', p.location, locations)}")
        for n, p in enumerate(packages)
        if p.location not in locations
    ]
    entries = _entries(packages, faults)
    for table, named in entries.items():
        there = _existing(conn, table, named)
        for name, entry in named.items():
            if name not in planned.get(table.name, ()):
                faults += [(entry.package, f"{table} {name!r}{f}") for f in _entry_faults(entry, there.get(name))]
    return entries, sorted(faults, key=lambda fault: fault[0])


def _entry_faults(entry: _Entry, there: Mapping[str, Any] | None) -> Iterator[str]:
    for column, value in entry.values.items():
        attribute = _attribute(column)
        if there is None:
            if value is None and column.foreign_keys and not column.nullable:
                yield f" is not in the catalogue; give its {attribute} to create it"
        elif value is not None and there[attribute] not in (*_EMPTY, value):
            yield f": {attribute} is {_shown(there[attribute])} in the catalogue, not {_shown(value)}"


def _entries(packages: Sequence[PackageIn], faults: list[Fault]) -> _Entries:
    entries: _Entries = {table: {} for table in _ENTRIES}

    def name(n: int, table: Table, name: str | None, *values: Any) -> None:
        if name is None:
            return
        entry = entries[table].setdefault(name, _Entry(n, dict.fromkeys(_ENTRIES[table])))
        for column, value in zip(_ENTRIES[table], values, strict=True):
            other = entry.values[column]
            if value is not None and other not in (None, value):
                conflict = f"is {_shown(value)}, but {_shown(other)} in another package"
                faults.append((n, f"{table} {name!r}: {_attribute(column)} {conflict}"))
            entry.values[column] = value if other is None else other

    for n, p in enumerate(packages):
        o = p.executed_obs_unit
        name(n, instrument, p.instrument)
        name(n, instrument_module, p.module, p.instrument)
        name(n, source, o.source)
        name(n, observing_program, o.program)
        name(n, obs_unit, o.obs_unit, o.source, o.program, o.line)
        name(n, executed_obs_unit, o.name, o.obs_unit, _utc(o.started_at), _utc(o.ended_at), o.scheduled)
    return entries


def called_now(conn: Connection, table: Table, name: str, within: str | None = None) -> str:
    """The name of what was last renamed from `name`; empty if there is none. Of steps, in this pipeline or any."""
    if "renamed_from" not in table.c:
        return ""
    found = select(table.c.name).where(table.c.renamed_from == name)
    if table is reduction_step:
        found = found.where(table.c.active)
        if within is not None:
            found = found.where(table.c.pipeline_id.in_(select(pipeline.c.id).where(pipeline.c.name == within)))
    if table is pipeline:
        found = found.where(table.c.deleted_at.is_(None))
    return conn.scalar(found.order_by(table.c.id).limit(1)) or ""


def target(column: Column[Any]) -> Table | None:
    """The table that a foreign key refers to."""
    return next((key.column.table for key in column.foreign_keys), None)


def _attribute(column: Column[Any]) -> str:
    return column.name.removesuffix("_id") if column.foreign_keys else column.name


def _shown(value: object) -> str:
    return repr(str(value))


def _existing(conn: Connection, table: Table, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """By name, the rows of some entries: their columns, and beside each reference the name it stands for."""
    shown: list[Any] = [table.c.id, table.c.name, *_ENTRIES[table]]
    for column in _ENTRIES[table]:
        if (referred := target(column)) is not None:
            name = select(referred.c.name).where(referred.c.id == column).scalar_subquery()
            shown.append(name.label(_attribute(column)))
    rows = conn.execute(select(*shown).where(table.c.name == any_(literal(list(names), ARRAY(Text)))))
    return {row["name"]: dict(row) for row in rows.mappings()}


# --- writing ---


def upsert(
    conn: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    key: Sequence[str] = ("name",),
    where: ColumnElement[bool] | None = None,
    first: Sequence[str] = (),
) -> list[int]:
    """Insert rows, or update those that have the same key, in one statement.

    Args:
        rows: by column name; all with the same columns.
        key: columns of a unique index. where: its condition, if it is partial.
        first: columns that stay as they were first written.

    Returns:
        the ids of the rows, in the order of `rows`.
    """
    if not rows:
        return []
    given = records(rows, [table.c[name] for name in rows[0]])
    statement = insert(table).from_select(list(rows[0]), select(*given.c))
    sets = {name: statement.excluded[name] for name in rows[0] if name not in (*key, *first)} or {
        key[0]: statement.excluded[key[0]]
    }
    written = conn.execute(
        statement.on_conflict_do_update(index_elements=key, index_where=where, set_=sets).returning(
            table.c.id, *(table.c[k] for k in key)
        )
    )
    ids = {tuple(found): i for i, *found in written}
    return [ids[tuple(row[k] for k in key)] for row in rows]


def records(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column[Any]]) -> TableValuedAlias:
    """Rows as a table: one parameter, however many they are."""
    return (
        func.jsonb_to_recordset(cast(literal(encode(rows), Text), JSONB))
        .table_valued(*(sql_column(c.name, c.type) for c in columns))
        .render_derived(with_types=True)
    )


def register(
    conn: Connection, packages: Sequence[PackageIn], *, location_ids: Sequence[int] = (), actor: str, reason: str = ""
) -> Registered:
    """Register packages, with the catalogue entries they name, in a fixed number of statements.

    Registering the same again changes nothing. A package counts as changed when its files, metadata, state,
    observation or copy differ. One ``data.arrived`` for each new or changed package (and for each whose observation
    the catalogue now knows more about) is written for each location that has an enabled pipeline.

    Args:
        location_ids: further locations to tell.

    Raises:
        DocumentError: with every fault of every package; nothing was written.
    """
    lock(conn)
    entries, faults = _examine(conn, packages, {})
    if faults:
        raise DocumentError([message for _, message in faults])
    ids, siblings = _write_entries(conn, entries)
    new, changed = _write_packages(conn, packages, ids)
    at = select(pipeline.c.location_id).where(pipeline.c.enabled, pipeline.c.deleted_at.is_(None))
    locations = sorted({*location_ids, *conn.scalars(at)})
    touched = sorted({*new, *changed, *siblings})
    events = [(location, DataArrived(raw_data_package=i)) for location in locations for i in touched]
    event_ids = emit(conn, events, actor=actor, reason=reason)
    return Registered(len(new), len(changed), len(packages) - len(new) - len(changed), event_ids)


def _write_entries(conn: Connection, entries: _Entries) -> tuple[dict[Table, dict[str, int]], list[int]]:
    """Create what is missing and fill what was empty.

    Returns:
        ids by table and name; the packages that were there already and whose observation was filled.
    """
    ids: dict[Table, dict[str, int]] = {}
    filled: dict[Table, list[int]] = {}
    for table, named in entries.items():
        there = _existing(conn, table, named)
        rows = {}
        for name, entry in named.items():
            old = there.get(name, {})
            row = {c.name: _filled(c, old.get(c.name), value, ids) for c, value in entry.values.items()}
            if name not in there or any(row[c] != old[c] for c in row):
                rows[name] = {"name": name, **row}
        written = dict(zip(rows, upsert(conn, table, list(rows.values())), strict=True))
        ids[table] = {name: old["id"] for name, old in there.items()} | written
        filled[table] = [i for name, i in written.items() if name in there]
    observations = select(raw_data_package.c.id).join(executed_obs_unit)
    touched = executed_obs_unit.c.id.in_(filled[executed_obs_unit]) | executed_obs_unit.c.obs_unit_id.in_(
        filled[obs_unit]
    )
    return ids, list(conn.scalars(observations.where(touched)))


def _filled(column: Column[Any], old: Any, value: Any, ids: Mapping[Table, Mapping[str, int]]) -> Any:
    """What a column of an entry becomes: what is there stays, what is empty takes the given value."""
    if old not in _EMPTY:
        return old
    referred = target(column)
    if value is not None and referred is not None:
        return ids[referred][value]
    return "" if value is None and not column.nullable else value


def _write_packages(
    conn: Connection, packages: Sequence[PackageIn], ids: Mapping[Table, Mapping[str, int]]
) -> tuple[list[int], list[int]]:
    """Write the packages that differ from the catalogue; returns the ids of the new and of the changed ones."""
    locations = {name: i for i, name in conn.execute(select(data_location.c.id, data_location.c.name))}
    wanted = {
        p.name: {
            "name": p.name,
            "executed_obs_unit_id": ids[executed_obs_unit][p.executed_obs_unit.name],
            "instrument_module_id": ids[instrument_module][p.module],
            "state": p.state,
            "size": p.size,
            "item": str(p.item),
            "metadata": p.metadata,
        }
        for p in packages
    }
    copies = {p.name: {"location_id": locations[p.location], "path": p.path} for p in packages}
    differs = _differences(conn, wanted, copies)
    rows = [wanted[name] for name, d in differs.items() if d.id is None or d.facts or d.content]
    written = dict(zip((row["name"] for row in rows), upsert(conn, raw_data_package, rows), strict=True))
    package_ids = {name: d.id for name, d in differs.items()} | written

    rewritten = [d.id for d in differs.values() if d.id and d.content]
    if rewritten:
        # Copies elsewhere hold the old content.
        stale = physical_copy.c.package_id.in_(rewritten) & physical_copy.c.status.in_(READABLE)
        conn.execute(update(physical_copy).where(stale).values(status="deletion_possible"))
        conn.execute(delete(raw_data_file).where(raw_data_file.c.package_id.in_(rewritten)))
    files = [
        {"package_id": package_ids[p.name], **structs.asdict(f)}
        for p in packages
        if differs[p.name].content
        for f in p.files
    ]
    upsert(conn, raw_data_file, files, ("package_id", "name"))
    upsert(
        conn,
        physical_copy,
        [
            {"package_id": package_ids[name], **copies[name], "status": "present"}
            for name, d in differs.items()
            if d.content or d.copy
        ],
        ("package_id", "location_id"),
        physical_copy.c.package_id.is_not(None),
    )
    new = [package_ids[name] for name, d in differs.items() if d.id is None]
    changed = [d.id for d in differs.values() if d.id and (d.content or d.facts or d.copy)]
    return new, changed


def _differences(
    conn: Connection, wanted: Mapping[str, Mapping[str, Any]], copies: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """By name: id (None for a new package), and whether its content, its other facts and its copy differ.

    Postgres compares, since its jsonb knows which JSON values are equal.
    """
    p, c = raw_data_package.c, physical_copy.c
    rows = [{**row, **copies[name]} for name, row in wanted.items()]
    columns = [*(p[n] for n in next(iter(wanted.values()), {})), c.location_id, c.path]
    g = records(rows, columns).c

    def differ(*names: str) -> ColumnElement[bool]:
        return or_(*(p[n].is_distinct_from(g[n]) for n in names))

    statement = (
        select(
            g.name,
            p.id,
            differ("item", "size").label("content"),
            differ("executed_obs_unit_id", "instrument_module_id", "state", "metadata").label("facts"),
            or_(c.path.is_distinct_from(g.path), c.status.not_in(READABLE)).label("copy"),
        )
        .outerjoin_from(g.name.table, raw_data_package, p.name == g.name)
        .outerjoin(physical_copy, and_(c.package_id == p.id, c.location_id == g.location_id))
    )
    return {row.name: row for row in conn.execute(statement)} if rows else {}


# --- reading ---


def read(
    conn: Connection, names: Sequence[str] | None = None, *, at: Mapping[str, str] | None = None
) -> dict[str, PackageIn]:
    """Packages as they could be registered again, by name, in the order of their names.

    Args:
        names: None for all.
        at: by package, the location whose copy is shown; by default the oldest one that can be read. Location and
            path are empty where there is no such copy.
    """
    where = "WHERE p.name = ANY(:names)" if names is not None else ""
    rows = conn.execute(
        text(f"""
        SELECT p.name, p.state, p.metadata, m.name AS module, i.name AS instrument,
            jsonb_build_object('name', e.name, 'obs_unit', o.name, 'source', s.name, 'program', g.name, 'line', o.line,
                'started_at', e.started_at, 'ended_at', e.ended_at,
                'scheduled', nullif(e.scheduled, '')) AS executed_obs_unit,
            (SELECT coalesce(jsonb_agg(jsonb_build_object('name', f.name, 'size', f.size, 'checksum', f.checksum)
                ORDER BY f.name COLLATE "C"), '[]') FROM raw_data_file f WHERE f.package_id = p.id) AS files,
            (SELECT jsonb_agg(jsonb_build_array(l.name, c.path) ORDER BY c.id)
                FROM physical_copy c JOIN data_location l ON l.id = c.location_id
                WHERE c.package_id = p.id AND c.status = ANY(:readable)) AS copies
        FROM raw_data_package p JOIN executed_obs_unit e ON e.id = p.executed_obs_unit_id
        JOIN obs_unit o ON o.id = e.obs_unit_id JOIN instrument_module m ON m.id = p.instrument_module_id
        JOIN instrument i ON i.id = m.instrument_id LEFT JOIN source s ON s.id = o.source_id
        LEFT JOIN observing_program g ON g.id = o.observing_program_id
        {where} ORDER BY p.name
        """),
        {"names": names, "readable": list(READABLE)},
    )
    found = {}
    for row in rows.mappings():
        package, copies = dict(row), dict(row["copies"] or ())
        del package["copies"]
        location = next(iter(copies), "") if at is None else at.get(row["name"], "")
        place = {"location": location, "path": copies[location]} if location in copies else {"location": "", "path": ""}
        found[row["name"]] = msgspec.convert(package | place, PackageIn)
    return found


# --- files ---


def scan_files(paths: Iterable[Path], progress: Callable[[int], None] | None = None) -> list[FileIn]:
    """Sizes and SHA-256 checksums of files, in the order of the paths.

    Args:
        paths: a file counts under its own name, a directory stands for all files below it, sorted, named from there.
        progress: called with the number of bytes just read.

    Raises:
        NotFoundError: a path does not exist.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"{path} does not exist")
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        base = path if path.is_dir() else path.parent
        found += [_scan(p, p.relative_to(base).as_posix(), progress) for p in inside]
    return found


def _scan(path: Path, name: str, progress: Callable[[int], None] | None) -> FileIn:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            if progress:
                progress(len(block))
    return FileIn(name, size, f"sha256:{digest.hexdigest()}")
