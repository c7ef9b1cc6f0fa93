"""Filter rules and group_by as SQL: which raw data packages a data grouping holds, and how a step divides them.

A new table, relation or dimension is one line of data here, not code::

    raw_data_package ─► executed_obs_unit ─► obs_unit ─► source
            │                                    └─────► observing_program
            └─► instrument_module ─► instrument

Every arrow is many-to-one, so joining along arrows never multiplies packages, and every dimension is a function
of the package.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from msgspec import Struct, structs
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Numeric,
    Select,
    Text,
    and_,
    any_,
    cast,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from wfm.errors import nearest
from wfm.schema import (
    executed_obs_unit,
    instrument,
    instrument_module,
    obs_unit,
    observing_program,
    raw_data_package,
    source,
)

if TYPE_CHECKING:
    from sqlalchemy import Column, Table

T = TypeVar("T")

MANY_TO_ONE: tuple[Column[Any], ...] = (
    raw_data_package.c.executed_obs_unit_id,
    raw_data_package.c.instrument_module_id,
    executed_obs_unit.c.obs_unit_id,
    obs_unit.c.source_id,
    obs_unit.c.observing_program_id,
    instrument_module.c.instrument_id,
)
"""The arrows, as foreign keys."""


def _target(edge: Column[Any]) -> Table:
    (key,) = edge.foreign_keys
    return key.column.table


TABLES: dict[str, Table] = {t.name: t for t in (raw_data_package, *map(_target, MANY_TO_ONE))}
"""The tables that rules may look at."""

DIMENSIONS: dict[str, Column[Any]] = {
    "raw_data_package": raw_data_package.c.name,
    "executed_obs_unit": executed_obs_unit.c.name,
    "obs_unit": obs_unit.c.name,
    "line": obs_unit.c.line,
    "source": source.c.name,
    "observing_program": observing_program.c.name,
    "instrument_module": instrument_module.c.name,
    "instrument": instrument.c.name,
}
"""What a step may group by. All of them are texts; the value is NULL where the catalogue names nothing."""

_ORDERINGS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_LISTS = ("in", "not_in")
OPERATORS = ("eq", "neq", *_LISTS, *_ORDERINGS, "like")

_VALUE_KINDS: dict[type, str] = {str: "text", int: "number", Decimal: "number", datetime: "time", object: "json"}
_EXPECTED = {
    "text": "text",
    "number": "a finite number",
    "time": "an ISO 8601 time such as 2025-06-01T04:30:00Z (UTC where no offset is given)",
    "json": "a text, a finite number, true or false",
}


class Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """One condition on a package; the rules of a grouping are joined by AND.

    ``neq`` and ``not_in`` are the exact complements of ``eq`` and ``in``: a package without a source is not NGC253.
    Texts are ordered by code point, whatever the collation of the database.

    Attributes:
        table: one of `TABLES`. column: one of its columns.
        operator: one of `OPERATORS`.
        value: a list for ``in`` and ``not_in``; null (with ``eq`` or ``neq``) stands for "nothing there".
        json_path: dotted path into a JSON column. The comparison has the JSON type of the value: a number compares
            numerically, and data of another type equals nothing and is neither larger nor smaller.
    """

    table: str
    column: str
    operator: str
    value: Any
    json_path: str | None = None


def unknown(what: str, name: object, allowed: Collection[str]) -> str:
    """The text for a name that does not exist: the nearest one that does, and all of them if they are few."""
    near = nearest(name, allowed)
    listed = "" if len(allowed) > 20 else f"; allowed: {', '.join(allowed)}" if allowed else "; there are none yet"
    return f"unknown {what} {name!r}" + (f", did you mean {near!r}?" if near else "") + listed


def rules_from(rules: object) -> list[Rule]:
    """Checked rules (see `validate_rules`) from their JSON form."""
    return msgspec.convert(rules, list[Rule])


def storable(text: str) -> bool:
    """Whether Postgres can hold a text: UTF-8 without the NUL character."""
    return "\x00" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def parse_time(value: str) -> datetime:
    """An ISO 8601 time, aware; UTC where no offset is given.

    Raises:
        ValueError: it is none.
    """
    time = datetime.fromisoformat(value)
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


# --- faults ---


def validate_rules(rules: object) -> list[str]:
    """Every fault of a grouping's rules, one line each; empty if `select_packages` can use them."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        return [f"rules: expected a list of rules, got {rules!r}"]
    return [f"rule {n}: {fault}" for n, rule in enumerate(rules, 1) for fault in rule_faults(rule)]


