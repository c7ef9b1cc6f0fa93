"""Statecharts: every cell of the run's chart, every fault a chart can have, and what advance promises."""

from __future__ import annotations

import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from wfm.charts import Chart, Emit, Guard, StateSpec, TransitionSpec, parse
from wfm.errors import ChartError, RefusedError
from wfm.model import FINAL_STATES, Role, RunState
from wfm.service import load_charts

# --- the chart of a run -----------------------------------------------------------------------------------

CHARTS = Path(__file__).parents[2] / "statecharts"
RUN_YAML = {1: CHARTS / "run-1.yaml", 2: CHARTS / "run.yaml"}
NEWEST = max(RUN_YAML)
RUN_EVENTS = [
    "data.arrived",
    "gap.detected",
    "job.built",
    "job.submitted",
    "job.running",
    "job.completed",
    "attempt.failed",
    "run.cancelling",
    "run.collected",
    "run.failed",
    "run.cancelled",
]


class RunFacts(Struct, frozen=True):
    exit_record: bool
    retry_left: bool


RUN_GUARDS: dict[str, Guard] = {
    "has_exit_record": lambda facts: facts.exit_record,
    "may_retry": lambda facts: facts.retry_left,
}


def read_run_chart(version: int) -> Chart:
    return parse(RUN_YAML[version].read_text(), source="run.yaml", guards=RUN_GUARDS, events=RUN_EVENTS)


@pytest.fixture(scope="module", params=RUN_YAML)
def run_chart(request: pytest.FixtureRequest) -> Chart:
    return read_run_chart(request.param)


def test_every_version_stays_loadable() -> None:
    assert sorted(CHARTS.iterdir()) == sorted(RUN_YAML.values())
    assert {version: chart.version for version, chart in load_charts(CHARTS).items()} == {v: v for v in RUN_YAML}


def test_the_run_has_the_states_of_the_model_in_their_order(run_chart: Chart) -> None:
    assert list(run_chart.states) == list(RunState)
    assert {name for name, spec in run_chart.states.items() if spec.final} == FINAL_STATES
    assert (run_chart.name, run_chart.initial) == ("run", RunState.PENDING)


def test_a_state_of_the_run_says_what_it_means_who_acts_and_whom_it_tells(run_chart: Chart) -> None:
    assert run_chart.states["PENDING"] == StateSpec(
        name="PENDING",
        meaning="a gap became a run, or a retry is due; it waits for a free slot",
        owner=Role.WORKFLOW_MANAGER,
        look_again_after=60.0,
        final=False,
        emits=(Emit("gap.detected", Role.WORKFLOW_MANAGER),),
    )
    assert run_chart.states["RUNNING"].emits == (Emit("job.running", None),)
    assert run_chart.states["FAILED"].owner is None
    assert run_chart.states["FAILED"].look_again_after is None


def test_transitions_stand_in_file_order_one_per_source(run_chart: Chart) -> None:
    assert [move for move in run_chart.transitions if move.trigger == "fail"] == [
        TransitionSpec("fail", "STAGING_DATA", "RETRY_WAIT", "may_retry"),
        TransitionSpec("fail", "SUBMITTED", "RETRY_WAIT", "may_retry"),
        TransitionSpec("fail", "RUNNING", "RETRY_WAIT", "may_retry"),
        TransitionSpec("fail", "STAGING_DATA", "FAILED", None),
        TransitionSpec("fail", "SUBMITTED", "FAILED", None),
        TransitionSpec("fail", "RUNNING", "FAILED", None),
        TransitionSpec("fail", "COLLECTING_RESULTS", "FAILED", None),
    ]


