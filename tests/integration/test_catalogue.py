"""Catalogue, grouping and documents on a real Postgres."""

from __future__ import annotations

import hashlib
import json
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from textwrap import dedent
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from sqlalchemy import Connection, Engine, event, func, insert, select, text

from tests.services import Servers
from wfm import catalogue, documents, grouping, schema, yamltext
from wfm.catalogue import ExecutedObsUnitIn, FileIn, PackageIn, Registered, register, scan_files
from wfm.errors import DocumentError, NotFoundError, RefusedError, UsageError
from wfm.grouping import AnyOf, Condition, Rule, select_packages, validate_rules
from wfm.store import connect

SITE = """
kind: site
name: chile
---
kind: location
name: processing
site: chile
type: processing
id: 7
---
kind: location
name: archive
site: chile
type: long_term_archive
"""

SOFTWARE = """
kind: software
name: sw
versions:
  - {version: 1.0.0, command: [sw]}
---
kind: config
name: cf
parameters: {depth: 1}
---
kind: grouping
name: everything
"""

PIPELINE = """
kind: pipeline
name: chai
grouping: everything
steps:
  - {name: calibrate, software: sw, config: cf, group_by: [executed_obs_unit]}
  - {name: map, software: sw, depends_on: [calibrate], group_by: [source, line]}
"""


@pytest.fixture(scope="module")
def engine(servers: Servers, migrated: str) -> Iterator[Engine]:
    with servers.database(template=migrated) as url:
        engine = connect(url, "wfm")
        yield engine
        engine.dispose()


@pytest.fixture
def conn(engine: Engine) -> Iterator[Connection]:
    """A transaction that is rolled back at the end; site and locations are there."""
    with engine.connect() as conn:
        apply(conn, SITE)
        yield conn


def apply(conn: Connection, *texts: str, location_id: int = 7) -> documents.Applied:
    loaded = documents.load([(f"{n}.yaml", dedent(t)) for n, t in enumerate(texts)])
    return documents.apply(conn, loaded, location_id=location_id, actor="user:ada", reason="a test")


def refused(conn: Connection, *texts: str, location_id: int = 7) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        apply(conn, *texts, location_id=location_id)
    return list(caught.value.faults)


def actions(applied: documents.Applied) -> set[str]:
    return {c.action for c in applied.changes}


def rows(conn: Connection, sql: str, **params: Any) -> list[Any]:
    return list(conn.execute(text(sql), params))


def package(name: str, content: str = "", **more: Any) -> PackageIn:
    checksum = "sha256:" + hashlib.sha256((content or name).encode()).hexdigest()
    given: dict[str, Any] = {
        "executed_obs_unit": ExecutedObsUnitIn(f"eou-{name}", obs_unit="ou", source="NGC253", line="CO"),
        "module": "LFA",
        "instrument": "CHAI",
        "files": (FileIn("a.fits", 10, checksum), FileIn("b/c.fits", 5, checksum)),
        "location": "archive",
        "path": name,
    }
    return PackageIn(name=name, **(given | more))


def add(conn: Connection, *packages: PackageIn, at: Sequence[int] = (7,)) -> Registered:
    return register(conn, packages, location_ids=at, actor="user:ada", reason="night 1")


# --- register ---


def test_a_package_with_all_it_names(conn: Connection) -> None:
    times = {"started_at": datetime(2025, 6, 1, 4, tzinfo=UTC), "ended_at": datetime(2025, 6, 1, 5, tzinfo=UTC)}
    observation = ExecutedObsUnitIn("e1", obs_unit="o1", source="NGC253", program="deep", line="CO", **times)
    p = package("p1", executed_obs_unit=observation, metadata={"a": [1, {"b": "ü"}]}, state="transferring")
    done = add(conn, p)
    assert (done.new, done.changed, done.unchanged, len(done.event_ids)) == (1, 0, 0, 1)
    assert catalogue.read(conn) == {"p1": p}
    ((item, size),) = rows(conn, "SELECT item, size FROM raw_data_package")
    assert (int(item), size) == (p.item, 15)


