"""Reading documents: what YAML means, and every fault with its line."""

# ruff: noqa: E501 - one case per line

from __future__ import annotations

from datetime import UTC, datetime
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wfm.documents import KINDS, load
from wfm.errors import DocumentError
from wfm.model import Resources, TriggerType, VersionPolicy
from wfm.yamltext import dump, refuse


def read(text: str) -> Any:
    """What the one document of a text says."""
    (document,) = load([("a.yaml", dedent(text))]).items
    return document.spec


def faults(text: str, name: str = "a.yaml") -> list[str]:
    return refused([(name, dedent(text).lstrip("\n"))])


def refused(files: list[tuple[str, str]]) -> list[str]:
    with pytest.raises(DocumentError) as caught:
        refuse(load(files).faults)
    return list(caught.value.faults)


CHAIN = """
kind: pipeline
name: chai
grouping: ngc253
steps:
  - name: calibrate
    software: chai-calibrate
    version: 1.10
    version_policy: pinned
    config: hot-cold
    group_by: [executed_obs_unit]
    resources: {cpu: 2, memory_gb: 4, time_hours: 0.5}
    environment: {OMP_NUM_THREADS: 2}
    cooldown_seconds: 60
  - name: map
    software: chai-map
    depends_on: [calibrate]
    group_by: [source, line]
"""


def test_a_pipeline() -> None:
    pipeline = read(CHAIN)
    calibrate, last = pipeline.steps
    assert (pipeline.name, pipeline.trigger_type, pipeline.enabled) == ("chai", TriggerType.CONTINUOUS, None)
    assert (calibrate.version, calibrate.version_policy) == ("1.10", VersionPolicy.PINNED)
    assert calibrate.resources == Resources(cpu=2, memory_gb=4, time_hours=0.5)
    assert calibrate.environment == {"OMP_NUM_THREADS": "2"}
    assert (last.depends_on, last.group_by, last.max_retries) == (("calibrate",), ("source", "line"), 3)


def test_documents_of_many_files_come_in_the_order_of_application() -> None:
    files = [("p.yaml", CHAIN), ("s.yaml", "kind: site\nname: here\n---\n---\nkind: grouping\nname: g\n...\n")]
    assert [d.kind for d in load(files).items] == ["site", "grouping", "pipeline"]


def test_plain_scalars_mean_what_astronomers_mean() -> None:
    metadata = read("""
        kind: source
        name: NO
        metadata: {line: NO, ra: 12:30:49, on: off, date: 2025-06-01, x: 1e3, y: 1.5, n: 0x10, z: "1", ok: true, q: ~}
        """).metadata
    assert metadata == {
        "line": "NO",
        "ra": "12:30:49",
        "on": "off",
        "date": "2025-06-01",
        "x": 1000.0,
        "y": 1.5,
        "n": 16,
        "z": "1",
        "ok": True,
        "q": None,
    }


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
    | st.sampled_from(["NO", "1e3", "12:30", "0x1", "~", "", "true", ".nan", "<<", "=", "1_0", "2025-06-01", "0o7"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner)
    ),
    max_leaves=6,
)


@given(json_values)
def test_what_dump_writes_load_reads(value: Any) -> None:
    written = dump([{"kind": "config", "name": "c", "parameters": {"value": value}}])
    read_back = read(written).parameters["value"]
    assert read_back == value
    assert repr(read_back) == repr(value)


def test_a_package() -> None:
    package = read(f"""
        kind: raw_data_package
        name: p1
        executed_obs_unit: {{name: e1, obs_unit: o1, started_at: 2025-06-01T04:30:00}}
        module: LFA
        instrument: CHAI
        files:
          - {{name: a/b.fits, size: 10, checksum: "sha256:{"0" * 64}"}}
        location: archive
        path: 2025/p1
        """)
    assert package.executed_obs_unit.started_at == datetime(2025, 6, 1, 4, 30, tzinfo=UTC)
    assert package.size == 10