RUN_TRIGGERS = [
    "build",
    "submit",
    "start",
    "finish",
    "collect",
    "fail",
    "retry_due",
    "withdraw",
    "cancel",
    "confirm_cancel",
    "retry",
]
# Version 1, one row per state. Columns are the triggers in the order above; `finish` stands twice, with and without an
# exit record, and `fail` twice, with and without a retry left. A dot is a refusal.
RUN_MOVES = """
#                  build submit start finish finish collect fail fail retry withdraw cancel confirm retry
#                                       +rec   -rec        +left -left _due                 _cancel
PENDING            STAG  .      .     .      .      .       .    .    .     CANC     CANC   .       .
STAGING_DATA       .     SUBM   .     .      .      .       WAIT FAIL .     .        CING   .       .
SUBMITTED          .     .      RUNN  COLL   .      .       WAIT FAIL .     .        CING   .       .
RUNNING            .     .      .     COLL   .      .       WAIT FAIL .     .        CING   .       .
COLLECTING_RESULTS .     .      .     .      .      COMP    FAIL FAIL .     .        CANC   .       .
RETRY_WAIT         .     .      .     .      .      .       .    .    PEND  CANC     CANC   .       .
CANCELLING         .     .      .     .      .      .       .    .    .     .        .      CANC    .
COMPLETED          .     .      .     .      .      .       .    .    .     .        .      .       .
FAILED             .     .      .     .      .      .       .    .    .     .        .      .       PEND
CANCELLED          .     .      .     .      .      .       .    .    .     .        .      .       PEND
"""
# What version 2 adds: `recollect` stands twice, with and without an exit record.
RUN_MOVES_2 = """
#                  redrive recollect recollect
#                          +rec      -rec
PENDING            .       .         .
STAGING_DATA       .       .         .
SUBMITTED          .       .         .
RUNNING            .       .         .
COLLECTING_RESULTS .       .         .
RETRY_WAIT         .       .         .
CANCELLING         .       .         .
COMPLETED          PEND    COLL      .
FAILED             PEND    COLL      .
CANCELLED          PEND    COLL      .
"""
SHORT = {
    "PEND": "PENDING",
    "STAG": "STAGING_DATA",
    "SUBM": "SUBMITTED",
    "RUNN": "RUNNING",
    "COLL": "COLLECTING_RESULTS",
    "WAIT": "RETRY_WAIT",
    "CING": "CANCELLING",
    "COMP": "COMPLETED",
    "FAIL": "FAILED",
    "CANC": "CANCELLED",
    ".": None,
}


def run_cells(version: int) -> list[tuple[str, str, RunFacts, str | None]]:
    if version == 1:
        return table_cells(RUN_TRIGGERS, RUN_MOVES)
    return table_cells(RUN_TRIGGERS, RUN_MOVES) + table_cells(["redrive", "recollect"], RUN_MOVES_2)


def table_cells(triggers: list[str], table: str) -> list[tuple[str, str, RunFacts, str | None]]:
    columns: list[tuple[str, list[RunFacts]]] = []
    anything = [RunFacts(record, left) for record in (True, False) for left in (True, False)]
    for trigger in triggers:
        if trigger in ("finish", "recollect"):
            columns += [(trigger, [f for f in anything if f.exit_record is value]) for value in (True, False)]
        elif trigger == "fail":
            columns += [(trigger, [f for f in anything if f.retry_left is value]) for value in (True, False)]
        else:
            columns.append((trigger, anything))
    cells = []
    for row in table.splitlines():
        if row and not row.startswith("#"):
            state, *answers = row.split()
            for (trigger, cases), answer in zip(columns, answers, strict=True):
                cells += [(state, trigger, facts, SHORT[answer]) for facts in cases]
    return cells


def test_the_table_asks_for_every_state_and_trigger(run_chart: Chart) -> None:
    asked = Counter((state, trigger) for state, trigger, _, _ in run_cells(run_chart.version))
    triggers = {move.trigger for move in run_chart.transitions}
    assert set(asked) == {(state, trigger) for state in run_chart.states for trigger in triggers}
    assert set(asked.values()) == {4}, "each cell with every combination of facts"


def test_every_move_of_the_run(run_chart: Chart) -> None:
    def answer(state: str, trigger: str, facts: RunFacts) -> str | None:
        try:
            return run_chart.advance(state, trigger, facts)
        except RefusedError:
            return None

    wrong = [
        (state, trigger, facts, got, expected)
        for state, trigger, facts, expected in run_cells(run_chart.version)
        if (got := answer(state, trigger, facts)) != expected
    ]
    assert wrong == []


# --- advance ----------------------------------------------------------------------------------------------

LAMP = """\
chart: lamp
version: 3
initial: DARK
states:
  DARK:
    meaning: no light
    owner: worker
    look_again_after: 1.5
    emits: [{event: lamp.off, to: worker}, {event: lamp.off}]
  LIT:
    meaning: light
    owner: result-manager
    look_again_after: 60
  BROKEN:
    meaning: light no more
    final: true
transitions:
  - {trigger: press, source: DARK, dest: LIT, guard: has_power}
  - {trigger: press, source: [DARK, LIT], dest: BROKEN, guard: is_hard}
  - {trigger: press, source: DARK, dest: DARK}
  - {trigger: mend, source: BROKEN, dest: DARK}
"""
LAMP_GUARDS: dict[str, Guard] = {
    "has_power": lambda facts: "power" in facts,
    "is_hard": lambda facts: "hard" in facts,
}
LAMP_EVENTS = ["lamp.off", "lamp.on"]


def lamp(text: str = LAMP, guards: dict[str, Guard] | None = None) -> Chart:
    return parse(text, source="lamp.yaml", guards=LAMP_GUARDS | (guards or {}), events=LAMP_EVENTS)