def test_registering_again_changes_nothing(conn: Connection) -> None:
    packages = [package("p1", metadata={"x": 1e23, "y": 1.0, "n": 10**25}), package("p2")]
    add(conn, *packages)
    before = rows(conn, "SELECT * FROM raw_data_package p JOIN raw_data_file f ON f.package_id = p.id ORDER BY f.id")
    again = add(conn, *reversed(packages))
    assert (again.new, again.changed, again.unchanged, again.event_ids) == (0, 0, 2, [])
    assert before == rows(
        conn, "SELECT * FROM raw_data_package p JOIN raw_data_file f ON f.package_id = p.id ORDER BY f.id"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"flag": True}},
        {"state": "failed"},
        {"location": "processing"},
        {"path": "elsewhere"},
        {"files": package("p1").files[:1]},
        {"files": package("p1", "other content").files},
        {"executed_obs_unit": ExecutedObsUnitIn("e2", obs_unit="o2")},
        {"module": "HFA"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_counts_as_a_change(conn: Connection, change: dict[str, Any]) -> None:
    first = package("p1", metadata={"flag": 1})
    changed = msgspec.structs.replace(first, **change)
    add(conn, first, package("p2"))
    done = add(conn, changed, package("p2"))
    assert (done.new, done.changed, done.unchanged) == (0, 1, 1)
    found = catalogue.read(conn, ["p1"], at={"p1": changed.location})["p1"]
    assert found.executed_obs_unit.name == changed.executed_obs_unit.name
    for field in ("metadata", "state", "location", "path", "files", "module"):
        assert getattr(found, field) == getattr(changed, field)
    assert rows(
        conn, "SELECT DISTINCT body ->> 'raw_data_package' FROM event WHERE id = ANY(:ids)", ids=done.event_ids
    ) == [(str(rows(conn, "SELECT id FROM raw_data_package WHERE name = 'p1'")[0].id),)]
    assert add(conn, changed).unchanged == 1


def test_the_item_follows_the_content_alone() -> None:
    p = package("p1")
    assert p.item == package("p1", files=p.files[::-1], metadata={"a": 1}, path="y").item
    others = [package("p2", "p1"), package("p1", "other"), package("p1", files=p.files[:1])]
    renamed = package("p1", files=(FileIn("x.fits", 10, p.files[0].checksum), p.files[1]))
    assert len({q.item for q in [p, renamed, *others]}) == 5
    assert 0 <= p.item < 1 << 128


def test_copies_of_old_content_are_no_longer_readable(conn: Connection) -> None:
    add(conn, package("p1"), package("p2"))
    add(conn, package("p1", location="processing"))
    add(conn, package("p1", "new content"))
    assert catalogue.read(conn, ["p1"], at={"p1": "processing"})["p1"].location == ""
    assert catalogue.read(conn, ["p1"])["p1"].location == "archive"
    assert add(conn, package("p1", "new content", location="processing")).changed == 1
    assert catalogue.read(conn, ["p1"], at={"p1": "processing"})["p1"].location == "processing"


def test_events_go_to_locations_with_an_enabled_pipeline(conn: Connection) -> None:
    more = """
        kind: location
        name: {name}
        site: chile
        type: processing
        id: {id}
        ---
        kind: pipeline
        name: at-{name}
        grouping: everything
        location: {name}
        enabled: {enabled}
        steps: [{{name: a, software: sw}}]
        """
    there = [("cologne", 18, "true"), ("cornell", 19, "false"), ("bonn", 20, "true")]
    apply(conn, SOFTWARE, *(more.format(name=n, id=i, enabled=e) for n, i, e in there))
    documents.delete(conn, "pipeline", "at-bonn", actor="user:ada")
    done = add(conn, package("p1"), package("p2"), at=[7])
    sent = rows(
        conn,
        "SELECT location_id, type, recipient, actor, reason, body, publish_at - now() AS later, done_at FROM event"
        " WHERE id = ANY(:ids) ORDER BY id",
        ids=done.event_ids,
    )
    ids = {r.id for r in rows(conn, "SELECT id FROM raw_data_package")}
    assert {(r.location_id, r.body["raw_data_package"]) for r in sent} == {(loc, i) for loc in (7, 18) for i in ids}
    assert len(sent) == 4
    for r in sent:
        assert r.body["type"] == r.type == "data.arrived"
        assert (r.recipient, r.actor, r.reason, r.done_at) == ("trigger-manager", "user:ada", "night 1", None)
        assert r.later == timedelta(seconds=60)
    assert add(conn, package("p3"), at=[]).event_ids  # location 18 is told without being asked for


def test_what_was_unknown_of_an_observation_is_filled_and_its_packages_are_told(conn: Connection) -> None:
    bare = ExecutedObsUnitIn("e1", obs_unit="o1")
    add(conn, package("p1", executed_obs_unit=bare), package("p2"))
    full = ExecutedObsUnitIn("e1", obs_unit="o1", source="M31", line="HI", started_at=datetime(2025, 6, 1))
    done = add(conn, package("p3", executed_obs_unit=full))
    told = {r.name for r in _told(conn, done)}
    assert told == {"p1", "p3"}
    first = catalogue.read(conn, ["p1"])["p1"].executed_obs_unit
    assert (first.source, first.line, first.started_at) == ("M31", "HI", datetime(2025, 6, 1, tzinfo=UTC))
    assert add(conn, package("p1", executed_obs_unit=bare)).unchanged == 1


def _told(conn: Connection, done: Registered) -> list[Any]:
    sql = (
        "SELECT p.name FROM event e JOIN raw_data_package p ON p.id = (e.body ->> 'raw_data_package')::bigint"
        " WHERE e.id = ANY(:ids)"
    )
    return rows(conn, sql, ids=done.event_ids)


def test_all_faults_come_together_and_nothing_is_written(conn: Connection) -> None:
    add(conn, package("p0"))
    bare = ExecutedObsUnitIn("e", obs_unit="ou")
    bad = [
        package("p1", location="archiv"),
        package("p2", files=()),
        package("p3", files=(FileIn("../x", -1, "md5:1"), FileIn("a", 1, "sha256:" + "0" * 64))),
        package("p1"),
        package("p4", module="HFA2", instrument=None),
        package("p5", executed_obs_unit=ExecutedObsUnitIn("new")),
        package("p6", executed_obs_unit=ExecutedObsUnitIn("eou-p0", obs_unit="ou", source="M31")),
        package("p 7 ", executed_obs_unit=bare, state="gone", path="a/../..", metadata={"x": float("nan")}),
        package("p8", metadata={"a": ["\0"]}, files=package("p8").files * 2),
        package(
            "p9",
            executed_obs_unit=ExecutedObsUnitIn(
                "e9", obs_unit="ou", started_at=datetime(2025, 1, 2), ended_at=datetime(2025, 1, 1)
            ),
        ),
    ]
    with pytest.raises(DocumentError) as caught:
        add(conn, *bad)
    assert list(caught.value.faults) == [
        "package 'p1': unknown location 'archiv', did you mean 'archive'?; allowed: archive, processing",
        "package 'p2': files: a package needs at least one file",
        "package 'p3': files: name '../x' is not a path below the package's directory (without '.' and '..')",
        "package 'p3': files: size -1 of '../x' is not a number of bytes",
        "package 'p3': files: checksum 'md5:1' of '../x' is not sha256: and 64 hexadecimal digits",
        "package 'p1' comes twice",
        "instrument_module 'HFA2' is not in the catalogue; give its instrument to create it",
        "executed_obs_unit 'new' is not in the catalogue; give its obs_unit to create it",
        "obs_unit 'ou': source is 'M31', but 'NGC253' in another package",
        "package 'p 7 ': name: 'p 7 ' is not a name: 1 to 200 characters on one line, no space at its ends",
        "package 'p 7 ': unknown state 'gone'; allowed: waiting, transferring, archived, failed",
        "package 'p 7 ': metadata: values must be JSON: finite numbers, no NUL characters",
        "package 'p 7 ': path: 'a/../..' is not a directory: give it without '..'",
        "package 'p8': metadata: values must be JSON: finite numbers, no NUL characters",
        "package 'p8': files: 'a.fits' is named 2 times",
        "package 'p8': files: 'b/c.fits' is named 2 times",
        "package 'p9': executed_obs_unit: ended_at 2025-01-01 00:00:00 lies before started_at 2025-01-02 00:00:00",
    ]
    assert list(catalogue.read(conn)) == ["p0"]


def test_what_the_catalogue_knows_must_agree(conn: Connection) -> None:
    add(conn, package("p0"))
    with pytest.raises(DocumentError) as caught:
        add(conn, package("p1", executed_obs_unit=ExecutedObsUnitIn("e1", obs_unit="ou", source="M31")))
    assert list(caught.value.faults) == ["obs_unit 'ou': source is 'NGC253' in the catalogue, not 'M31'"]


def test_many_packages_take_as_many_statements_as_few(engine: Engine, conn: Connection) -> None:
    statements: list[str] = []

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    def count(packages: Sequence[PackageIn]) -> int:
        statements.clear()
        event.listen(engine, "before_cursor_execute", note)
        assert add(conn, *packages).new == len(packages)
        event.remove(engine, "before_cursor_execute", note)
        return len(statements)

    def night(n: int, size: int) -> list[PackageIn]:
        observation = "n{}-e{}".format
        return [
            package(
                f"n{n}-p{i}",
                executed_obs_unit=ExecutedObsUnitIn(
                    observation(n, i // 2), obs_unit=f"n{n}-o{i % 50}" if i % 2 else None
                ),
            )
            for i in range(size)
        ]

    add(conn, *night(0, 2))
    few = count(night(1, 4))
    assert count(night(2, 5000)) == few
    assert len(catalogue.read(conn)) == 5006


def test_two_registrations_of_the_same_packages_take_turns(database: str) -> None:
    from tests.harness import wait_until

    engine = connect(database, "wfm")
    same = ExecutedObsUnitIn("e", obs_unit="ou")
    packages = [package(name, executed_obs_unit=same) for name in ("p1", "p2")]
    with engine.begin() as conn:
        apply(conn, SITE)
        add(conn, package("p0", executed_obs_unit=same))  # what they name is there: they meet at the packages alone
    second: list[Registered] = []

    def late() -> None:
        with engine.begin() as conn:
            second.append(add(conn, *reversed(packages)))

    def blocked() -> bool:
        sql = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        with engine.connect() as conn:
            return bool(rows(conn, sql))

    thread = threading.Thread(target=late)
    with engine.begin() as conn:
        first = add(conn, *packages)
        thread.start()
        wait_until(blocked, what="the second registration waits")
    thread.join()
    engine.dispose()
    assert (first.new, second[0].new, second[0].unchanged) == (2, 0, 2)


def test_scanning_files(tmp_path: Path) -> None:
    (tmp_path / "raw" / "sub").mkdir(parents=True)
    (tmp_path / "raw" / "sub" / "b.fits").write_bytes(b"b" * 3_000_000)
    (tmp_path / "raw" / "a.fits").write_bytes(b"")
    (tmp_path / "c.fits").write_bytes(b"c")
    read: list[int] = []
    found = scan_files([tmp_path / "raw", tmp_path / "c.fits"], read.append)
    assert [(f.name, f.size) for f in found] == [("a.fits", 0), ("sub/b.fits", 3_000_000), ("c.fits", 1)]
    assert found[2].checksum == "sha256:" + hashlib.sha256(b"c").hexdigest()
    assert sum(read) == 3_000_001
    with pytest.raises(NotFoundError, match=r"nothing\.fits does not exist"):
        scan_files([tmp_path / "nothing.fits"])


# --- grouping ---

SCALARS: list[Any] = [1, 1.0, 2, 2.5, -1, 1e23, 10**23, "1", "a", "B", "ä", "a%", "", True, False, None, [1], {"x": 1}]
# What may be read as another type, and what nearly may.
READABLE: list[Any] = [
    *("2025-06-01", "2025-06-01T04:30:00Z", "2025-06-01 04:30", "2024-02-29", "2000-02-29T23:59:59.5+02:00"),
    *("2025-02-29", "1900-02-29", "2025-06-31", "0000-01-01", "2025-13-01", "2025-06-01T24:00:00", "now", "20250601"),
    *("1e3", "-.5", "1.", "+7", ".", "1e", "0x1f", "1e9999", "NaN", "inf", " 1", "1_000", "٣", "true", "False", "t"),
]
PART = "instrument_configuration"
LONG = f"{PART}.{PART}.{PART}"
"""Longer than a name can be in Postgres."""
TIMES = [datetime(2025, 6, 1, 4), datetime(2025, 6, 1, 4, 0, 0, 1), datetime(2025, 6, 2), None]
NAMES = ["NGC253", "ngc253", "M31", "Zoë", "a_c", "abc", "100%"]


def _world(conn: Connection) -> list[dict[str, dict[str, Any]]]:
    """A varied catalogue; returns each package with the rows of all tables that it reaches, as plain values."""

    def put(table: Any, some: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [dict(conn.execute(insert(table).values(r).returning(table)).mappings().one()) for r in some]

    sources = put(schema.source, [{"name": n, "type": "fixed" if len(n) > 3 else "moving"} for n in NAMES])
    programs = put(schema.observing_program, [{"name": "deep"}, {"name": "wide"}])
    sites = put(schema.site, [{"name": "high", "time_zone": "America/Santiago"}])
    instruments = put(
        schema.instrument, [{"name": "CHAI", "site_id": sites[0]["id"]}, {"name": "Prime-Cam", "site_id": None}]
    )
    modules = put(
        schema.instrument_module,
        [{"name": n, "instrument_id": instruments[n != "LFA"]["id"]} for n in ("LFA", "280", "350")],
    )
    units = put(
        schema.obs_unit,
        [
            {
                "name": f"o{i}",
                "source_id": [None, *sources][i % 8] and [None, *sources][i % 8]["id"],  # type: ignore[index]
                "observing_program_id": [None, *programs][i % 3] and [None, *programs][i % 3]["id"],  # type: ignore[index]
                "line": ["", "CO", "CI"][i % 3],
                "metadata": {"v": SCALARS[i % len(SCALARS)]},
            }
            for i in range(10)
        ],
    )
    executed = put(
        schema.executed_obs_unit,
        [
            {"name": f"e{i}", "obs_unit_id": units[i % 10]["id"], "started_at": t and t.replace(tzinfo=UTC)}
            for i, t in enumerate(TIMES * 5)
        ],
    )
    packages = put(
        schema.raw_data_package,
        [
            {
                "name": f"p{i}",
                "executed_obs_unit_id": executed[i % 20]["id"],
                "instrument_module_id": modules[i % 3]["id"],
                "size": i,
                "item": (1 << 127) + i,
                "state": ["archived", "failed", "waiting"][i % 3],
                "metadata": {"r": READABLE[i % len(READABLE)], PART: {PART: {PART: {"v": i % 2, "w": i % 3}}}}
                | ({} if i % 19 == 18 else {"v": SCALARS[i % 19], "deep": {"v": SCALARS[-i % 18]}}),
            }
            for i in range(57)
        ],
    )

    def of(table: list[dict[str, Any]], i: int | None) -> dict[str, Any]:
        return next((r for r in table if r["id"] == i), {})

    reached = []
    for p in packages:
        e = of(executed, p["executed_obs_unit_id"])
        o, m = of(units, e["obs_unit_id"]), of(modules, p["instrument_module_id"])
        reached.append(
            {
                "raw_data_package": p,
                "executed_obs_unit": e,
                "obs_unit": o,
                "source": of(sources, o["source_id"]),
                "observing_program": of(programs, o["observing_program_id"]),
                "instrument_module": m,
                "instrument": (i := of(instruments, m["instrument_id"])),
                "site": of(sites, i["site_id"]),
            }
        )
    return reached


ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}


def _like(value: str, pattern: str) -> bool:
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    wild = {"%": ".*", "_": "."}
    return bool(re.fullmatch("".join(wild.get(p) or re.escape(p[-1]) for p in parts), value, re.DOTALL))


def _holds(rule: Rule, value: Any) -> bool:
    """What a rule means, said a second time in Python."""

    def key(v: Any) -> tuple[str, Any]:
        if isinstance(v, int | float | Decimal) and not isinstance(v, bool):
            return "number", Decimal(str(v))
        return type(v).__name__, v

    def equal(a: Any, b: Any) -> bool:
        return key(a) == key(b)

    if rule.type:
        value = _read_as(rule.type, value)
    if rule.type == "time":
        given = rule.value if isinstance(rule.value, list) else [rule.value]
        times = [_read_as("time", v) for v in given]
        rule = structs.replace(rule, value=times if isinstance(rule.value, list) else times[0])
    match rule.operator:
        case "is_null":
            return value is None
        case "not_null":
            return value is not None
        case "eq":
            return equal(value, rule.value)
        case "neq":
            return not equal(value, rule.value)
        case "in":
            return any(equal(value, v) for v in rule.value)
        case "not_in":
            return not any(equal(value, v) for v in rule.value)
        case "like":
            return isinstance(value, str) and _like(value, rule.value)
        case name:
            (kind, a), (other, b) = key(value), key(rule.value)
            return kind == other and ORDERINGS[name](a, b)


def _read_as(kind: str, value: Any) -> Any:
    """What a JSON value is as text, number, boolean or time; None where it cannot be read so."""
    text = value if isinstance(value, str) else None if isinstance(value, list | dict | None) else json.dumps(value)
    if text is None:
        return None
    match kind:
        case "text":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return f"{Decimal(text).normalize():f}" if number else text
        case "boolean":
            return {"true": True, "false": False}.get(text)
        case "number":
            looks = re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", text)
            return Decimal(text) if looks else None
        case _:
            if not isinstance(value, str) or not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value) or "T24" in value:
                return None
            try:
                return grouping.parse_time(value)
            except ValueError:
                return None


def _all_hold(rules: Iterable[Condition], reached: dict[str, dict[str, Any]]) -> bool:
    return all(
        _holds(r, _found(reached, r)) if isinstance(r, Rule) else any(_all_hold(m, reached) for m in r.any_of)
        for r in rules
    )


def _value_of(dimension: str, reached: dict[str, dict[str, Any]]) -> str | None:
    """What a dimension says of a package, said a second time in Python."""
    if dimension == "night":
        started = reached["executed_obs_unit"]["started_at"]
        return started and _night(started, reached["site"].get("time_zone", "UTC"))
    if "." not in dimension:
        table, column = {"line": ("obs_unit", "line")}.get(dimension, (dimension, "name"))
        return reached[table].get(column)
    place, _, path = dimension.partition(":")
    value: Any = _found(reached, Rule(*place.split("."), "eq", None, path or None))
    return _read_as("text", value)


def _night(time: datetime, zone: str) -> str:
    clocks = time.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    return (clocks - timedelta(hours=12)).date().isoformat()


DIMENSIONS = [
    *grouping.DIMENSIONS,
    *("source.type", "raw_data_package.size", "raw_data_package.metadata:v", "raw_data_package.metadata:deep.v"),
    "obs_unit.metadata:v",
    *(f"raw_data_package.metadata:{LONG}.{key}" for key in ("v", "w")),
]


def _found(reached: dict[str, dict[str, Any]], rule: Rule) -> Any:
    value = reached[rule.table].get(rule.column)
    for key in rule.json_path.split(".") if rule.json_path else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value.isoformat() if isinstance(value, datetime) else value


def _rules() -> st.SearchStrategy[Condition]:
    texts = st.sampled_from([*NAMES, "CO", "", "o1", "e7", "p3", "archived", "fixed", "N", "a"])
    patterns = st.sampled_from(["%", "NGC%", "ngc253", "_%", "a\\_c", "a_c", "100\\%", "%5%", "", "\\a%", "Zo_"])
    numbers = st.sampled_from([0, 1, 3, 3.0, 2.5, -1, 56, 10**30, 1e23])
    times = st.sampled_from(sorted({t.replace(tzinfo=UTC).isoformat() for t in TIMES if t}))
    scalars = st.sampled_from([s for s in SCALARS if isinstance(s, str | int | float)])
    ordered = st.sampled_from([s for s in SCALARS if isinstance(s, str | int | float) and not isinstance(s, bool)])
    columns: list[tuple[list[tuple[str, str]], list[str | None], Any, Any]] = [
        ([(t, "name") for t in grouping.TABLES] + [("obs_unit", "line"), ("source", "type")], [None], texts, texts),
        ([("raw_data_package", "size"), ("raw_data_package", "item")], [None], numbers, numbers),
        ([("executed_obs_unit", "started_at")], [None], times, times),
        ([("raw_data_package", "metadata"), ("obs_unit", "metadata")], ["v", "deep.v", "v.x"], scalars, ordered),
    ]
    kinds = []
    for places, paths, values, comparable in columns:
        place, path = st.sampled_from(places), st.sampled_from(paths)
        asked = [
            st.tuples(st.sampled_from(["eq", "neq"]), values | st.none()),
            st.tuples(st.sampled_from(["in", "not_in"]), st.lists(values, max_size=3)),
            st.tuples(st.sampled_from(list(ORDERINGS)), comparable),
        ]
        asked.append(st.tuples(st.sampled_from(["is_null", "not_null"]), st.none()))
        if paths != [None] or values is texts:
            asked.append(st.tuples(st.just("like"), patterns))
        kinds.append(
            st.tuples(place, path, st.one_of(asked)).map(lambda x: Rule(x[0][0], x[0][1], x[2][0], x[2][1], x[1]))
        )
    as_types: dict[str, list[Any]] = {
        "text": ["1", "2.5", "true", "a", "100000000000000000000000", "2025-06-01"],
        "number": [1, 2.5, 1000, -0.5, 7, 1e23],
        "boolean": [True, False],
        "time": ["2025-06-01", "2025-06-01T04:30:00+00:00", "2000-02-29T21:59:59.5Z", "2024-02-29"],
    }
    for type_, some in as_types.items():
        path, value = st.sampled_from(["r", "v", "deep.v"]), st.sampled_from(some)
        ways = [
            st.tuples(st.sampled_from(["eq", "neq"]), value | st.none()),
            st.tuples(st.sampled_from(["in", "not_in"]), st.lists(value, max_size=3)),
            st.tuples(st.sampled_from(["is_null", "not_null"]), st.none()),
        ]
        ways += [st.tuples(st.sampled_from(list(ORDERINGS)), value)] * (type_ != "boolean")
        ways += [st.tuples(st.just("like"), patterns)] * (type_ == "text")
        kinds.append(
            st.tuples(path, st.one_of(ways)).map(
                lambda x, type_=type_: Rule("raw_data_package", "metadata", x[1][0], x[1][1], x[0], type_)  # type: ignore[misc]
            )
        )
    rules: st.SearchStrategy[Condition] = st.one_of(kinds)
    members = st.lists(st.lists(rules, min_size=1, max_size=2).map(tuple), min_size=1, max_size=3)
    return rules | members.map(lambda m: AnyOf(tuple(m)))


def _units(found: Sequence[Any], dims: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(zip(sorted(dims), row[2:], strict=True)) for row in found]


def test_sql_and_plain_python_agree(conn: Connection) -> None:
    world = _world(conn)
    hits: set[str] = set()

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(_rules(), max_size=2),
        st.lists(st.sampled_from(DIMENSIONS), unique=True, max_size=3),
        st.none() | st.sets(st.integers(0, 60)),
        st.none() | st.integers(0, 3),
    )
    def agree(rules: list[Condition], dims: list[str], some: set[int] | None, units: int | None) -> None:
        assert validate_rules(rules) == []
        wanted = []
        first = world[0]["raw_data_package"]["id"]
        ids = None if some is None else [first + i for i in some]
        for reached in world:
            p = reached["raw_data_package"]
            values = [_value_of(d, reached) for d in sorted(dims)]
            hits.update(r.operator for r in grouping.leaves(rules) if _all_hold([r], reached))
            if _all_hold(rules, reached) and (ids is None or p["id"] in ids):
                wanted.append((p["id"], p["item"], *values))
        found = conn.execute(select_packages(rules, dims, package_ids=ids)).all()
        within = select_packages(rules, dims, package_ids=ids).subquery()
        by_unit = [within.c[d] for d in dims]
        counted = conn.execute(select(func.count(), *by_unit).select_from(within).group_by(*by_unit))
        assert sum(row[0] for row in counted) == len(wanted)
        assert sorted(map(tuple, found), key=repr) == sorted(wanted, key=repr)
        if units is not None:
            some_units = _units(found, dims)[:units]
            kept = conn.execute(select_packages(rules, dims, package_ids=ids, values=some_units)).all()
            expected = [row for row, u in zip(found, _units(found, dims), strict=True) if u in some_units]
            assert sorted(kept, key=repr) == sorted(expected, key=repr)

    agree()
    assert hits == set(grouping.OPERATORS)