def test_five_faults_in_one_pipeline_are_five_faults_with_their_lines() -> None:
    assert faults(
        """
        kind: pipeline
        name: chai
        grouping: ngc253
        triger: CONTINUOUS
        steps:
          - name: calibrate
            software: chai-calibrate
            group_by: [source]
            max_retries: -1
          - name: map
            software: chai-map
            version: newest
            depends_on: [calibrate]
            group_by: [source, line]
            environment:
              WORKFLOW_INPUT_DIR: /tmp
        """,
        "chai.yaml",
    ) == [
        "chai.yaml:4: unknown key 'triger', did you mean 'trigger'?; allowed: kind, name, renamed_from, description, grouping, "
        "location, trigger, trigger_config, enabled, priority, weight, max_in_flight, stale_priority, steps",
        "chai.yaml:9: steps[0].max_retries: expected a whole number from 0 to 1000, got '-1'",
        "chai.yaml:12: 'newest' is not a version such as 1.4.0",
        "chai.yaml:13: step 'map' is grouped by line, which the units of 'calibrate' (grouped by source) do not "
        "determine: a step must be as coarse as what it depends on; group 'calibrate' also by one of: "
        "raw_data_package, executed_obs_unit, obs_unit, line",
        "chai.yaml:16: environment: WORKFLOW_INPUT_DIR belongs to wfm: WORKFLOW_* cannot be set",
    ]


def test_faults_of_all_files_come_together_in_order() -> None:
    files = [("b.yaml", "kind: site\n"), ("a.yaml", "- 1\n---\nkind: sight\nname: x\n")]
    assert [f.split(": ")[0] for f in refused(files)] == ["a.yaml:1", "a.yaml:3", "b.yaml:1"]


def step(text: str) -> str:
    return "kind: pipeline\nname: p\ngrouping: g\nsteps:\n- {name: a, software: s, " + text + "}\n"