def rule_faults(rule: object) -> list[str]:
    """Every fault of one rule (a `Rule`, or a mapping with its fields)."""
    if isinstance(rule, Rule):
        rule = structs.asdict(rule)
    if not isinstance(rule, Mapping):
        return [f"expected a mapping with table, column, operator and value, got {rule!r}"]
    fields = structs.fields(Rule)
    faults = [unknown("key", key, Rule.__struct_fields__) for key in rule if key not in Rule.__struct_fields__]
    faults += [f"missing key {f.name!r}" for f in fields if f.required and f.name not in rule]

    table = _lookup("table", rule["table"], TABLES, faults) if "table" in rule else None
    if table is None or "column" not in rule:
        column = None
    else:
        column = _lookup(f"{table.name} column", rule["column"], dict(table.c), faults)
    if "operator" in rule:
        _lookup("operator", rule["operator"], dict.fromkeys(OPERATORS), faults)
    if column is None:
        return faults

    kind, path = _VALUE_KINDS[column.type.python_type], rule.get("json_path")
    if path is not None and kind != "json":
        faults.append(f"json_path is for JSON columns only; {column} holds a {kind}")
    elif path is None and kind == "json":
        faults.append(f"{column} is a JSON column: json_path must say where to look")
    elif path is not None and not (isinstance(path, str) and storable(path) and all(path.split("."))):
        faults.append(f"json_path {path!r} is not a dotted path such as observation.frequency_ghz")
    if rule.get("operator") in OPERATORS and "value" in rule:
        faults += _value_faults(str(column), kind, rule["operator"], rule["value"])
    return faults


def _lookup(what: str, name: object, allowed: Mapping[str, T], faults: list[str]) -> T | None:
    if isinstance(name, str) and name in allowed:
        return allowed[name]
    faults.append(unknown(what, name, allowed))
    return None


def _value_faults(name: str, kind: str, op: str, value: object) -> list[str]:
    if op in _LISTS:
        if not isinstance(value, list | tuple):
            return [f"operator {op} needs a list of values, got {value!r}"]
        values = list(value)
    elif value is None and op in ("eq", "neq"):
        return []
    else:
        values = [value]
    faults = [f"value {v!r} does not fit {name}: expected {_EXPECTED[kind]}" for v in values if not _fits(kind, v)]
    if faults:
        return faults
    if op == "like" and not (kind in ("text", "json") and isinstance(value, str)):
        return [f"operator like is for texts only; {name} {op} {value!r}"]
    if op == "like" and isinstance(value, str) and (len(value) - len(value.rstrip("\\"))) % 2:
        return [f"pattern {value!r} must not end with a single backslash, which escapes the next character"]
    if op in _ORDERINGS and isinstance(value, bool):
        return [f"operator {op} has no meaning for {json.dumps(value)}; allowed: eq, neq, in, not_in"]
    return []


def _fits(kind: str, value: object) -> bool:
    if isinstance(value, bool):
        return kind == "json"
    if isinstance(value, int | float):
        return kind in ("number", "json") and math.isfinite(value)
    if not isinstance(value, str) or not storable(value) or kind == "number":
        return False
    if kind == "time":
        try:
            parse_time(value)
        except (ValueError, OverflowError):
            return False
    return True