def test_neither_rules_nor_data_of_other_types_make_sql_fail(conn: Connection) -> None:
    _world(conn)
    for op in grouping.OPERATORS:
        for value in ("a", 1, True, None):
            for type_ in (None, *grouping.TYPES):
                given = [value] if op in ("in", "not_in") else value
                for path in ("v", "r"):
                    rule = Rule("raw_data_package", "metadata", op, given, path, type_)
                    if not validate_rules([rule]):
                        conn.execute(select_packages([rule], [])).all()


# Clocks that were put on and back, also by half an hour; an offset of 5:45; a day that never was; winter without end.
ZONES = ["UTC", "America/Santiago", "Europe/Berlin", "Australia/Lord_Howe", "Asia/Kathmandu", "Pacific/Apia"]
CHANGES = [
    *(datetime(2024, 4, 7, 3), datetime(2024, 9, 8, 4), datetime(2024, 3, 31, 1), datetime(2024, 10, 27, 1)),
    *(datetime(2024, 4, 6, 15), datetime(2024, 10, 5, 15, 30), datetime(2011, 12, 30, 10), datetime(2024, 12, 31, 12)),
    *(datetime(2025, 1, 1), datetime(2024, 2, 29, 12), datetime(1999, 12, 31, 16)),
]


def test_nights_are_those_of_the_clocks_on_site(conn: Connection) -> None:
    source = conn.execute(insert(schema.source).values(name="s").returning(schema.source.c.id)).scalar_one()
    unit = insert(schema.obs_unit).values(name="o", source_id=source).returning(schema.obs_unit.c.id)
    obs_unit = conn.execute(unit).scalar_one()
    around = [timedelta(hours=h, seconds=s) for h in range(-30, 31) for s in (-1, 0)]
    times = [(at + d).replace(tzinfo=UTC) for at in CHANGES for d in around]
    executed = [
        conn.execute(
            insert(schema.executed_obs_unit)
            .values([{"name": str(n), "obs_unit_id": obs_unit, "started_at": t} for n, t in enumerate(times)])
            .returning(schema.executed_obs_unit.c.id)
        ).scalars()
    ][0].all()
    wanted = {}
    for zone in ZONES:
        apply(conn, f"kind: site\nname: {zone}\ntime_zone: {zone}\n---\nkind: instrument\nname: {zone}\nsite: {zone}\n")
        apply(conn, f"kind: module\nname: {zone}\ninstrument: {zone}\n")
        (module,) = rows(conn, "SELECT id FROM instrument_module WHERE name = :z", z=zone)
        for n, (e, t) in enumerate(zip(executed, times, strict=True)):
            wanted[f"{zone} {n}"] = (e, module.id, _night(t, zone))
    conn.execute(
        insert(schema.raw_data_package).values(
            [
                {"name": name, "executed_obs_unit_id": e, "instrument_module_id": m, "size": 1}
                for name, (e, m, _) in wanted.items()
            ]
        )
    )
    found = conn.execute(select_packages([], ["night", "raw_data_package"])).all()
    assert {row.raw_data_package: row.night for row in found} == {name: w[2] for name, w in wanted.items()}