def package(text: str = "", files: str = "[{name: f, size: 1, checksum: 'sha256:%s'}]" % ("0" * 64)) -> str:
    head = "kind: raw_data_package\nname: p\nexecuted_obs_unit: {name: e}\nmodule: m\nlocation: l\npath: x\n"
    return f"{head}files: {files}\n{text}"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        # YAML
        ("kind: [site\nname: x\n", 2, "expected ',' or ']'"),
        ("kind: site\nname: a\x07b\n", 2, "the character #x0007 is not allowed"),
        ("kind: site\nname: x\nname: y\n", 3, "key 'name' comes twice (first in line 2)"),
        ("kind: source\nname: x\nmetadata:\n  a: {b: 1, b: 2}\n", 4, "metadata.a: key 'b' comes twice"),
        ("kind: source\nname: x\nmetadata: {[1]: 2}\n", 3, "expected a text as key, got a list"),
        ("kind: source\nname: x\nmetadata: &a {b: *a}\n", 3, "aliases are not supported"),
        ("kind: source\nname: x\nmetadata: {a: !!python/object:os.system 1}\n", 3, "tag"),
        ("kind: source\nname: x\nmetadata: {a: !secret 1}\n", 3, "the tag !secret is not allowed"),
        ("kind: source\nname: x\nmetadata: {a: .nan}\n", 3, "metadata.a: '.nan' is not a finite number"),
        ("kind: source\nname: x\nmetadata: {a: 1e999}\n", 3, "metadata.a: '1e999' is not a finite number"),
        ("kind: source\nname: x\nmetadata: {a: !!int x}\n", 3, "metadata.a: 'x' is not a int"),
        ('kind: source\nname: x\nmetadata: {a: "b\\0"}\n', 3, "has characters that cannot be stored"),
        ('kind: source\nname: x\nmetadata: {"b\\0": a}\n', 3, "expected a text as key"),
        ('kind: source\nname: x\nmetadata: {a: "\\ud800"}\n', 3, "has characters that cannot be stored"),
        ("kind: source\nname: x\nmetadata: " + "[" * 2000 + "]" * 2000, 1, "nested too deeply"),
        # shape
        ("- kind: site\n", 1, "expected a document with kind and name, got a list"),
        ("name: x\n", 1, "missing key 'kind'; allowed: site, location, "),
        ("kind: sight\nname: x\n", 1, "unknown kind 'sight', did you mean 'site'?"),
        ("kind: {a: 1}\nname: x\n", 1, "unknown kind ''"),
        ("kind: site\n", 1, "missing key 'name'"),
        ("kind: site\nname: x\ndescripton: y\n", 3, "unknown key 'descripton', did you mean 'description'?"),
        ("kind: site\nname:\n", 2, "name: expected a name: 1 to 200 characters"),
        ("kind: site\nname: ' x'\n", 2, "name: expected a name: 1 to 200 characters"),
        ('kind: site\nname: "x\\n"\n', 2, "name: expected a name: 1 to 200 characters"),
        ("kind: site\nname: [x]\n", 2, "name: expected a name: 1 to 200 characters on one line, no space at its ends, got a list"),
        ("kind: site\nname: x\ndescription:\n", 3, "description: expected text, got nothing"),
        ("kind: source\nname: x\nmetadata: [1]\n", 3, "metadata: expected keys and values, got a list"),
        ("kind: location\nname: x\nsite: s\ntype: prossessing\n", 4, "did you mean 'processing'?; allowed: source, buffer, "),
        ("kind: location\nname: x\nsite: s\ntype: buffer\npriority: high\n", 5, "priority: expected a whole number"),
        ("kind: location\nname: x\nsite: s\ntype: buffer\nid: 0\n", 5, "id: expected a whole number, 1 or more, got '0'"),
        ("kind: site\nname: x\n---\nkind: site\nname: x\n", 5, "site 'x' comes twice (first in a.yaml:1)"),
        # software, config, grouping
        ("kind: software\nname: s\nversions:\n- {version: one, command: [x]}\n", 4, "'one' is not a version"),
        ("kind: software\nname: s\nversions:\n- {version: 1.0.0}\n", 4, "versions[0]: missing key 'command'"),
        ("kind: software\nname: s\nversions:\n- {version: 1.0.0, command: []}\n", 4, "versions[0].command: must not be empty"),
        ("kind: software\nname: s\nversions:\n- {version: 1.0.0, command: x}\n", 4, "versions[0].command: expected a list"),
        ("kind: software\nname: s\nversions:\n- {version: 1.0, command: [x]}\n- {version: 1.0.0, command: [x]}\n", 5, "version 1.0.0 comes twice (first as 1.0)"),
        ("kind: software\nname: s\nversions:\n- {version: 1, command: [x]}\n- {version: 1, command: [x]}\n", 5, "version 1 comes twice (first as 1)"),
        ("kind: software\nname: s\nversions:\n- {version: 1.0, command: [x], state: gone}\n", 4, "unknown state 'gone'; allowed: active, deprecated, revoked"),
        ("kind: site\nname: s\ntime_zone: America/Santiag\n", 3, "unknown time zone 'America/Santiag', did you mean 'America/Santiago'?"),
        ("kind: grouping\nname: g\nrules:\n- {table: source, column: name, operator: eq, value: x}\n- {table: sorce, column: name, operator: eq, value: x}\n", 5, "rule 2: unknown table 'sorce', did you mean 'source'?"),
        # pipelines
        ("kind: pipeline\nname: a/b\ngrouping: g\nsteps: [{name: a, software: s}]\n", 2, "name: expected a name that can be a directory"),
        ("kind: pipeline\nname: .a\ngrouping: g\nsteps: [{name: a, software: s}]\n", 2, "name: expected a name that can be a directory"),
        ("kind: pipeline\nname: " + "a" * 64 + "\ngrouping: g\nsteps: [{name: a, software: s}]\n", 2, "name that can be a directory"),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps: []\n", 4, "steps: must not be empty"),
        ("kind: pipeline\nname: p\ngrouping: g\n", 1, "missing key 'steps'"),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps: [{name: a, software: s}]\ntrigger: CRON\n", 5, "trigger: CRON needs a cron expression: trigger_config: {cron: "),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps: [{name: a, software: s}]\ntrigger: ALWAYS\n", 5, "unknown trigger 'ALWAYS'; allowed: CONTINUOUS, CRON, MANUAL"),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps: [{name: a, software: s}]\nenabled: on\n", 5, "enabled: expected true or false, got 'on'"),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps:\n- {name: a, software: s}\n- {name: a, software: s}\n", 6, "step 'a' comes twice"),
        (step("depends_on: [b]"), 5, "unknown step 'b'; allowed: a"),
        (step("depends_on: [a]"), 5, "steps depend on each other in a circle: a → a"),
        ("kind: pipeline\nname: p\ngrouping: g\nsteps:\n- {name: a, software: s}\n- {name: b, software: s, depends_on: [a, a]}\n", 6, "depends_on: 'a' comes twice"),
        (step("group_by: [sauce]"), 5, "group_by: unknown dimension 'sauce', did you mean 'source'?"),
        (step("group_by: [line, line]"), 5, "group_by: dimension 'line' is named twice"),
        (step("version_policy: pinned"), 5, "step 'a' is pinned: it needs a version"),
        (step("version_policy: newest"), 5, "unknown version_policy 'newest'; allowed: pinned, compatible, latest"),
        (step("resources: {cpu: 0}"), 5, "resources: cpu 0 is not between 0 and 4096 cores"),
        (step("resources: {memory_gb: 1000000}"), 5, "resources: memory_gb 1e+06 is not between 0 and 65536 GB"),
        (step("resources: {time_hours: -1}"), 5, "resources: time_hours -1 is not between"),
        (step("resources: {gpu: -1}"), 5, "resources: gpu -1 is not between"),
        (step("resources: {memory: 1}"), 5, "steps[0].resources: unknown key 'memory', did you mean 'memory_gb'?"),
        (step("environment: {A-B: x}"), 5, "environment: 'A-B' is not the name of a variable"),
        (step("environment: {WORKFLOW_X: x}"), 5, "WORKFLOW_* cannot be set"),
        (step("cooldown_seconds: -1"), 5, "steps[0].cooldown_seconds: expected a number, not negative, got '-1'"),
        (step("retention_days: week"), 5, "steps[0].retention_days: expected a number, not negative, got 'week'"),
        # packages
        (package(files="[]"), 7, "files: must not be empty"),
        (package(files="[{name: f, size: 1, checksum: md5}]"), 7, "files: checksum 'md5' of 'f' is not sha256: and 64 hexadecimal digits"),
        (package("path: y\n"), 8, "key 'path' comes twice"),
        (package("executed_obs_unit: {}\n").replace("executed_obs_unit: {name: e}\n", ""), 7, "executed_obs_unit: missing key 'name'"),
        (package().replace("executed_obs_unit: {name: e}\n", ""), 1, "missing key 'executed_obs_unit'"),
        (package("state: done\n"), 8, "unknown state 'done'; allowed: waiting, transferring, archived, failed"),
        (package().replace("{name: e}", "{name: e, started_at: noon}"), 3, "executed_obs_unit.started_at: expected an ISO 8601 time, got 'noon'"),
        (package().replace("path: x", "path: ../x"), 6, "path: '../x' is not a directory"),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_its_line(text: str, line: int, message: str) -> None:
    (fault,) = faults(text)
    assert fault.startswith(f"a.yaml:{line}: ")
    assert message in fault