@pytest.mark.parametrize(
    ("facts", "dest"),
    [({"power", "hard"}, "LIT"), ({"power"}, "LIT"), ({"hard"}, "BROKEN"), (set(), "DARK")],
)
def test_the_first_transition_in_file_order_whose_guard_holds_decides(facts: set[str], dest: str) -> None:
    assert lamp().advance("DARK", "press", facts) == dest


def test_guards_behind_the_deciding_one_are_not_asked() -> None:
    asked: list[str] = []

    def asking(name: str, answer: bool) -> Guard:
        def guard(facts: object) -> bool:
            asked.append(name)
            return answer

        return guard

    chart = lamp(guards={"has_power": asking("has_power", True), "is_hard": asking("is_hard", True)})
    assert chart.advance("DARK", "press") == "LIT"
    assert asked == ["has_power"]


def test_guards_see_the_very_facts_that_were_given() -> None:
    seen: list[Any] = []

    def guard(facts: Any) -> bool:
        seen.append(facts)
        return True

    facts = object()
    chart = lamp(guards={"has_power": guard})
    chart.advance("DARK", "press", facts)
    chart.advance("DARK", "press")
    assert seen == [facts, None]


@pytest.mark.parametrize(("answer", "dest"), [({"code": 0}, "LIT"), (3, "LIT"), ({}, "DARK"), (None, "DARK")])
def test_a_guard_holds_when_its_answer_is_true_in_the_sense_of_python(answer: Any, dest: str) -> None:
    chart = lamp(guards={"has_power": lambda facts: answer, "is_hard": lambda facts: False})
    assert chart.advance("DARK", "press") == dest


def test_a_state_may_be_given_as_an_enum_and_comes_back_as_text(run_chart: Chart) -> None:
    state = run_chart.advance(RunState.PENDING, "build")
    assert type(state) is str
    assert RunState(state) is RunState.STAGING_DATA