def test_each_table_is_joined_once(conn: Connection) -> None:
    rules = [
        Rule("source", "name", "eq", "NGC253"),
        Rule("obs_unit", "line", "eq", "CO"),
        Rule("source", "type", "eq", "fixed"),
    ]
    statement = str(select_packages(rules, ["source", "obs_unit", "instrument"]))
    assert statement.count(" JOIN ") == 5
    assert str(select_packages([], [])).count("JOIN") == 0


def test_texts_are_ordered_by_code_point_whatever_the_database_does(conn: Connection) -> None:
    for rule in (Rule("source", "name", "gt", "a"), Rule("source", "metadata", "gt", "a", "v")):
        assert 'COLLATE "C") > ' in str(select_packages([rule], []).compile(conn))


# --- documents ---


def test_applying_twice_changes_nothing(conn: Connection) -> None:
    first = apply(conn, PIPELINE, SOFTWARE)
    assert actions(first) == {"create"}
    assert [c.kind for c in first.changes] == ["software", "config", "grouping", "pipeline"]
    dump = yamltext.dump([d for kind in documents.KINDS for d in documents.get(conn, kind)])
    again = apply(conn, SITE, SOFTWARE, PIPELINE)
    assert actions(again) == {"unchanged"}
    assert (again.pipeline_ids_changed, again.event_ids) == ([], [])
    assert rows(conn, "SELECT count(*) FROM config_revision") == [(1,)]
    assert dump == yamltext.dump([d for kind in documents.KINDS for d in documents.get(conn, kind)])


