"""The pure half of grouping: faults of rules and dimensions, what determines what, keys of units."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wfm.grouping import (
    DIMENSIONS,
    TABLES,
    Rule,
    canonical,
    determines,
    rule_faults,
    rules_from,
    unit_key,
    validate_group_by,
    validate_rules,
)


def rule(table: str = "source", column: str = "name", operator: str = "eq", value: Any = "NGC253", **more: Any) -> Any:
    return {"table": table, "column": column, "operator": operator, "value": value, **more}


def json_rule(operator: str, value: Any, json_path: Any = "observation.frequency_ghz") -> Any:
    return rule("raw_data_package", "metadata", operator, value, json_path=json_path)


@pytest.mark.parametrize(
    "good",
    [
        rule(),
        rule(operator="in", value=[]),
        rule(operator="not_in", value=["NGC253", "M31"]),
        rule(operator="like", value="NGC%"),
        rule(operator="like", value="100\\%"),
        rule(operator="neq", value=None),
        rule("raw_data_package", "size", "gte", 10**30),
        rule("raw_data_package", "size", "in", [1, 2.5]),
        rule("executed_obs_unit", "started_at", "lt", "2025-06-01"),
        rule("executed_obs_unit", "started_at", "gt", "2025-06-01T04:30:00+02:00"),
        json_rule("gt", 400),
        json_rule("eq", True),
        json_rule("in", ["a", 1, False]),
        json_rule("like", "CO%"),
        Rule("source", "name", "eq", "NGC253"),
    ],
)
def test_a_good_rule_has_no_fault(good: Any) -> None:
    assert rule_faults(good) == []


@pytest.mark.parametrize(
    ("bad", "texts"),
    [
        (5, ["expected a mapping"]),
        ({}, ["missing key 'table'", "'column'", "'operator'", "'value'"]),
        (rule(jsonpath="a"), ["unknown key 'jsonpath', did you mean 'json_path'?"]),
        (rule("sorce"), ["unknown table 'sorce', did you mean 'source'?; allowed: raw_data_package, "]),
        ({**rule(), "table": ["source"]}, ["unknown table ['source']"]),
        (rule(column="nam"), ["unknown source column 'nam', did you mean 'name'?; allowed: id, name, "]),
        (rule(operator="is"), ["unknown operator 'is'; allowed: eq, neq, in, not_in, gt, gte, lt, lte, like"]),
        (rule(value=253), ["value 253 does not fit source.name: expected text"]),
        (rule(value="a\0b"), ["does not fit source.name"]),
        (rule(value="\ud800"), ["does not fit source.name"]),
        (rule(value=["NGC253"]), ["does not fit source.name"]),
        (rule(operator="in"), ["operator in needs a list of values, got 'NGC253'"]),
        (rule(operator="in", value=["a", None]), ["value None does not fit"]),
        (rule(operator="gt", value=None), ["value None does not fit"]),
        (rule(operator="like", value="a\\"), ["must not end with a single backslash"]),
        (rule(json_path="a"), ["json_path is for JSON columns only; source.name holds a text"]),
        (
            rule("raw_data_package", "size", value="5"),
            ["value '5' does not fit raw_data_package.size: expected a finite"],
        ),
        (rule("raw_data_package", "size", value=True), ["value True does not fit"]),
        (rule("raw_data_package", "size", value=float("nan")), ["value nan does not fit"]),
        (rule("raw_data_package", "size", "like", "5"), ["does not fit"]),
        (rule("raw_data_package", "size", "like", 5), ["operator like is for texts only"]),
        (rule("executed_obs_unit", "started_at", value="tonight"), ["expected an ISO 8601 time"]),
        (rule("executed_obs_unit", "started_at", "like", "2025-06-01"), ["operator like is for texts only"]),
        (json_rule("gt", 400, None), ["is a JSON column: json_path must say where to look"]),
        (json_rule("gt", 400, "a..b"), ["json_path 'a..b' is not a dotted path"]),
        (json_rule("gt", 400, "a\0b"), ["is not a dotted path"]),
        (json_rule("gt", 400, 7), ["json_path 7 is not a dotted path"]),
        (json_rule("gt", True), ["operator gt has no meaning for true; allowed: eq, neq, in, not_in"]),
        (json_rule("like", 4), ["operator like is for texts only"]),
        (json_rule("eq", {"a": 1}), ["expected a text, a finite number, true or false"]),
        (rule("sorce", operator="is", junk=1), ["unknown key 'junk'", "unknown table", "unknown operator"]),
    ],
)
def test_each_fault_of_a_rule_is_told(bad: Any, texts: list[str]) -> None:
    faults = rule_faults(bad)
    assert len(faults) == len(texts)
    for fault, text in zip(faults, texts, strict=True):
        assert text in fault


def test_faults_of_several_rules_carry_their_number() -> None:
    assert validate_rules([rule(), rule("sorce"), rule(operator="is")]) == [
        f"rule 2: {rule_faults(rule('sorce'))[0]}",
        f"rule 3: {rule_faults(rule(operator='is'))[0]}",
    ]
    assert validate_rules([]) == []
    assert "expected a list" in validate_rules("all")[0]


def test_rules_from_json() -> None:
    assert rules_from([rule(), json_rule("gt", 1)]) == [
        Rule("source", "name", "eq", "NGC253"),
        Rule("raw_data_package", "metadata", "gt", 1, "observation.frequency_ghz"),
    ]


def test_faults_of_group_by() -> None:
    assert validate_group_by(list(DIMENSIONS)) == validate_group_by([]) == []
    unknown, twice, odd = validate_group_by(["sorce", "line", "line", ["line"]])
    assert "unknown dimension 'sorce', did you mean 'source'?" in unknown
    assert "unknown dimension ['line']" in twice
    assert odd == "dimension 'line' is named twice"
    assert "expected a list" in validate_group_by("source")[0]


@pytest.mark.parametrize(
    ("finer", "coarser", "open_"),
    [
        ([], [], []),
        (["source"], [], []),
        ([], ["source"], ["source"]),
        (["raw_data_package"], list(DIMENSIONS), []),
        (["executed_obs_unit"], ["obs_unit", "source", "line", "observing_program"], []),
        (["executed_obs_unit"], ["source", "instrument"], ["instrument"]),
        (["executed_obs_unit", "instrument_module"], ["source", "instrument"], []),
        (["obs_unit"], ["line"], []),
        (["line"], ["line"], []),
        (["line"], ["obs_unit", "source"], ["obs_unit", "source"]),
        (["source"], ["obs_unit"], ["obs_unit"]),
        (["instrument"], ["instrument_module"], ["instrument_module"]),
    ],
)
def test_what_determines_what(finer: list[str], coarser: list[str], open_: list[str]) -> None:
    assert determines(finer, coarser) == open_


def test_dimensions_are_texts_of_tables_that_rules_can_name() -> None:
    assert all(c.type.python_type is str and TABLES[c.table.name] is c.table for c in DIMENSIONS.values())


def test_canonical_text() -> None:
    assert canonical(["source", "line"]) == canonical(["line", "source"]) == '["line","source"]'
    assert canonical([]) == "[]"


def test_a_unit_key_is_readable() -> None:
    assert unit_key({}) == "all"
    assert re.fullmatch(r"co-4-3-ngc253-[0-9a-f]{16}", unit_key({"source": "NGC253", "line": "CO(4-3)"}))
    assert re.fullmatch(r"none-[0-9a-f]{16}", unit_key({"source": None}))


def test_a_unit_key_does_not_depend_on_the_order_of_its_dimensions() -> None:
    assert unit_key({"source": "a", "line": "b"}) == unit_key({"line": "b", "source": "a"})
    assert unit_key({"source": "a", "line": "b"}) != unit_key({"line": "a", "source": "b"})


unit_values = st.dictionaries(st.sampled_from(["source", "line"]), st.none() | st.text(), min_size=1)


@given(unit_values)
@example({"source": "x" * 300, "line": "." * 300})
def test_a_unit_key_is_one_safe_path_component(values: dict[str, str | None]) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,79}", unit_key(values))


@given(unit_values, unit_values)
def test_unit_keys_differ_when_values_do(a: dict[str, str | None], b: dict[str, str | None]) -> None:
    assert (unit_key(a) == unit_key(b)) == (a == b)


@pytest.mark.parametrize(
    ("a", "b"), [("ngc253", "NGC253"), ("a b", "a-b"), (None, "none"), (None, ""), ("x" * 200, "x" * 201), ("..", ".")]
)
def test_unit_keys_differ_where_their_readable_part_does_not(a: str | None, b: str | None) -> None:
    assert unit_key({"source": a}) != unit_key({"source": b})