@pytest.mark.parametrize(
    ("state", "trigger", "message"),
    [
        ("LIT", "mend", "chart lamp 3: 'mend' refused in LIT: there is no such move; possible: press [is_hard]"),
        ("LIT", "smash", "chart lamp 3: 'smash' refused in LIT: there is no such move; possible: press [is_hard]"),
        (
            "LIT",
            "press",
            "chart lamp 3: 'press' refused in LIT: no guard holds (is_hard); possible: press [is_hard]",
        ),
        ("BLUE", "press", "chart lamp 3: there is no state 'BLUE'; it has DARK, LIT, BROKEN"),
    ],
)
def test_a_refusal_says_where_what_and_what_is_possible(state: str, trigger: str, message: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        lamp().advance(state, trigger, set())
    assert str(refusal.value) == message


def test_from_a_final_state_nothing_may_be_possible() -> None:
    run_chart = read_run_chart(1)
    with pytest.raises(RefusedError, match="possible: nothing"):
        run_chart.advance("COMPLETED", "retry")


def test_triggers_of_a_state_in_file_order(run_chart: Chart) -> None:
    assert run_chart.triggers("RUNNING") == ("finish", "fail", "cancel")
    assert run_chart.triggers("COMPLETED") == ((), ("redrive", "recollect"))[run_chart.version - 1]
    with pytest.raises(RefusedError, match="no state 'LOST'"):
        run_chart.triggers("LOST")


@pytest.mark.parametrize("error", [KeyError("no such fact"), RefusedError("not yours"), KeyboardInterrupt()])
def test_a_guard_that_raises_leaves_no_trace(error: BaseException) -> None:
    def breaks(facts: set[str]) -> bool:
        if "broken" in facts:
            raise error
        return True

    chart = lamp(guards={"has_power": breaks})
    before = {state: chart.triggers(state) for state in chart.states}
    with pytest.raises(type(error)) as raised:
        chart.advance("DARK", "press", {"broken"})
    assert raised.value is error
    assert chart.advance("DARK", "press", set()) == "LIT"
    assert {state: chart.triggers(state) for state in chart.states} == before


def test_a_trigger_may_have_any_name_that_is_a_word() -> None:
    for name in ("state", "trigger", "states", "to_DARK", "is_LIT", "advance", "model"):
        assert lamp(LAMP.replace("trigger: mend", f"trigger: {name}")).advance("BROKEN", name) == "DARK"


def test_a_guard_may_ask_the_chart_itself() -> None:
    charts: list[Chart] = []
    chart = lamp(guards={"has_power": lambda facts: charts[0].advance("BROKEN", "mend") == "DARK"})
    charts.append(chart)
    assert chart.advance("DARK", "press") == "LIT"


def test_threads_share_a_chart_without_meeting() -> None:
    threads, rounds = 8, 300
    chart = read_run_chart(NEWEST)
    cells = run_cells(NEWEST)
    barrier = threading.Barrier(threads)

    def work(number: int) -> list[tuple[str, str, RunFacts, str | None]]:
        barrier.wait(60)
        wrong = []
        for at in range(rounds):
            state, trigger, facts, expected = cells[(at * threads + number * 7) % len(cells)]
            try:
                got: str | None = chart.advance(state, trigger, facts)
            except RefusedError:
                got = None
            if got != expected:
                wrong.append((state, trigger, facts, got))
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        assert [wrong for found in pool.map(work, range(threads)) for wrong in found] == []


# --- faults -----------------------------------------------------------------------------------------------


def faults_of(text: str) -> list[str]:
    with pytest.raises(ChartError) as refusal:
        lamp(text)
    assert str(refusal.value) == "\n".join(refusal.value.faults)
    return [fault.removeprefix("lamp.yaml:") for fault in refusal.value.faults]


def changed(old: str, new: str) -> str:
    assert LAMP.count(old) == 1, f"{old!r} must name one place"
    return LAMP.replace(old, new)


def added(text: str) -> str:
    return LAMP + text


STATE_KEYS = "meaning, owner, look_again_after, final, emits"
TRANSITION_KEYS = "trigger, source, dest, guard"
ROLES = "trigger-manager, workflow-manager, worker, result-manager"
TEXT = "must be text (quoted if YAML reads it otherwise)"
WORD = "must be a word (letters, digits and _, a letter first)"

FAULTS: dict[str, tuple[str, list[str]]] = {
    # the text
    "empty": ("", ["1: the text is empty"]),
    "only a comment": ("# later\n", ["1: the text is empty"]),
    "not YAML": (
        changed("version: 3", "version: 3: 4"),
        ["2: not YAML: mapping values are not allowed here"],
    ),
    "not YAML, with context": (
        changed("[DARK, LIT]", "[DARK, LIT"),
        ["19: not YAML: while parsing a flow sequence: expected ',' or ']', but got '}'"],
    ),
    "a character that YAML forbids": (
        changed("light no more", "light\x07"),
        ["15: not YAML: unacceptable character #x0007: special characters are not allowed"],
    ),
    "two documents": (
        added("---\nchart: other\n"),
        ["22: not YAML: expected a single document in the stream: but found another document"],
    ),
    "not a mapping": ("- a\n- b\n", ["1: chart: must be a mapping, not a list"]),
    # keys
    "unknown key": (
        changed("version: 3", "version: 3\ncolour: red"),
        ["3: chart: key: 'colour' is unknown; allowed: chart, version, initial, states, transitions"],
    ),
    "misspelled key": (
        changed("owner: worker", "onwer: worker"),
        [f"7: state DARK: key: 'onwer' is unknown; did you mean 'owner'? allowed: {STATE_KEYS}"],
    ),
    "unknown key of an emit": (
        changed("{event: lamp.off}", "{event: lamp.off, by: worker}"),
        ["9: state DARK: emits: key: 'by' is unknown; allowed: event, to"],
    ),
    "unknown key of a transition": (
        changed("guard: has_power", "gard: has_power"),
        [f"18: transition: key: 'gard' is unknown; did you mean 'guard'? allowed: {TRANSITION_KEYS}"],
    ),
    "missing keys": (
        "states: {}\n",
        [
            "1: chart: chart, version, initial, transitions missing; "
            "required: chart, version, initial, states, transitions",
            "1: states: there are none",
        ],
    ),
    "missing key of a state": (
        changed("    meaning: light no more\n", ""),
        ["14: state BROKEN: meaning missing; required: meaning"],
    ),
    "missing key of an emit": (
        changed("{event: lamp.off}", "{to: worker}"),
        ["9: state DARK: emits: event missing; required: event"],
    ),
    "missing keys of a transition": (
        added("  - {guard: is_hard}\n"),
        ["22: transition: trigger, source, dest missing; required: trigger, source, dest"],
    ),
    "duplicate key": (
        changed("version: 3", "version: 3\nversion: 4"),
        ["3: chart: key 'version' stands already in line 2"],
    ),
    "duplicate state": (
        changed("transitions:", "  LIT: {meaning: again, final: true}\ntransitions:"),
        ["17: states: key 'LIT' stands already in line 10"],
    ),
    "duplicate key of a transition": (
        changed("source: BROKEN,", "source: BROKEN, source: LIT,"),
        ["21: transition: key 'source' stands already in line 21"],
    ),
    "key that is no text": (
        changed("  LIT:", "  ON: {meaning: bright, final: true}\n  LIT:"),
        [f"10: states: a key: {TEXT}, not ON (bool)"],
    ),
    # names and numbers
    "chart name with a blank": (changed("chart: lamp", "chart: my lamp"), [f"1: chart: {WORD}, not 'my lamp'"]),
    "chart name that is no text": (changed("chart: lamp", "chart: 7"), [f"1: chart: {TEXT}, not 7 (int)"]),
    "version zero": (
        changed("version: 3", "version: 0"),
        ["2: version: must be a positive whole number, not 0 (int)"],
    ),
    "version as text": (
        changed("version: 3", "version: '3'"),
        ["2: version: must be a positive whole number, not '3'"],
    ),
    "version broken": (
        changed("version: 3", "version: 1.5"),
        ["2: version: must be a positive whole number, not 1.5 (float)"],
    ),
    "version a list with a false tag": (
        changed("version: 3", "version: !!int [3]"),
        ["2: version: must be a positive whole number, not a list"],
    ),
    "state name with a dash": (
        LAMP.replace("LIT", "LIT-UP"),
        [f"10: the name of a state: {WORD}, not 'LIT-UP'"],
    ),
    "trigger name with a blank": (
        changed("trigger: mend", "trigger: mend it"),
        [f"21: transition: trigger: {WORD}, not 'mend it'"],
    ),
    "trigger that YAML reads as a boolean": (
        changed("trigger: mend", "trigger: on"),
        [f"21: transition: trigger: {TEXT}, not on (bool)"],
    ),
    # initial
    "initial unknown": (
        changed("initial: DARK", "initial: BLUE"),
        ["3: initial: 'BLUE' is unknown; allowed: DARK, LIT, BROKEN"],
    ),
    "initial misspelled": (
        changed("initial: DARK", "initial: dark"),
        ["3: initial: 'dark' is unknown; did you mean 'DARK'? allowed: DARK, LIT, BROKEN"],
    ),
    "initial final": (
        changed("initial: DARK", "initial: BROKEN"),
        ["3: initial: BROKEN is final; a chart starts in a state that is not"],
    ),
    # states
    "states a list": (
        "chart: a\nversion: 1\ninitial: A\nstates: [A]\ntransitions: [{trigger: go, source: A, dest: B}]\n",
        ["4: states: must be a mapping, not a list"],
    ),
    "states empty": (
        "chart: a\nversion: 1\ninitial: A\nstates: {}\ntransitions: [{trigger: go, source: A, dest: B}]\n",
        ["4: states: there are none"],
    ),
    "state without anything": (
        "chart: a\nversion: 1\ninitial: A\nstates:\n  A:\ntransitions: []\n",
        ["5: state A: must be a mapping, not nothing"],
    ),
    "meaning empty": (changed("meaning: no light", "meaning: ''"), [f"6: state DARK: meaning: {TEXT}, not ''"]),
    "meaning nothing": (changed("meaning: no light", "meaning:"), [f"6: state DARK: meaning: {TEXT}, not nothing"]),
    "meaning a list with a false tag": (
        changed("meaning: no light", "meaning: !!str [no, light]"),
        [f"6: state DARK: meaning: {TEXT}, not a list"],
    ),
    "owner unknown": (
        changed("owner: worker", "owner: wroker"),
        [f"7: state DARK: owner: 'wroker' is unknown; did you mean 'worker'? allowed: {ROLES}"],
    ),
    "owner far from anything": (
        changed("owner: worker", "owner: ada"),
        [f"7: state DARK: owner: 'ada' is unknown; allowed: {ROLES}"],
    ),
    "owner missing": (
        changed("    owner: worker\n", ""),
        ["5: state DARK: is not final, so it needs owner"],
    ),
    "look_again_after missing": (
        changed("    look_again_after: 60\n", ""),
        ["10: state LIT: is not final, so it needs look_again_after"],
    ),
    **{
        f"look_again_after {value}": (
            changed("look_again_after: 1.5", f"look_again_after: {value}"),
            [f"8: state DARK: look_again_after: must be a number of seconds above 0, not {shown}"],
        )
        for value, shown in {
            "0": "0 (int)",
            "-1": "-1 (int)",
            "soon": "'soon'",
            "'60'": "'60'",
            "true": "true (bool)",
            ".inf": ".inf (float)",
            "1.0e+999": "1.0e+999 (float)",
            "1:30": "1:30 (int)",
            "{seconds: 1}": "a mapping",
        }.items()
    },
    "final no boolean": (
        changed("final: true", "final: perhaps"),
        ["16: state BROKEN: final: must be true or false, not 'perhaps'"],
    ),
    "final in other words": (
        changed("final: true", "final: yes"),
        ["16: state BROKEN: final: must be true or false, not yes (bool)"],
    ),
    "final state with an owner": (
        changed("final: true", "final: true\n    owner: worker"),
        ["17: state BROKEN: is final, nobody must act next: leave out owner"],
    ),
    "final state with look_again_after": (
        changed("final: true", "final: true\n    look_again_after: 5"),
        ["17: state BROKEN: is final, nobody must act next: leave out look_again_after"],
    ),
    "emits no list": (
        changed("final: true", "final: true\n    emits: lamp.on"),
        ["17: state BROKEN: emits: must be a list, not 'lamp.on'"],
    ),
    "emits no mapping": (
        changed("final: true", "final: true\n    emits: [lamp.on, lamp.on]"),
        [
            "17: state BROKEN: emits: must be a mapping, not 'lamp.on'",
            "17: state BROKEN: emits: must be a mapping, not 'lamp.on'",
        ],
    ),
    "event unknown": (
        changed("{event: lamp.off}", "{event: lamp.of}"),
        [
            "9: state DARK: emits: event: 'lamp.of' is unknown; did you mean 'lamp.off'? allowed: lamp.off, lamp.on",
        ],
    ),
    "recipient unknown": (
        changed("{event: lamp.off}", "{event: lamp.off, to: result-manger}"),
        [f"9: state DARK: emits: to: 'result-manger' is unknown; did you mean 'result-manager'? allowed: {ROLES}"],
    ),
    "recipient nothing": (
        changed("{event: lamp.off}", "{event: lamp.on, to: }"),
        [f"9: state DARK: emits: to: {TEXT}, not nothing"],
    ),
    "duplicate emit": (
        changed("{event: lamp.off}", "{event: lamp.off, to: worker}"),
        ["9: state DARK: emits: lamp.off to worker stands there twice"],
    ),
    "duplicate public emit": (
        changed("{event: lamp.off, to: worker}", "{event: lamp.off}"),
        ["9: state DARK: emits: lamp.off to the public stream only stands there twice"],
    ),
    # transitions
    "transitions no list": (
        LAMP.partition("transitions:")[0] + "transitions: {press: LIT}\n",
        ["17: transitions: must be a list, not a mapping"],
    ),
    "transition no mapping": (added("  - press\n"), ["22: transition: must be a mapping, not 'press'"]),
    "transitions without a trigger are not compared": (
        added("  - {source: LIT, dest: DARK}\n  - {source: LIT, dest: DARK}\n"),
        [
            "22: transition: trigger missing; required: trigger, source, dest",
            "23: transition: trigger missing; required: trigger, source, dest",
        ],
    ),
    "source unknown": (
        changed("[DARK, LIT]", "[DARK, LIT, BLUE]"),
        ["19: transition press: source: 'BLUE' is unknown; allowed: DARK, LIT, BROKEN"],
    ),
    "source empty": (
        added("  - {trigger: paint, source: [], dest: DARK}\n"),
        ["22: transition paint: source: the list is empty; name at least one state"],
    ),
    "source of another kind": (
        changed("source: BROKEN", "source: [[BROKEN]]"),
        [f"21: transition mend: source: {TEXT}, not a list"],
    ),
    "source of all states": (
        changed("source: BROKEN", "source: '*'"),
        ["21: transition mend: source: '*' is unknown; allowed: DARK, LIT, BROKEN"],
    ),
    "dest unknown": (
        changed("source: BROKEN, dest: DARK", "source: BROKEN, dest: '='"),
        ["21: transition mend: dest: '=' is unknown; allowed: DARK, LIT, BROKEN"],
    ),
    "dest misspelled, which makes no state unreachable": (
        changed("dest: LIT", "dest: LITT"),
        ["18: transition press: dest: 'LITT' is unknown; did you mean 'LIT'? allowed: DARK, LIT, BROKEN"],
    ),
    "guard unknown": (
        changed("guard: has_power", "guard: has_powr"),
        [
            "18: transition press: guard: 'has_powr' is unknown; did you mean 'has_power'? allowed: has_power, is_hard",
        ],
    ),
    "guard that is an import path": (
        changed("guard: has_power", "guard: os.system"),
        ["18: transition press: guard: 'os.system' is unknown; allowed: has_power, is_hard"],
    ),
    "guard nothing": (
        changed("guard: has_power", "guard: "),
        [f"18: transition press: guard: {TEXT}, not nothing"],
    ),
    # the whole
    "unreachable": (
        changed("  BROKEN:", "  BLUE: {meaning: strange, final: true}\n  BROKEN:"),
        ["14: state BLUE: cannot be reached from DARK"],
    ),
    "unreachable, though one leads to the other": (
        changed(
            "  BROKEN:", "  BLUE: {meaning: strange, final: true}\n  RED: {meaning: strange, final: true}\n  BROKEN:"
        )
        + "  - {trigger: paint, source: BLUE, dest: RED}\n  - {trigger: paint, source: RED, dest: BLUE}\n",
        ["14: state BLUE: cannot be reached from DARK", "15: state RED: cannot be reached from DARK"],
    ),
    "no way out": (
        changed("[DARK, LIT]", "DARK"),
        ["10: state LIT: is not final and has no way out; add a transition or `final`"],
    ),
    "no way out but to itself": (
        changed("[DARK, LIT]", "DARK") + "  - {trigger: wait, source: LIT, dest: LIT}\n",
        ["10: state LIT: is not final and has no way out; add a transition or `final`"],
    ),
    "after an unguarded one": (
        added("  - {trigger: mend, source: BROKEN, dest: LIT, guard: is_hard}\n"),
        [
            "22: transition mend [is_hard] from BROKEN to LIT: can never fire: "
            "mend to DARK in line 21 always comes first",
        ],
    ),
    "the same guard again": (
        changed("dest: DARK}\n  - {trigger: mend", "dest: DARK, guard: has_power}\n  - {trigger: mend"),
        [
            "20: transition press [has_power] from DARK to DARK: can never fire: "
            "press [has_power] to LIT in line 18 always comes first",
        ],
    ),
    "duplicate transition": (
        added("  - {trigger: mend, source: BROKEN, dest: DARK}\n"),
        ["22: transition mend from BROKEN to DARK: repeats line 21"],
    ),
    "duplicate source": (
        changed("[DARK, LIT]", "[DARK, LIT, LIT]"),
        ["19: transition press [is_hard] from LIT to BROKEN: repeats line 19"],
    ),
}


@pytest.mark.parametrize(("text", "faults"), FAULTS.values(), ids=FAULTS)
def test_each_fault_alone(text: str, faults: list[str]) -> None:
    assert faults_of(text) == faults


def test_the_chart_that_the_faults_start_from_has_none() -> None:
    chart = lamp()
    assert (chart.name, chart.version, chart.initial) == ("lamp", 3, "DARK")
    assert chart.states["DARK"].look_again_after == 1.5
    assert chart.states["DARK"].emits == (Emit("lamp.off", Role.WORKER), Emit("lamp.off", None))


def test_many_faults_are_reported_together_by_line() -> None:
    text = """\
version: one
initial: STRAT
colour: red
states:
  START:
    meaning: the first
    owner: workr
    look_again_after: -1
  LOST: {meaning: nobody comes here, owner: worker, look_again_after: 1}
  END_:
    meaning: ""
    final: true
    owner: worker
    emits: [{event: lamp.on}, {event: lamp.on}, {event: burnt}]
  END_: {meaning: again, final: true}
transitions:
  - {trigger: go, source: START, dest: END_}
  - {trigger: go, source: START, dest: END_, guard: is_herd}
  - {trigger: stop, source: [START, NOWHERE], dest: END_}
  - {trigger: stop, dest: 5}
"""
    assert faults_of(text) == [
        "1: chart: chart missing; required: chart, version, initial, states, transitions",
        "1: version: must be a positive whole number, not 'one'",
        "2: initial: 'STRAT' is unknown; did you mean 'START'? allowed: START, LOST, END_",
        "3: chart: key: 'colour' is unknown; allowed: chart, version, initial, states, transitions",
        f"7: state START: owner: 'workr' is unknown; did you mean 'worker'? allowed: {ROLES}",
        "8: state START: look_again_after: must be a number of seconds above 0, not -1 (int)",
        "9: state LOST: is not final and has no way out; add a transition or `final`",
        "9: state LOST: cannot be reached from START",
        f"11: state END_: meaning: {TEXT}, not ''",
        "13: state END_: is final, nobody must act next: leave out owner",
        "14: state END_: emits: lamp.on to the public stream only stands there twice",
        "14: state END_: emits: event: 'burnt' is unknown; allowed: lamp.off, lamp.on",
        "15: states: key 'END_' stands already in line 10",
        "18: transition go: guard: 'is_herd' is unknown; did you mean 'is_hard'? allowed: has_power, is_hard",
        "18: transition go [is_hard] from START to END_: can never fire: go to END_ in line 17 always comes first",
        "19: transition stop: source: 'NOWHERE' is unknown; allowed: START, LOST, END_",
        "20: transition: source missing; required: trigger, source, dest",
        f"20: transition stop: dest: {TEXT}, not 5 (int)",
    ]


PIECES = [
    "- ",
    ": ",
    "[",
    "]",
    "{",
    "}",
    "!!int ",
    "!!str ",
    "!!bool ",
    "&a ",
    "*a",
    "<<: ",
    "~",
    "''",
    "\n",
    "  ",
    "1",
]


@given(st.lists(st.tuples(st.integers(0, len(LAMP)), st.integers(0, 12), st.sampled_from(PIECES)), max_size=4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_becomes_a_chart_or_a_list_of_faults(edits: list[tuple[int, int, str]]) -> None:
    text = LAMP
    for at, length, piece in edits:
        text = text[:at] + piece + text[at + length :]
    try:
        chart = lamp(text)
    except ChartError as refusal:
        faults = refusal.faults
    else:
        for move in chart.transitions:
            assert chart.advance(move.source, move.trigger, {"power", "hard"}) in chart.states
        return
    assert faults
    assert all(re.match(r"lamp\.yaml:[1-9]\d*: ", fault) for fault in faults)


def test_without_guards_and_events_no_name_is_allowed() -> None:
    with pytest.raises(ChartError) as refusal:
        parse(LAMP, source="lamp.yaml", guards={}, events=())
    assert refusal.value.faults[0] == "lamp.yaml:9: state DARK: emits: event: 'lamp.off' is unknown; allowed: none"
    assert ("lamp.yaml:18: transition press: guard: 'has_power' is unknown; allowed: none") in refusal.value.faults


@pytest.mark.parametrize(
    "text",
    [
        changed("final: true", "final: TRUE"),
        changed("meaning: light\n", "meaning: light\n    final: false\n    emits: []\n"),
        changed("look_again_after: 60", "look_again_after: 1_000.5"),
        LAMP.replace("    owner: worker", "    owner: &hand worker").replace("to: worker", "to: *hand"),
    ],
    ids=["upper case", "defaults spelled out", "digits in groups", "alias"],
)
def test_other_ways_to_write_a_good_chart(text: str) -> None:
    assert lamp(text).advance("DARK", "press", {"power"}) == "LIT"


def test_a_meaning_over_several_lines_is_one_line() -> None:
    chart = lamp(changed("meaning: no light", "meaning: |\n      no  light\n      at all\n"))
    assert chart.states["DARK"].meaning == "no light at all"


# --- diagrams ---------------------------------------------------------------------------------------------


def test_the_diagram() -> None:
    assert (
        lamp().mermaid()
        == """\
stateDiagram-v2
    DARK : DARK (worker)
    DARK : no light
    LIT : LIT (result-manager)
    LIT : light
    BROKEN : BROKEN (final)
    BROKEN : light no more
    [*] --> DARK
    DARK --> LIT : press [has_power]
    DARK --> BROKEN : press [is_hard]
    LIT --> BROKEN : press [is_hard]
    DARK --> DARK : press
    BROKEN --> DARK : mend
    BROKEN --> [*]
"""
    )


def test_long_meanings_are_wrapped_and_what_mermaid_takes_for_syntax_is_coded() -> None:
    text = changed("meaning: no light", "meaning: 'no light; \"dark\": a #1 state --> the lamp hangs, and `waits`'")
    rows = [row for row in lamp(text).mermaid().splitlines() if row.startswith("    DARK : ")]
    assert rows == [
        "    DARK : DARK (worker)",
        "    DARK : no light#59; #34;dark#34;#58; a #35;1 state --#62; the",
        "    DARK : lamp hangs, and #96;waits#96;",
    ]


@pytest.mark.parametrize("word", ["note", "DEFAULT", "State"])
def test_states_named_like_words_of_mermaid_get_another_identifier(word: str) -> None:
    diagram = lamp(LAMP.replace("LIT", word)).mermaid()
    assert f"    _{word} : {word} (result-manager)\n" in diagram
    assert f"    _{word} --> BROKEN : press [is_hard]\n" in diagram
    assert f"    DARK --> _{word} : press [has_power]\n" in diagram


def test_the_diagram_of_the_run_shows_every_state_and_transition(run_chart: Chart) -> None:
    lines = run_chart.mermaid().splitlines()
    for move in run_chart.transitions:
        label = f"{move.trigger} [{move.guard}]" if move.guard else move.trigger
        assert lines.count(f"    {move.source} --> {move.dest} : {label}") == 1
    starts_and_ends = [line for line in lines if "[*]" in line]
    assert starts_and_ends == [
        "    [*] --> PENDING",
        "    COMPLETED --> [*]",
        "    FAILED --> [*]",
        "    CANCELLED --> [*]",
    ]