EVERYTHING = f"""
kind: instrument
name: CHAI
description: a heterodyne array
---
kind: module
name: LFA
instrument: CHAI
---
kind: source
name: NGC 253
type: moving
metadata: {{ra: 00:47:33, x: 1e23, big: 1e+300, tiny: 1e-300, flag: true, one: 1}}
---
kind: program
name: deep
---
kind: obs_unit
name: o1
source: NGC 253
program: deep
line: NO
metadata: {{a: [1, 2.5, null, {{b: NO}}]}}
---
kind: obs_unit
name: o2
---
kind: scheduled_observation
name: tonight
obs_unit: o1
planned_start: 2026-03-01T22:00:00
planned_end: 2026-03-02T00:30:00+01:00
modules: [LFA]
---
kind: software
name: sw
description: two versions
versions:
  - {{version: 1.10, command: [sw, --fast], image: "r/sw:1.10", sif: sw.sif, state: deprecated}}
  - {{version: 2.0.0, command: [sw]}}
---
kind: config
name: cf
parameters: {{a: {{b: [1, 1.0, "1"]}}}}
---
kind: grouping
name: g
rules:
  - {{table: source, column: name, operator: in, value: [NGC 253]}}
  - {{table: raw_data_package, column: metadata, operator: gt, value: 400, json_path: a.b}}
---
kind: pipeline
name: p
description: two steps
grouping: g
location: processing
trigger: MANUAL
enabled: false
priority: 5
steps:
  - {{name: z, software: sw, version: 1.10, version_policy: pinned, config: cf, group_by: [source, line],
     resources: {{cpu: 2, memory_gb: 3, time_hours: 4, gpu: 1}}, environment: {{A: 1}}, max_retries: 0,
     cooldown_seconds: 60, retention_days: 1.5}}
  - {{name: a, software: sw, version_policy: latest, depends_on: [z], group_by: [line]}}
---
kind: raw_data_package
name: p1
executed_obs_unit: {{name: e1, obs_unit: o1, started_at: 2025-06-01T04:30:00+02:00}}
module: LFA
metadata: {{a: {{b: 401}}}}
files: [{{name: b, size: 1, checksum: "sha256:{"0" * 64}"}}, {{name: a, size: 1, checksum: "sha256:{"1" * 64}"}}]
location: archive
path: 2025/p1
"""


