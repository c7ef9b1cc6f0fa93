"""The pure half of grouping: faults of rules and dimensions, what determines what, keys of units."""

from __future__ import annotations

import re
import subprocess
import sys
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table

from wfm.grouping import (
    DIMENSIONS,
    TABLES,
    WAYS,
    AnyOf,
    Rule,
    canonical,
    determines,
    in_order,
    rule_faults,
    rules_from,
    search,
    unit_key,
    validate_group_by,
    validate_rules,
)


def rule(table: str = "source", column: str = "name", operator: str = "eq", value: Any = "NGC253", **more: Any) -> Any:
    return {"table": table, "column": column, "operator": operator, "value": value, **more}


def json_rule(operator: str, value: Any, json_path: Any = "observation.frequency_ghz") -> Any:
    return rule("raw_data_package", "metadata", operator, value, json_path=json_path)


def nested(depth: int) -> Any:
    return {"any_of": [nested(depth - 1)]} if depth else rule()


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
        {"table": "source", "column": "name", "operator": "is_null"},
        rule(operator="not_null", value=None),
        {**json_rule("is_null", None), "type": "time"},
        json_rule("gte", "2025-06-01", "taken.at") | {"type": "time"},
        json_rule("in", [1, 2.5]) | {"type": "number"},
        json_rule("like", "3%") | {"type": "text"},
        json_rule("eq", True) | {"type": "boolean"},
        {"any_of": [rule(), [rule(), json_rule("gt", 1)], {"any_of": [rule(), {"any_of": [rule()]}]}]},
        AnyOf(((Rule("source", "name", "eq", "NGC253"),),)),
    ],
)
def test_a_good_rule_has_no_fault(good: Any) -> None:
    assert list(rule_faults(good)) == []


@pytest.mark.parametrize(
    ("bad", "texts"),
    [
        (5, ["expected a mapping"]),
        (rule(operator="is_null"), ["operator is_null takes no value, got 'NGC253'"]),
        ({"table": "source", "column": "name", "operator": "eq"}, ["missing key 'value'"]),
        (rule(type="text"), ["type is for what stands at a json_path; source.name holds a text"]),
        (json_rule("eq", 1) | {"type": "int"}, ["unknown type 'int'; allowed: text, number, boolean, time"]),
        (
            json_rule("eq", "1") | {"type": "number"},
            [
                "value '1' does not fit",
            ],
        ),
        (json_rule("eq", "a") | {"type": "boolean"}, ["expected true or false"]),
        (json_rule("gt", "tonight") | {"type": "time"}, ["expected an ISO 8601 time"]),
        (json_rule("like", "2025%") | {"type": "time"}, ["value '2025%' does not fit"]),
        (json_rule("gt", True) | {"type": "boolean"}, ["operator gt has no meaning for true"]),
        ({"any_of": []}, ["any_of needs a list of rules"]),
        ({"any_of": rule()}, ["any_of needs a list of rules"]),
        ({"any_of": [[]]}, ["a member of any_of needs at least one rule"]),
        (
            {"any_of": [5, rule("sorce")], "table": "source"},
            ["any_of stands alone, without 'table'", "mapping", "sorce"],
        ),
        (nested(4), ["any_of lies deeper than 3 of them"]),
        ({}, ["missing key 'table'", "'column'", "'operator'", "'value'"]),
        (rule(jsonpath="a"), ["unknown key 'jsonpath', did you mean 'json_path'?"]),
        (rule("sorce"), ["unknown table 'sorce', did you mean 'source'?; allowed: raw_data_package, "]),
        ({**rule(), "table": ["source"]}, ["unknown table ['source']"]),
        (rule(column="nam"), ["unknown source column 'nam', did you mean 'name'?; allowed: id, name, "]),
        (rule(operator="is"), ["unknown operator 'is'"]),
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
    faults = [fault for _, fault in rule_faults(bad)]
    assert len(faults) == len(texts)
    for fault, text in zip(faults, texts, strict=True):
        assert text in fault


def test_faults_of_several_rules_carry_their_number() -> None:
    either = {"any_of": [rule("sorce"), [rule(), rule(operator="is")]]}
    ((_, sorce),), ((_, is_),) = rule_faults(rule("sorce")), rule_faults(rule(operator="is"))
    assert validate_rules([rule(), rule("sorce"), rule(operator="is"), either]) == [
        f"rule 2: {sorce}",
        f"rule 3: {is_}",
        f"rule 4.1: {sorce}",
        f"rule 4.2.2: {is_}",
    ]
    assert [at for at, _ in rule_faults(either, (3,))] == [(3, "any_of", 0), (3, "any_of", 1, 1)]
    assert validate_rules([]) == []
    assert "expected a list" in validate_rules("all")[0]


def test_rules_from_json() -> None:
    assert rules_from([rule(), json_rule("gt", 1)]) == [
        Rule("source", "name", "eq", "NGC253"),
        Rule("raw_data_package", "metadata", "gt", 1, "observation.frequency_ghz"),
    ]
    (either,) = rules_from([{"any_of": [rule(), [rule(), json_rule("gt", 1)]]}])
    assert either == AnyOf((tuple(rules_from([rule()])), tuple(rules_from([rule(), json_rule("gt", 1)]))))
    assert str(either) == (
        'any of: source.name eq "NGC253" | source.name eq "NGC253"'
        " and raw_data_package.metadata at observation.frequency_ghz gt 1"
    )
    assert str(Rule("source", "name", "is_null")) == "source.name is_null"
    assert str(Rule("source", "metadata", "gt", 1, "v", "number")) == "source.metadata at v (as number) gt 1"


def test_keys_of_rules_come_in_the_order_of_writing() -> None:
    turned = {"value": 1, "operator": "eq", "column": "size", "table": "raw_data_package"}
    order = ["table", "column", "operator", "value"]
    assert list(in_order(turned)) == order
    either = in_order({"any_of": [turned, [turned]]})
    assert [list(either["any_of"][0]), list(either["any_of"][1][0])] == [order, order]


def test_faults_of_group_by() -> None:
    assert validate_group_by(list(DIMENSIONS)) == validate_group_by([]) == []
    assert (
        validate_group_by(["source.type", "raw_data_package.size", "raw_data_package.metadata:observation.band"]) == []
    )
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
        (["obs_unit"], ["source.type", "obs_unit.metadata:band", "source"], []),
        (["source"], ["source.type", "obs_unit.metadata:band"], ["obs_unit.metadata:band"]),
        (["source.type"], ["source.type", "source"], ["source"]),
        (["raw_data_package"], ["night", "site"], []),
        (["executed_obs_unit", "instrument_module"], ["night"], []),
        (["executed_obs_unit", "site.time_zone"], ["night"], ["night"]),
        (["executed_obs_unit"], ["night"], ["night"]),
        (["night"], ["night"], []),
        (["night"], ["site"], ["site"]),
        (["raw_data_package"], ["raw_data_package.metadata:band"], []),
        (["executed_obs_unit"], ["raw_data_package.metadata:band"], ["raw_data_package.metadata:band"]),
    ],
)
def test_what_determines_what(finer: list[str], coarser: list[str], open_: list[str]) -> None:
    assert determines(finer, coarser) == open_


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("sorce.name", "unknown table 'sorce', did you mean 'source'?"),
        ("source.nam", "unknown source column 'nam', did you mean 'name'?"),
        ("source.name", "its name is source"),
        ("obs_unit.line", "its name is line"),
        ("source.id", "source.id means something in this database only"),
        ("obs_unit.source_id", "means something in this database only"),
        ("executed_obs_unit.started_at", "is a time"),
        ("source.metadata", "is a JSON column: json_path must say where to look"),
        ("source.metadata:", "json_path '' is not a dotted path"),
        ("source.metadata:a..b", "is not a dotted path"),
        ("source.type:a", "json_path is for JSON columns only"),
    ],
)
def test_faults_of_dimensions_of_columns(bad: str, text: str) -> None:
    (fault,) = validate_group_by([bad])
    assert fault.startswith(f"dimension {bad!r}: ")
    assert text in fault