def validate_group_by(dims: object) -> list[str]:
    """Every fault of a step's group_by, one line each."""
    if not isinstance(dims, Sequence) or isinstance(dims, str):
        return [f"group_by: expected a list of dimensions, got {dims!r}; allowed: {', '.join(DIMENSIONS)}"]
    faults = [unknown("dimension", d, DIMENSIONS) for d in dims if d not in list(DIMENSIONS)]
    return faults + [f"dimension {d!r} is named twice" for n, d in enumerate(dims) if d in dims[:n]]


# --- dimensions ---


@cache
def _path(start: Table, goal: Table) -> tuple[Column[Any], ...] | None:
    """The shortest way of foreign keys from a row of ``start`` to its one row of ``goal``; None if there is none."""
    ways: deque[tuple[Table, tuple[Column[Any], ...]]] = deque([(start, ())])
    while ways:
        table, way = ways.popleft()
        if table is goal:
            return way
        ways.extend((_target(edge), (*way, edge)) for edge in MANY_TO_ONE if edge.table is table)
    return None


def determines(finer: Sequence[str], coarser: Sequence[str]) -> list[str]:
    """The dimensions of ``coarser`` that the values of ``finer`` do not fix.

    Empty means that each unit of ``finer`` lies in exactly one unit of ``coarser``, so that a step grouped by
    ``coarser`` may depend on one grouped by ``finer``.
    """

    def fixes(f: Column[Any], c: Column[Any]) -> bool:
        return f is c or (bool(f.unique) and _path(f.table, c.table) is not None)

    return [d for d in coarser if not any(fixes(DIMENSIONS[f], DIMENSIONS[d]) for f in finer)]


def canonical(dims: Sequence[str]) -> str:
    """The one text for a set of dimensions: a sorted JSON list. Steps with equal texts share their units."""
    return json.dumps(sorted(dims), separators=(",", ":"))


_SLUG_CHARACTERS = 63


def unit_key(values: Mapping[str, str | None]) -> str:
    """The name of a unit in paths and on the command line: ``ngc253-co43-0f1e2d3c4b5a6978``; ``all`` without values.

    Readable texts of the values in the canonical order of their dimensions, then 64 bits of the SHA-256 of the
    exact values. At most 80 characters of ``[a-z0-9._-]``, the first one a letter or digit; equal keys mean equal
    values, also on file systems that ignore case.
    """
    if not values:
        return "all"
    exact = sorted(values.items())
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()[:16]
    slugs = (re.sub(r"[^a-z0-9._]+", "-", ("none" if v is None else v).lower()) for _, v in exact)
    slug = "-".join(s for s in (s.strip("-._") for s in slugs) if s)[:_SLUG_CHARACTERS]
    return f"{slug}-{digest}" if slug else digest


# --- SQL ---


def select_packages(
    rules: Sequence[Rule],
    dims: Sequence[str],
    *,
    package_ids: Sequence[int] | None = None,
    values: Sequence[Mapping[str, str | None]] | None = None,
) -> Select[*tuple[Any, ...]]:
    """One statement for the packages of a grouping, each with the values that say to which unit it belongs.

    Args:
        rules: checked with `validate_rules`; `rules_from` makes them from JSON.
        dims: checked with `validate_group_by`.
        package_ids: look at these packages only.
        values: keep only packages of the units with these values (a mapping has every dimension; None is NULL).

    Returns:
        Columns ``id`` and ``item`` of raw_data_package, then one text per dimension in canonical order, named
        like the dimension. A package comes once or not at all.
    """
    columns = {d: DIMENSIONS[d] for d in sorted(dims)}
    conditions = [_condition(rule) for rule in rules]
    if package_ids is not None:
        conditions.append(raw_data_package.c.id == any_(literal(list(package_ids), ARRAY(BigInteger))))
    if values is not None:
        conditions.append(_among(columns, values))
    return (
        select(raw_data_package.c.id, raw_data_package.c.item, *(c.label(d) for d, c in columns.items()))
        .select_from(_joined([*(TABLES[r.table] for r in rules), *(c.table for c in columns.values())]))
        .where(*conditions)
    )