def test_what_get_gives_can_be_applied_as_unchanged(conn: Connection) -> None:
    apply(conn, EVERYTHING)
    found = [d for kind in documents.KINDS for d in documents.get(conn, kind)]
    assert {d["kind"] for d in found} == set(documents.KINDS)
    for form in (yamltext.dump(found), "\n---\n".join(json.dumps(d) for d in found)):
        again = apply(conn, form)
        assert actions(again) == {"unchanged"}
        assert again.event_ids == []
    assert actions(apply(conn, EVERYTHING)) == {"unchanged"}
    assert documents.get(conn, "obs_unit", "o1")[0]["line"] == "NO"
    assert documents.get(conn, "software", "sw")[0]["versions"][0]["version"] == "1.10"


def test_every_change_is_named_field_by_field(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    text_ = PIPELINE.replace("name: map", "name: grid").replace("config: cf", "config: cf, max_retries: 1")
    applied = apply(conn, SOFTWARE.replace("depth: 1", "depth: true, width: {x: 1}"), text_)
    changes = {c.name: c for c in applied.changes}
    assert {n: c.action for n, c in changes.items()} == {
        "sw": "unchanged",
        "everything": "unchanged",
        "cf": "update",
        "chai": "update",
    }
    assert [(d.field, d.old, d.new) for d in changes["cf"].differences] == [
        ("parameters.depth", 1, True),
        ("parameters.width", None, {"x": 1}),
    ]
    retries, gone, new = changes["chai"].differences
    assert (retries.field, retries.old, retries.new) == ("steps.calibrate.max_retries", 3, 1)
    assert (gone.field, gone.old["name"], gone.new) == ("steps.map", "map", None)
    assert (new.field, new.old, new.new["name"]) == ("steps.grid", None, "grid")


def test_steps_of_a_pipeline(conn: Connection) -> None:
    steps = """
        kind: pipeline
        name: chai
        grouping: everything
        steps:
          - {name: last, software: sw, depends_on: [b, a], group_by: []}
          - {name: b, software: sw, depends_on: [a], group_by: [source, line]}
          - {name: a, software: sw, group_by: [line, source]}
          - {name: alone, software: sw}
        """
    apply(conn, SOFTWARE, steps)
    sql = "SELECT name, position, final, active, dims, group_by, paused_by FROM reduction_step ORDER BY position, name"
    assert [tuple(r) for r in rows(conn, sql)] == [
        ("a", 0, False, True, '["line","source"]', ["line", "source"], ""),
        ("b", 1, False, True, '["line","source"]', ["line", "source"], ""),
        ("last", 2, True, True, "[]", [], ""),
        ("alone", 3, True, True, "[]", [], ""),
    ]
    edges = (
        "SELECT s.name, u.name FROM step_dependency d"
        " JOIN reduction_step s ON s.id = d.step_id JOIN reduction_step u ON u.id = d.upstream_id"
    )
    assert {tuple(r) for r in rows(conn, edges)} == {("last", "a"), ("last", "b"), ("b", "a")}
    conn.execute(text("UPDATE reduction_step SET paused_by = 'user:ada'"))
    ids = dict(rows(conn, "SELECT name, id FROM reduction_step"))

    apply(conn, PIPELINE.replace("calibrate", "a"))
    assert [tuple(r[:4]) for r in rows(conn, sql) if r.active] == [("a", 0, False, True), ("map", 1, True, True)]
    assert {r.name: (r.active, r.paused_by) for r in rows(conn, sql)} == {
        "a": (True, "user:ada"),
        "map": (True, ""),
        "b": (False, ""),
        "last": (False, ""),
        "alone": (False, ""),
    }
    assert {tuple(r) for r in rows(conn, edges)} == {("map", "a")}
    assert [s["name"] for s in documents.get(conn, "pipeline", "chai")[0]["steps"]] == ["a", "map"]

    apply(conn, steps)
    assert ids == {n: i for n, i in rows(conn, "SELECT name, id FROM reduction_step") if n in ids}
    assert {r.name for r in rows(conn, sql) if not r.active} == {"map"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (SOFTWARE.replace("[sw]}", "[sw]}\n  - {version: 1.1.0, command: [sw]}"), {"chai", "off"}),
        (SOFTWARE.replace("depth: 1", "depth: 2"), {"chai"}),
        (SOFTWARE + "rules: [{table: source, column: name, operator: eq, value: x}]\n", {"chai", "off"}),
        (PIPELINE + "priority: 3\n", {"chai"}),
        ("kind: source\nname: NGC253\nmetadata: {z: 1}\n", {"chai", "off", "other"}),
        ("kind: source\nname: M31\n", set()),
        ("kind: site\nname: chile\ntime_zone: America/Santiago\n", {"chai", "off", "other"}),
        ("kind: location\nname: archive\nsite: chile\ntype: long_term_archive\nroot: /arc\n", set()),
    ],
    ids=["software", "config", "grouping", "pipeline", "source", "new source", "site", "location"],
)
def test_pipelines_that_use_what_changed_are_told(conn: Connection, change: str, told: set[str]) -> None:
    def other(name: str, grouping: str, software: str, step: str = "a", enabled: str = "true") -> str:
        head = f"kind: pipeline\nname: {name}\ngrouping: {grouping}\nenabled: {enabled}\n"
        return head + f"steps: [{{name: {step}, software: {software}}}]\n"

    apply(
        conn,
        SOFTWARE,
        "kind: software\nname: mine\nversions: [{version: 1.0.0, command: [x]}]\n---\nkind: grouping\nname: g\n",
        PIPELINE,
        "kind: source\nname: NGC253\n",
        other("off", "everything", "sw", enabled="false"),
        other("other", "g", "sw"),
        other("gone", "everything", "sw"),
    )
    apply(conn, other("other", "g", "mine", step="b"))  # its step a, which used sw, is history now
    documents.delete(conn, "pipeline", "gone", actor="user:ada")
    done = apply(conn, change)
    names = dict(rows(conn, "SELECT id, name FROM pipeline"))
    assert {names[i] for i in done.pipeline_ids_changed} == told
    sent = rows(conn, "SELECT * FROM event WHERE id = ANY(:ids) ORDER BY id", ids=done.event_ids)
    assert [r.body for r in sent] == [
        {"type": "pipeline.changed", "pipeline": names[i], "pipeline_id": i} for i in done.pipeline_ids_changed
    ]
    assert all(
        (r.recipient, r.location_id, r.actor, r.reason) == ("trigger-manager", 7, "user:ada", "a test") for r in sent
    )
    assert apply(conn, change).event_ids == []