def test_a_circle_of_steps_is_shown() -> None:
    text = """
        kind: pipeline
        name: p
        grouping: g
        steps:
        - {name: a, software: s}
        - {name: b, software: s, depends_on: [a, d]}
        - {name: c, software: s, depends_on: [b]}
        - {name: d, software: s, depends_on: [c]}
        """
    (fault,) = faults(text)
    circle = fault.rpartition(": ")[2].split(" → ")
    assert circle[0] == circle[-1]
    edges = {"b": "d", "c": "b", "d": "c"}
    assert [edges[name] for name in circle[:-1]] == circle[1:]


def test_a_misspelt_name_is_one_fault_not_two() -> None:
    text = """
        kind: pipeline
        name: p
        grouping: g
        steps:
        - {name: a b, software: s}
        - {name: c, software: s, depends_on: [a b]}
        """
    (fault,) = faults(text)
    assert "a.yaml:5: steps[0].name: expected a name that can be a directory" in fault


def test_lines_stay_right_behind_an_item_that_could_not_be_read() -> None:
    text = """
        kind: pipeline
        name: p
        grouping: g
        steps:
        - calibrate
        - {name: b, software: s, group_by: [sauce]}
        """
    first, second = faults(text)
    assert first.startswith("a.yaml:5: ")
    assert second.startswith("a.yaml:6: ")


def test_every_kind_is_described() -> None:
    assert all(kind.spec.__doc__ for kind in KINDS.values())