def _joined(tables: Sequence[Table]) -> FromClause:
    """The packages, joined with these tables: each join once, and none of them drops a package."""
    edges = dict.fromkeys(edge for t in tables for edge in _path(raw_data_package, t) or ())
    joined: FromClause = raw_data_package
    for edge in edges:
        target = _target(edge)
        joined = joined.outerjoin(target, edge == target.c.id)
    return joined


def _among(columns: Mapping[str, Column[Any]], values: Sequence[Mapping[str, str | None]]) -> ColumnElement[bool]:
    """Membership that takes NULL for a value.

    Split by where the NULLs are, since plain equality can be hashed and indexed and ``IS NOT DISTINCT FROM`` cannot.
    """
    by_nulls: defaultdict[tuple[str, ...], list[Mapping[str, str | None]]] = defaultdict(list)
    for value in values:
        by_nulls[tuple(d for d in columns if value[d] is None)].append(value)

    def matches(nulls: tuple[str, ...], some: list[Mapping[str, str | None]]) -> ColumnElement[bool]:
        given = [d for d in columns if d not in nulls]
        conditions: list[ColumnElement[bool]] = [columns[d].is_(None) for d in nulls]
        if given:
            arrays = (literal([v[d] for v in some], ARRAY(Text)) for d in given)
            wanted = func.unnest(*arrays).table_valued(*given).render_derived()
            conditions.append(tuple_(*(columns[d] for d in given)).in_(select(*(wanted.c[d] for d in given))))
        return and_(true(), *conditions)

    return or_(*(matches(nulls, some) for nulls, some in by_nulls.items())) if by_nulls else ~true()


def _condition(rule: Rule) -> ColumnElement[bool]:
    column = TABLES[rule.table].c[rule.column]
    positive = {"neq": "eq", "not_in": "in"}.get(rule.operator, rule.operator)
    compare = _compare_column if rule.json_path is None else _compare_json
    condition = compare(column, positive, rule)
    return condition if positive == rule.operator else condition.is_not(true())


def _compare_column(column: Column[Any], op: str, rule: Rule) -> ColumnElement[bool]:
    timed = column.type.python_type is datetime
    if op == "in":
        values = [parse_time(v) for v in rule.value] if timed else list(rule.value)
        # As bigint[] the list would be rounded to whole numbers.
        type_ = Numeric() if column.type.python_type is int else column.type
        return column == any_(literal(values, ARRAY(type_)))
    value = parse_time(rule.value) if timed and rule.value is not None else rule.value
    if op == "eq":
        return column.is_(None) if value is None else column == value
    if op == "like":
        return column.like(value)
    ordered = column.collate("C") if isinstance(value, str) else column
    return _ORDERINGS[op](ordered, value)  # type: ignore[no-any-return]


def _compare_json(column: Column[Any], op: str, rule: Rule) -> ColumnElement[bool]:
    """Comparisons of jsonb with jsonb, which never fail; ordering across JSON types is excluded by the type's name."""
    assert rule.json_path is not None
    found, value = column[tuple(rule.json_path.split("."))], rule.value
    if op == "in":
        listed = cast(literal([json.dumps(v) for v in value], ARRAY(Text)), ARRAY(JSONB))
        return found == any_(listed)
    if op == "eq":
        if value is None:
            return func.coalesce(func.jsonb_typeof(found), "null") == "null"
        return found == cast(value, JSONB)
    if isinstance(value, str):
        text = found.astext.collate("C")
        matches = text.like(value) if op == "like" else _ORDERINGS[op](text, value)
        return and_(func.jsonb_typeof(found) == "string", matches)
    return and_(func.jsonb_typeof(found) == "number", _ORDERINGS[op](found, cast(value, JSONB)))