def test_changed_parameters_make_a_new_revision(conn: Connection) -> None:
    for n, depth in enumerate((1, 1, 2, 2, 1)):
        apply(conn, f"kind: config\nname: cf\ndescription: d{n}\nparameters: {{depth: {depth}}}\n")
    found = rows(conn, "SELECT revision, parameters, hash FROM config_revision ORDER BY revision")
    assert [(r.revision, r.parameters["depth"]) for r in found] == [(1, 1), (2, 2), (3, 1)]
    assert found[0].hash == found[2].hash != found[1].hash
    assert documents.get(conn, "config", "cf")[0]["parameters"] == {"depth": 1}


def _run(conn: Connection, state: str = "COMPLETED") -> None:
    """One run of the first step of the pipeline chai."""
    finished = "now()" if state == "COMPLETED" else "NULL"
    conn.execute(
        text(f"""
        WITH u AS (INSERT INTO unit (pipeline_id, dims, key) SELECT id, '[]', 'all' FROM pipeline WHERE name = 'chai'
            RETURNING id, pipeline_id)
        INSERT INTO run (location_id, pipeline_id, pipeline_name, step_id, step_name, unit_id, generation, wanted,
            software_version_id, cpu, memory_gb, state, chart_version, finished_at)
        SELECT p.location_id, p.id, p.name, s.id, s.name, u.id, 1, 'w', v.id, 1, 1, '{state}', 1, {finished}
        FROM u JOIN pipeline p ON p.id = u.pipeline_id
        JOIN reduction_step s ON s.pipeline_id = p.id AND s.name = 'calibrate'
        JOIN software_version v ON v.software_id = s.software_id AND v.version = '1.0.0'""")
    )


@pytest.mark.parametrize("key", ["command: [other]", "command: [sw], image: x", "command: [sw], sif: x.sif"])
def test_what_a_used_version_runs_cannot_change(conn: Connection, key: str) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    changed = SOFTWARE.replace("command: [sw]", key)
    apply(conn, changed)
    apply(conn, SOFTWARE)
    _run(conn)
    (fault,) = refused(conn, changed)
    assert fault.startswith("0.yaml:5: version 1.0.0 of 'sw' has been used by a run: its ")
    assert fault.endswith("cannot change any more; give a new version")
    apply(conn, SOFTWARE.replace("[sw]}", "[sw], state: revoked}"))


def test_what_a_document_leaves_open_stays_as_it_is(conn: Connection) -> None:
    apply(conn, SOFTWARE.replace("[sw]}", "[sw], state: revoked}\n  - {version: 2.0.0, command: [sw]}"), PIPELINE)
    assert documents.get(conn, "pipeline", "chai")[0]["enabled"] is True
    assert documents.get(conn, "pipeline", "chai")[0]["location"] == "processing"
    conn.execute(text("UPDATE pipeline SET enabled = false, paused_by = 'user:ada'"))
    apply(conn, "kind: location\nname: second\nsite: chile\ntype: processing\nid: 12\n")
    apply(conn, SOFTWARE, PIPELINE + "priority: 4\n", location_id=12)
    (pipeline,) = documents.get(conn, "pipeline")
    assert (pipeline["enabled"], pipeline["location"], pipeline["priority"]) == (False, "processing", 4)
    assert rows(conn, "SELECT paused_by FROM pipeline") == [("user:ada",)]
    versions = documents.get(conn, "software", "sw")[0]["versions"]
    assert [(v["version"], v["state"]) for v in versions] == [("1.0.0", "revoked"), ("2.0.0", "active")]


def test_ids_of_locations(conn: Connection) -> None:
    new = "kind: location\nname: {}\nsite: chile\ntype: processing\n"
    apply(conn, new.format("a"), new.format("b") + "id: 9\n", new.format("c"))
    ids = dict(rows(conn, "SELECT name, id FROM data_location"))
    assert (ids["processing"], ids["b"]) == (7, 9)
    assert len(set(ids.values())) == 5
    assert refused(conn, new.format("b") + "id: 51\n", new.format("d") + "id: 7\n") == [
        "0.yaml:5: location 'b' has the id 9, which cannot change",
        "1.yaml:5: id 7 belongs to location 'processing'",
    ]


def test_everything_that_does_not_fit_the_database_comes_together(conn: Connection) -> None:
    apply(conn, SOFTWARE)
    assert refused(
        conn,
        """\
        kind: module
        name: LFA
        instrument: CHAI
        ---
        kind: obs_unit
        name: o
        source: NGC253
        """,
        """\
        kind: pipeline
        name: p
        grouping: everythin
        location: archive
        steps:
          - name: a
            software: sw
            version: 1.0.1
            version_policy: pinned
            config: cff
          - name: b
            software: ws
        ---
        kind: software
        name: ws2
        ---
        kind: raw_data_package
        name: p
        executed_obs_unit: {name: e1}
        module: LFA
        files: [{name: b, size: 1, checksum: "sha256:%s"}]
        location: archiv
        path: p
        """
        % ("0" * 64),
    ) == [
        "0.yaml:3: unknown instrument 'CHAI'; there are none yet",
        "0.yaml:7: unknown source 'NGC253'; there are none yet",
        "1.yaml:3: unknown grouping 'everythin', did you mean 'everything'?; allowed: everything",
        "1.yaml:4: location 'archive' is of type long_term_archive; allowed: processing",
        "1.yaml:8: unknown version of 'sw' '1.0.1', did you mean '1.0.0'?; allowed: 1.0.0",
        "1.yaml:10: unknown config 'cff', did you mean 'cf'?; allowed: cf",
        "1.yaml:12: unknown software 'ws', did you mean 'ws2'?; allowed: sw, ws2",
        "1.yaml:17: package 'p': unknown location 'archiv', did you mean 'archive'?; allowed: archive, processing",
        "1.yaml:17: executed_obs_unit 'e1' is not in the catalogue; give its obs_unit to create it",
    ]
    assert documents.get(conn, "software", "sw")
    assert not documents.get(conn, "module")


