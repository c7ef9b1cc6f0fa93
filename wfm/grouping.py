"""Filter rules and group_by as SQL: which raw data packages a data grouping holds, and how a step divides them.

What rules and dimensions may look at is found by search: every table that foreign keys lead to from
`raw_data_package`, and theirs from there (`WAYS`). A foreign key is many-to-one, so joining along it never multiplies
packages, and everything that is reached is a function of the package. Workflow tables refer to the catalogue and never
the other way round, so none of them is reached. A new table or column of the catalogue needs no code here.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Struct, structs
from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    FromClause,
    Numeric,
    Select,
    Text,
    and_,
    any_,
    case,
    cast,
    func,
    literal,
    or_,
    select,
    true,
    tuple_,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql import visitors
from sqlalchemy.sql.elements import _truncated_label  # a name that is cut where it is longer than Postgres allows

from wfm.errors import nearest
from wfm.schema import executed_obs_unit, obs_unit, raw_data_package, site

if TYPE_CHECKING:
    from sqlalchemy import Column, Table

T = TypeVar("T")

# --- the catalogue as rules see it ---

Way: TypeAlias = "tuple[Column[Any], ...]"
"""Foreign keys from the package to a table."""


def _target(edge: Column[Any]) -> Table:
    """The table that a foreign key refers to."""
    (key,) = edge.foreign_keys
    return key.column.table


def search(start: Table) -> dict[str, Way]:
    """By name, every table that foreign keys lead to from a table, each with the one way there.

    A foreign key with ``info={"followed": False}`` is not followed.

    Raises:
        ValueError: there are two ways to a table, so that "its" row would mean two things.
    """
    found: dict[str, Way] = {start.name: ()}
    open_ = [start]
    for table in open_:
        for column in table.c:
            if not column.foreign_keys or not column.info.get("followed", True):
                continue
            goal, way = _target(column), (*found[table.name], column)
            if goal.name in found:
                ways = " and ".join(" > ".join(map(str, w)) or "itself" for w in (found[goal.name], way))
                message = f"two ways lead from {start.name} to {goal.name}: {ways}"
                raise ValueError(f'{message}; give all but one of them info={{"followed": False}}')
            found[goal.name] = way
            open_.append(goal)
    return found


WAYS = search(raw_data_package)
TABLES: dict[str, Table] = {name: _target(way[-1]) if way else raw_data_package for name, way in WAYS.items()}
"""The tables that rules may look at."""

_KINDS: dict[type, str] = {
    str: "text",
    bool: "boolean",
    int: "number",
    float: "number",
    Decimal: "number",
    datetime: "time",
    object: "json",
}


def _kind(column: Column[Any]) -> str | None:
    """What a column holds; None where rules cannot look at it."""
    try:
        return _KINDS.get(column.type.python_type)
    except NotImplementedError:
        return None


def _columns(table: Table) -> dict[str, Column[Any]]:
    return {c.name: c for c in table.c if _kind(c)}


# --- rules ---

_ORDERINGS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
_LISTS = ("in", "not_in")
_ALONE = ("is_null", "not_null")
OPERATORS = ("eq", "neq", *_LISTS, *_ORDERINGS, "like", *_ALONE)

_NEGATED = {"neq": "eq", "not_in": "in", "not_null": "is_null"}
"""Operators that are the exact complement of another."""

TYPES = ("text", "number", "boolean", "time")
"""As what a rule may compare what stands at a JSON path."""

MOST_NESTED = 3
"""So deep may ``any_of`` lie in ``any_of``."""

_EXPECTED = {
    "text": "text",
    "number": "a finite number",
    "boolean": "true or false",
    "time": "an ISO 8601 time such as 2025-06-01T04:30:00Z (UTC where no offset is given)",
    "json": "a text, a finite number, true or false",
}


class Rule(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One condition on a package; the rules of a grouping are joined by AND.

    ``neq``, ``not_in`` and ``not_null`` are the exact complements of ``eq``, ``in`` and ``is_null``: a package without
    a source is not NGC253. Texts are ordered by code point, whatever the collation of the database.

    Attributes:
        table: one of `TABLES`. column: one of its columns.
        operator: one of `OPERATORS`.
        value: a list for ``in`` and ``not_in``, none for ``is_null`` and ``not_null``; null (with ``eq`` or ``neq``)
            stands for "nothing there".
        json_path: dotted path into a JSON column. Without `type` the comparison has the JSON type of the value: a
            number compares numerically, and data of another type equals nothing and is neither larger nor smaller.
        type: one of `TYPES`: what stands at the path is read as that first (a time or a number may stand there as a
            text); what cannot be read so counts as nothing.
    """

    table: str
    column: str
    operator: str
    value: Any = None
    json_path: str | None = None
    type: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that it asks for by name; none for other rules."""
        values = {"eq": [self.value], "in": self.value}.get(self.operator, [])
        return tuple(v for v in values if isinstance(v, str))

    def __str__(self) -> str:
        at = f" at {self.json_path}" if self.json_path else ""
        as_ = f" (as {self.type})" if self.type else ""
        value = "" if self.operator in _ALONE else f" {msgspec.json.encode(self.value).decode()}"
        return f"{self.table}.{self.column}{at}{as_} {self.operator}{value}"


class AnyOf(Struct, frozen=True):
    """Holds where one of its members does; the conditions of a member are joined by AND."""

    any_of: tuple[tuple[Condition, ...], ...]

    def __str__(self) -> str:
        return "any of: " + " | ".join(" and ".join(map(str, member)) for member in self.any_of)


Condition: TypeAlias = "Rule | AnyOf"


def rules_from(rules: Sequence[Any]) -> list[Condition]:
    """Checked rules (see `validate_rules`) from their JSON form."""
    return [_condition_from(rule) for rule in rules]


def _condition_from(rule: Any) -> Condition:
    if isinstance(rule, Rule | AnyOf):
        return rule
    if "any_of" in rule:
        return AnyOf(tuple(tuple(rules_from(_member(m))) for m in rule["any_of"]))
    return msgspec.convert(rule, Rule)


def _member(member: Any) -> Sequence[Any]:
    """A member of ``any_of`` as a list: one rule stands for itself."""
    return member if isinstance(member, list | tuple) else [member]


def in_order(rule: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's JSON form with its keys in the order in which people write them."""
    if "any_of" in rule:
        return {"any_of": [[*map(in_order, m)] if isinstance(m, list) else in_order(m) for m in rule["any_of"]]}
    return {key: rule[key] for key in Rule.__struct_fields__ if key in rule}