def test_the_catalogue_is_found_by_search() -> None:
    assert (
        set(TABLES)
        == set(WAYS)
        == {
            *("raw_data_package", "executed_obs_unit", "obs_unit", "source", "observing_program"),
            *("instrument_module", "instrument", "site"),
        }
    )
    assert [str(edge) for edge in WAYS["source"]] == [
        "raw_data_package.executed_obs_unit_id",
        "executed_obs_unit.obs_unit_id",
        "obs_unit.source_id",
    ]


def tables(*more: Column[Any]) -> Table:
    """A package, its beam, and the beam's receiver and backend, with more columns for the package."""
    m = MetaData()
    Table("receiver", m, Column("id", Integer, primary_key=True))
    Table("beam", m, Column("id", Integer, primary_key=True), Column("receiver_id", ForeignKey("receiver.id")))
    beam = Column("beam_id", ForeignKey("beam.id"))
    return Table("package", m, Column("id", Integer, primary_key=True), beam, *more)


def test_a_second_way_to_a_table_is_refused() -> None:
    assert list(search(tables())) == ["package", "beam", "receiver"]
    ways = re.escape("package.receiver_id and package.beam_id > beam.receiver_id")
    with pytest.raises(ValueError, match=f"two ways lead from package to receiver: {ways}"):
        search(tables(Column("receiver_id", ForeignKey("receiver.id"))))
    with pytest.raises(ValueError, match=r"two ways lead from package to package: itself and package\.calibrator_id"):
        search(tables(Column("calibrator_id", ForeignKey("package.id"))))
    assert list(search(tables(Column("receiver_id", ForeignKey("receiver.id"), info={"followed": False})))) == [
        "package",
        "beam",
        "receiver",
    ]


def test_a_new_table_or_column_of_the_catalogue_needs_no_code() -> None:
    program = """
        from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Text
        from wfm import schema
        schema.Table("receiver", schema.metadata, Column("id", BigInteger, primary_key=True),
            Column("name", Text, unique=True), Column("cooled", Boolean))
        schema.instrument_module.append_column(Column("receiver_id", BigInteger, ForeignKey("receiver.id")))
        from wfm import grouping
        rule = {"table": "receiver", "column": "cooled", "operator": "eq", "value": True}
        assert grouping.validate_rules([rule]) == []
        assert grouping.validate_group_by(["receiver", "receiver.cooled"]) == []
        assert grouping.determines(["instrument_module"], ["receiver", "receiver.cooled"]) == []
        print(grouping.select_packages(grouping.rules_from([rule]), ["receiver"]))
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=True)
    assert "LEFT OUTER JOIN receiver ON instrument_module.receiver_id = receiver.id" in done.stdout


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