def test_a_pipeline_needs_a_location(conn: Connection) -> None:
    apply(conn, SOFTWARE)
    (fault,) = refused(conn, PIPELINE, location_id=99)
    assert fault == "0.yaml:2: location: name one; this instance's own is not in the catalogue"


def test_a_pipeline_with_results_stays_at_its_location(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE, "kind: location\nname: second\nsite: chile\ntype: processing\n")
    apply(conn, PIPELINE + "location: second\n")
    apply(conn, PIPELINE + "location: processing\n")
    _run(conn)
    moved = PIPELINE + "location: second\n"
    expected = ["0.yaml:8: pipeline 'chai' has results at 'processing' and cannot move to 'second'"]
    assert refused(conn, moved) == expected
    documents.delete(conn, "pipeline", "chai", actor="user:ada")
    assert refused(conn, moved) == expected


def test_packages_by_documents(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    done = apply(conn, EVERYTHING)
    assert {r.name for r in _told(conn, Registered(0, 0, 0, done.event_ids[-1:]))} == {"p1"}
    staged = EVERYTHING[EVERYTHING.index("kind: raw_data_package") :].replace(
        "location: archive", "location: processing"
    )
    (change,) = apply(conn, staged).changes
    assert [(d.field, d.old, d.new) for d in change.differences] == [
        ("location", "", "processing"),
        ("path", "", "2025/p1"),
    ]
    assert actions(apply(conn, staged)) == {"unchanged"}


# --- get and delete ---


def test_getting_what_is_not_there(conn: Connection) -> None:
    with pytest.raises(NotFoundError, match="unknown location 'procesing', did you mean 'processing'"):
        documents.get(conn, "location", "procesing")
    with pytest.raises(UsageError, match="unknown kind 'locations', did you mean 'location'"):
        documents.get(conn, "locations")
    assert documents.get(conn, "pipeline") == []


def test_what_is_used_is_not_deleted(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    for kind, name, users in (
        ("software", "sw", "reduction_step chai/calibrate, chai/map"),
        ("config", "cf", "reduction_step chai/calibrate"),
        ("grouping", "everything", "pipeline chai"),
        ("site", "chile", "data_location archive, processing"),
        ("location", "processing", "1 × event; pipeline chai"),
    ):
        with pytest.raises(RefusedError) as caught:
            documents.delete(conn, kind, name, actor="user:ada")
        assert str(caught.value) == f"{kind} {name!r} is used by {users}; what is used, or was, stays"


def test_many_users_are_counted(conn: Connection) -> None:
    add(conn, *(package(f"p{i}") for i in range(8)))
    with pytest.raises(RefusedError, match=r"executed_obs_unit eou-p0, eou-p1, eou-p2, eou-p3, eou-p4 and 3 more;"):
        documents.delete(conn, "obs_unit", "ou", actor="user:ada")


def test_what_nobody_uses_is_deleted_with_what_belongs_to_it(conn: Connection) -> None:
    apply(conn, EVERYTHING)
    for kind, name in (("raw_data_package", "p1"), ("location", "archive"), ("program", "deep")):
        if kind == "program":
            conn.execute(text("UPDATE obs_unit SET observing_program_id = NULL"))
        assert documents.delete(conn, kind, name, actor="user:ada") == []
        with pytest.raises(NotFoundError):
            documents.delete(conn, kind, name, actor="user:ada")
    conn.execute(text("DELETE FROM step_dependency"))
    conn.execute(text("DELETE FROM reduction_step"))
    for kind, name in (("software", "sw"), ("config", "cf")):
        documents.delete(conn, kind, name, actor="user:ada")
    for table in ("raw_data_file", "physical_copy", "software_version", "config_revision"):
        assert rows(conn, f"SELECT count(*) FROM {table}") == [(0,)]


def test_a_version_that_ran_keeps_its_software(conn: Connection) -> None:
    apply(conn, SOFTWARE + "---\nkind: software\nname: new\nversions: [{version: 1.0.0, command: [x]}]\n", PIPELINE)
    _run(conn)
    apply(conn, PIPELINE.replace("software: sw", "software: new"))
    with pytest.raises(RefusedError, match="software 'sw' is used by 1 × run;"):
        documents.delete(conn, "software", "sw", actor="user:ada")


def test_a_deleted_pipeline_stays_as_history_and_can_come_back(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    _run(conn)
    conn.execute(text("UPDATE pipeline SET paused_by = 'user:ada', enabled = false"))
    (event_id,) = documents.delete(conn, "pipeline", "chai", actor="user:ada", reason="done")
    ((body, reason),) = rows(conn, "SELECT body, reason FROM event WHERE id = :id", id=event_id)
    assert (body["pipeline"], reason) == ("chai", "done")
    assert documents.get(conn, "pipeline") == []
    with pytest.raises(NotFoundError):
        documents.delete(conn, "pipeline", "chai", actor="user:ada")
    assert rows(conn, "SELECT count(*) FROM run") == [(1,)]
    assert rows(conn, "SELECT DISTINCT active FROM reduction_step") == [(False,)]
    assert actions(apply(conn, PIPELINE)) == {"create"}
    assert rows(conn, "SELECT count(*), bool_and(enabled), max(paused_by) FROM pipeline") == [(1, True, "")]
    assert rows(conn, "SELECT DISTINCT active FROM reduction_step") == [(True,)]
    assert documents.get(conn, "pipeline", "chai")


def test_a_pipeline_with_active_runs_is_not_deleted(conn: Connection) -> None:
    apply(conn, SOFTWARE, PIPELINE)
    _run(conn, "RETRY_WAIT")
    with pytest.raises(RefusedError, match="pipeline 'chai' has 1 active runs: cancel them, or disable"):
        documents.delete(conn, "pipeline", "chai", actor="user:ada")
    assert documents.get(conn, "pipeline", "chai")


def test_the_demonstrations_documents_apply(conn: Connection) -> None:
    demo = Path(documents.__file__).with_name("demo") / "pipeline.yaml"
    assert actions(apply(conn, demo.read_text())) == {"create"}
    assert actions(apply(conn, demo.read_text())) == {"unchanged"}


def test_what_cannot_be_read_counts_as_unknown_and_not_as_changed(conn: Connection) -> None:
    """One fault is one message: nothing that follows from it is told beside it."""
    apply(conn, SOFTWARE, PIPELINE)
    _run(conn)
    assert refused(conn, SOFTWARE.replace("command: [sw]", "command: sw")) == [
        "0.yaml:5: versions[0].command: expected a list, got 'sw'"
    ]
    newer = SOFTWARE.replace("version: 1.0.0", "version: two")
    pinned = PIPELINE.replace("config: cf", "version: 2.0.0, version_policy: pinned")
    assert refused(conn, newer, pinned) == ["0.yaml:5: 'two' is not a version such as 1.4.0"]
    away = "kind: location\nname: away\nsite: chile\ntype: proccessing\n"
    faults = refused(conn, away, PIPELINE.replace("name: chai", "name: other\nlocation: away"))
    assert [fault.split(": ")[:2] for fault in faults] == [["0.yaml:4", "type"]]