def unknown(what: str, name: object, allowed: Collection[str], now: str = "") -> str:
    """The text for a name that does not exist: the nearest one that does, and all of them if they are few.

    Args:
        now: what the thing of this name was renamed to.
    """
    if now:
        return f"unknown {what} {name!r}: it is called {now!r} now"
    near = nearest(name, allowed)
    listed = "" if len(allowed) > 20 else f"; allowed: {', '.join(allowed)}" if allowed else "; there are none yet"
    return f"unknown {what} {name!r}" + (f", did you mean {near!r}?" if near else "") + listed


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


# --- faults of rules ---

Path = tuple[str | int, ...]
"""Keys and indices that lead to a rule."""


def number(path: Path) -> str:
    """The number of a rule as people count: ``2.1.3`` is the third of the first member of the second rule's any_of."""
    return ".".join(str(p + 1) for p in path if isinstance(p, int))


def validate_rules(rules: object) -> list[str]:
    """Every fault of a grouping's rules, one line each; empty if `select_packages` can use them."""
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        return [f"rules: expected a list of rules, got {rules!r}"]
    return [f"rule {number(at)}: {fault}" for n, rule in enumerate(rules) for at, fault in rule_faults(rule, (n,))]


def rule_faults(rule: object, at: Path = (), depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Every fault of one rule (a `Rule`, an `AnyOf`, or a mapping with their fields), and where it lies.

    Args:
        at: where the rule lies.
    """
    if isinstance(rule, Rule | AnyOf):
        rule = structs.asdict(rule)
    if isinstance(rule, Mapping) and "any_of" in rule:
        yield from _any_of_faults(rule, at, depth)
    else:
        yield from ((at, fault) for fault in _rule_faults(rule))


def _any_of_faults(rule: Mapping[str, Any], at: Path, depth: int) -> Iterator[tuple[Path, str]]:
    for key in rule:
        if key != "any_of":
            yield at, f"any_of stands alone, without {key!r}; further rules go into its members"
    members, here = rule["any_of"], (*at, "any_of")
    if depth >= MOST_NESTED:
        yield here, f"any_of lies deeper than {MOST_NESTED} of them"
    elif not isinstance(members, list | tuple) or not members:
        yield here, f"any_of needs a list of rules, or of lists of rules, with at least one, got {members!r}"
    else:
        for n, member in enumerate(members):
            if isinstance(member, list | tuple) and not member:
                yield (*here, n), "a member of any_of needs at least one rule"
            for i, inner in enumerate(_member(member)):
                place = (*here, n, i) if isinstance(member, list | tuple) else (*here, n)
                yield from rule_faults(inner, place, depth + 1)


def _rule_faults(rule: object) -> list[str]:
    if not isinstance(rule, Mapping):
        return [f"expected a mapping with table, column, operator and value, or with any_of, got {rule!r}"]
    fields, alone = structs.fields(Rule), rule.get("operator") in _ALONE
    faults = [unknown("key", key, Rule.__struct_fields__) for key in rule if key not in Rule.__struct_fields__]
    faults += [f"missing key {f.name!r}" for f in fields if f.required and f.name not in rule]
    if alone and rule.get("value") is not None:
        faults.append(f"operator {rule['operator']} takes no value, got {rule['value']!r}")
    elif not alone and "value" not in rule:
        faults.append("missing key 'value'")

    table = _lookup("table", rule["table"], TABLES, faults) if "table" in rule else None
    if table is None or "column" not in rule:
        column = None
    else:
        column = _lookup(f"{table.name} column", rule["column"], _columns(table), faults)
    if "operator" in rule:
        _lookup("operator", rule["operator"], dict.fromkeys(OPERATORS), faults)
    type_ = None if rule.get("type") is None else _lookup("type", rule["type"], {t: t for t in TYPES}, faults)
    if column is None:
        return faults

    kind, path = str(_kind(column)), rule.get("json_path")
    if type_ is not None and kind != "json":
        faults.append(f"type is for what stands at a json_path; {column} holds a {kind}")
    faults += _path_faults(column, path)
    if rule.get("operator") in OPERATORS and "value" in rule and not alone:
        faults += _value_faults(
            str(column), type_ if type_ and kind == "json" else kind, rule["operator"], rule["value"]
        )
    return faults


def _path_faults(column: Column[Any], path: object) -> list[str]:
    kind = _kind(column)
    if path is not None and kind != "json":
        return [f"json_path is for JSON columns only; {column} holds a {kind}"]
    if path is None and kind == "json":
        return [f"{column} is a JSON column: json_path must say where to look"]
    if path is not None and not (isinstance(path, str) and storable(path) and all(path.split("."))):
        return [f"json_path {path!r} is not a dotted path such as observation.frequency_ghz"]
    return []


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
        return kind in ("boolean", "json")
    if isinstance(value, int | float):
        return kind in ("number", "json") and math.isfinite(value)
    if not isinstance(value, str) or not storable(value) or kind in ("number", "boolean"):
        return False
    if kind == "time":
        try:
            parse_time(value)
        except (ValueError, OverflowError):
            return False
    return True


# --- dimensions ---


class Dimension(Struct, frozen=True):
    """What a step may group by: a text for each package, NULL where there is nothing.

    Attributes:
        value: the text. tables: it is a function of one row of each of these.
        key: it tells the rows of its table apart, and so fixes everything that foreign keys lead to from there.
    """

    value: ColumnElement[Any]
    tables: tuple[Table, ...]
    key: bool = False


def _night() -> ColumnElement[str]:
    """The day on which the night of an observation began: from noon to noon, by the clocks of the instrument's site."""
    zone = func.coalesce(site.c.time_zone, "UTC")
    clocks = func.timezone(zone, executed_obs_unit.c.started_at, type_=DateTime())
    return func.to_char(clocks - timedelta(hours=12), "YYYY-MM-DD", type_=Text())


def at_time(value: ColumnElement[Any], began: ColumnElement[Any]) -> ColumnElement[Any]:
    """A dimension's value where an observation began at that time."""

    def replaced(element: Any, **_: Any) -> Any:
        return began if element is executed_obs_unit.c.started_at else None

    result: ColumnElement[Any] = visitors.replacement_traverse(value, {}, replaced)
    return result


DIMENSIONS: dict[str, Dimension] = {
    **{name: Dimension(t.c.name, (t,), True) for name, t in TABLES.items() if "name" in t.c and t.c.name.unique},
    "line": Dimension(obs_unit.c.line, (obs_unit,)),
    "night": Dimension(_night(), (executed_obs_unit, site)),
}
"""Dimensions with a name of their own. Beside them: ``TABLE.COLUMN``, and ``TABLE.COLUMN:JSON.PATH``."""

_OWN_NAMES = {str(d.value): name for name, d in DIMENSIONS.items()}


def dimension(name: object) -> Dimension | str:
    """A dimension by its name; what is wrong with the name where it has none."""
    if isinstance(name, str) and name in DIMENSIONS:
        return DIMENSIONS[name]
    if not isinstance(name, str) or "." not in name:
        return f"{unknown('dimension', name, DIMENSIONS)}, TABLE.COLUMN, TABLE.COLUMN:JSON.PATH"
    place, colon, path = name.partition(":")
    table_name, _, column_name = place.partition(".")
    faults: list[str] = []
    table = _lookup("table", table_name, TABLES, faults)
    column = _lookup(f"{table_name} column", column_name, _columns(table), faults) if table is not None else None
    if column is None:
        return f"dimension {name!r}: {faults[0]}"
    faults += _path_faults(column, path if colon else None)
    if column.primary_key or column.foreign_keys:
        faults.append(f"{column} means something in this database only; group by a name instead")
    elif _kind(column) == "time":
        faults.append(f"{column} is a time: each would be a unit of its own")
    elif name in _OWN_NAMES:
        faults.append(f"its name is {_OWN_NAMES[name]}")
    if faults:
        return f"dimension {name!r}: {faults[0]}"
    return Dimension(_json_text(_at(column, path)) if path else _text(column), (column.table,))


def validate_group_by(dims: object) -> list[str]:
    """Every fault of a step's group_by, one line each."""
    if not isinstance(dims, Sequence) or isinstance(dims, str):
        return [f"group_by: expected a list of dimensions, got {dims!r}; allowed: {', '.join(DIMENSIONS)}"]
    faults = [found for d in dims if isinstance(found := dimension(d), str)]
    return faults + [f"dimension {d!r} is named twice" for n, d in enumerate(dims) if d in dims[:n]]


def _dimensions(dims: Collection[str]) -> dict[str, Dimension]:
    """Checked dimensions, in canonical order."""
    found = {name: dimension(name) for name in sorted(dims)}
    return {name: d for name, d in found.items() if isinstance(d, Dimension)}


def determines(finer: Sequence[str], coarser: Sequence[str]) -> list[str]:
    """The dimensions of ``coarser`` that the values of ``finer`` do not fix; both are checked with `validate_group_by`.

    Empty means that each unit of ``finer`` lies in exactly one unit of ``coarser``, so that a step grouped by
    ``coarser`` may depend on one grouped by ``finer``.
    """
    keys = {t.name for d in _dimensions(finer).values() if d.key for t in d.tables}
    passed = {name: {raw_data_package.name, *(_target(edge).name for edge in way)} for name, way in WAYS.items()}
    coarse = _dimensions(coarser)
    return [d for d in coarser if d not in finer and not all(keys & passed[t.name] for t in coarse[d].tables)]


def canonical(dims: Sequence[str]) -> str:
    """The one text for a set of dimensions: a sorted JSON list. Steps with equal texts share their units."""
    return json.dumps(sorted(dims), separators=(",", ":"))


_SLUG_CHARACTERS = 63
_NOT_IN_SLUGS = re.compile(r"[^a-z0-9._]+")


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
    slugs = (_NOT_IN_SLUGS.sub("-", ("none" if v is None else v).lower()) for _, v in exact)
    slug = "-".join(s for s in (s.strip("-._") for s in slugs) if s)[:_SLUG_CHARACTERS]
    return f"{slug}-{digest}" if slug else digest


# --- SQL ---

NOT_REVOKED: ColumnElement[bool] = raw_data_package.c.revoked_by == ""
"""What is revoked belongs to no grouping, whatever its rules say."""


def select_packages(
    rules: Sequence[Condition],
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
        like the dimension. A package comes once or not at all; a revoked one not at all.
    """
    found = _dimensions(dims)
    columns = {name: d.value for name, d in found.items()}
    conditions = [NOT_REVOKED, *(condition(rule) for rule in rules)]
    if package_ids is not None:
        conditions.append(raw_data_package.c.id == any_(literal(list(package_ids), ARRAY(BigInteger))))
    if values is not None:
        conditions.append(_among(columns, values))
    return (
        select(
            raw_data_package.c.id, raw_data_package.c.item, *(c.label(_truncated_label(d)) for d, c in columns.items())
        )
        .select_from(joined(rules, dims))
        .where(*conditions)
    )


def joined(rules: Sequence[Condition], dims: Sequence[str] = ()) -> FromClause:
    """The packages, joined with all that rules and dimensions look at: each join once, none of them drops a package."""
    tables = [rule.table for rule in leaves(rules)] + [t.name for d in _dimensions(dims).values() for t in d.tables]
    result: FromClause = raw_data_package
    for edge in dict.fromkeys(edge for name in tables for edge in WAYS[name]):
        result = result.outerjoin(_target(edge), edge == _target(edge).c.id)
    return result


def leaves(rules: Sequence[Condition]) -> Iterator[Rule]:
    """All single rules, also those in any_of."""
    for rule in rules:
        if isinstance(rule, Rule):
            yield rule
        else:
            for member in rule.any_of:
                yield from leaves(member)


def _among(
    columns: Mapping[str, ColumnElement[Any]], values: Sequence[Mapping[str, str | None]]
) -> ColumnElement[bool]:
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
            wanted = func.unnest(*arrays).table_valued(*(f"v{n}" for n, _ in enumerate(given))).render_derived()
            conditions.append(tuple_(*(columns[d] for d in given)).in_(select(*wanted.c)))
        return and_(true(), *conditions)

    return or_(*(matches(nulls, some) for nulls, some in by_nulls.items())) if by_nulls else ~true()


def condition(rule: Condition) -> ColumnElement[bool]:
    """Whether a rule holds, for rows of `joined`; NULL and false both mean that it does not."""
    if isinstance(rule, AnyOf):
        return or_(*(and_(*map(condition, member)) for member in rule.any_of))
    op = _NEGATED.get(rule.operator, rule.operator)
    if op == "eq" and rule.value is None:
        op = "is_null"
    column = TABLES[rule.table].c[rule.column]
    if rule.json_path is None:
        holds = _compare(column, str(_kind(column)), op, rule.value)
    elif rule.type is None:
        holds = _compare_json(_at(column, rule.json_path), op, rule.value)
    else:
        holds = _compare(_READ_AS[rule.type](_at(column, rule.json_path)), rule.type, op, rule.value)
    return holds.is_not(true()) if rule.operator in _NEGATED else holds


def text_of(rule: Rule) -> ColumnElement[str]:
    """What a rule looks at, as text: a column, or the scalar at a path in it."""
    column = TABLES[rule.table].c[rule.column]
    return cast(column, Text) if rule.json_path is None else _json_text(_at(column, rule.json_path))


def _compare(value: ColumnElement[Any], kind: str, op: str, given: Any) -> ColumnElement[bool]:
    if op == "is_null":
        return value.is_(None)
    parse = parse_time if kind == "time" else lambda v: v
    if op == "in":
        return value == any_(literal([parse(v) for v in given], ARRAY(_SQL_TYPES[kind])))
    if op == "eq":
        return value == parse(given)
    if op == "like":
        return value.like(given)
    ordered = value.collate("C") if kind == "text" else value
    return _ORDERINGS[op](ordered, parse(given))  # type: ignore[no-any-return]


# As bigint[], a list would be rounded to whole numbers.
_SQL_TYPES: dict[str, Any] = {
    "text": Text(),
    "number": Numeric(),
    "boolean": Boolean(),
    "time": DateTime(timezone=True),
}


def _compare_json(found: ColumnElement[Any], op: str, value: Any) -> ColumnElement[bool]:
    """Comparisons of jsonb with jsonb, which never fail; ordering across JSON types is excluded by the type's name."""
    if op == "is_null":
        return func.coalesce(func.jsonb_typeof(found), "null") == "null"
    if op == "in":
        listed = cast(literal([json.dumps(v) for v in value], ARRAY(Text)), ARRAY(JSONB))
        return found == any_(listed)
    if op == "eq":
        return found == cast(value, JSONB)
    if isinstance(value, str):
        text = _as_text(found).collate("C")
        matches = text.like(value) if op == "like" else _ORDERINGS[op](text, value)
        return and_(func.jsonb_typeof(found) == "string", matches)
    return and_(func.jsonb_typeof(found) == "number", _ORDERINGS[op](found, cast(value, JSONB)))


def _at(column: ColumnElement[Any], path: str) -> ColumnElement[Any]:
    return column[tuple(path.split("."))]


def _as_text(found: ColumnElement[Any]) -> ColumnElement[str]:
    """A JSON value as text; a JSON text without its quotes."""
    return found.astext  # type: ignore[no-any-return]


def _json_text(found: ColumnElement[Any]) -> ColumnElement[str]:
    """The text of a scalar, NULL for all else; equal numbers (1, 1.0, 1e0) have equal texts."""
    kind, text = func.jsonb_typeof(found), _as_text(found)
    digits = cast(func.trim_scale(cast(text, Numeric)), Text)
    return case((kind.in_(["string", "boolean"]), text), (kind == "number", digits))


def _json_number(found: ColumnElement[Any]) -> ColumnElement[Any]:
    kind, text = func.jsonb_typeof(found), _as_text(found)
    readable = or_(kind == "number", and_(kind == "string", text.regexp_match(_NUMBER)))
    return case((readable, cast(text, Numeric)))


def _json_boolean(found: ColumnElement[Any]) -> ColumnElement[Any]:
    text = _as_text(found)
    scalar = func.jsonb_typeof(found).in_(["string", "boolean"])
    return case((and_(scalar, text.in_(["true", "false"])), text == "true"))


def _json_time(found: ColumnElement[Any]) -> ColumnElement[Any]:
    text = _as_text(found)
    readable = and_(func.jsonb_typeof(found) == "string", text.regexp_match(_TIME))
    return case((readable, cast(text, DateTime(timezone=True))))


_READ_AS: dict[str, Callable[[ColumnElement[Any]], ColumnElement[Any]]] = {
    "text": _json_text,
    "number": _json_number,
    "boolean": _json_boolean,
    "time": _json_time,
}

_NUMBER = r"^[-+]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][-+]?[0-9]{1,3})?$"

# Exactly what a cast to timestamptz takes: one package with a 30th of February must not make the statement fail.
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    r"(?!0000)([0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
    rf"|{_LEAP_YEAR}-02-29)"
)
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,9})?)?(Z|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)?"
_TIME = rf"^{_DATE}([T ]{_CLOCK})?$"


def _text(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """A column's value as text; equal values have equal texts."""
    kind = column.type.python_type
    if kind is str:
        return column
    return cast(column if kind is bool else func.trim_scale(cast(column, Numeric)), Text)
