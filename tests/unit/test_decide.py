"""The decisions: one table for each, and the properties that no table can list."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wfm import decide
from wfm.decide import (
    AcceptedRun,
    ActiveRun,
    AgainFacts,
    Capacity,
    EndedRun,
    GapFacts,
    MoveFacts,
    PendingRun,
    Refill,
    Share,
    SoftwareVersion,
    Upstream,
)
from wfm.model import (
    REPEATABLE,
    BackfillKind,
    CoverageState,
    FailureClass,
    FanIn,
    JobStatus,
    Report,
    RunState,
    Standing,
    TriggerType,
    VersionPolicy,
    Why,
)

# --- digests ---


@given(st.lists(st.integers(0, decide.DIGEST_MODULUS - 1), unique=True), st.randoms())
def test_a_set_digest_does_not_depend_on_order_and_forgets_what_is_removed(items, random):
    shuffled = random.sample(items, len(items))
    assert decide.set_digest(items) == decide.set_digest(shuffled)
    half = shuffled[: len(items) // 2]
    rest = shuffled[len(items) // 2 :]
    assert (decide.set_digest(items) - decide.set_digest(half)) % decide.DIGEST_MODULUS == decide.set_digest(rest)


@given(st.lists(st.text(), min_size=1), st.lists(st.text(), min_size=1))
def test_parts_of_an_item_are_joined_unambiguously(a, b):
    assert (decide.item_hash(*a) == decide.item_hash(*b)) == (a == b)


BASE = {"members": 5, "count": 2, "upstream": {"a": 1}, "software": "s", "version": "1", "config": "c"}


@pytest.mark.parametrize(
    "change",
    [
        {"members": 6},
        {"count": 3},
        {"upstream": {"a": 2}},
        {"upstream": {"b": 1}},
        {"upstream": {}},
        {"software": "t"},
        {"version": "2"},
        {"config": ""},
    ],
)
def test_every_part_of_what_is_wanted_changes_the_digest(change):
    assert decide.wanted_digest(**BASE) != decide.wanted_digest(**{**BASE, **change})


def test_the_wanted_digest_is_stable_over_releases():
    # Stored in the database: another value would make every covered unit stale.
    assert decide.wanted_digest(**BASE) == "e270ab052d260bf899109992eed3b99e"


# --- versions ---

V = [
    SoftwareVersion(1, "1.0.0", "active"),
    SoftwareVersion(2, "1.10.0", "active"),
    SoftwareVersion(3, "1.9.0", "active"),
    SoftwareVersion(4, "2.0.0", "active"),
    SoftwareVersion(5, "2.1.0", "deprecated"),
    SoftwareVersion(6, "0.9.0", "revoked"),
]


@pytest.mark.parametrize(
    ("policy", "named", "chosen", "fault"),
    [
        (VersionPolicy.PINNED, "1.0.0", 1, ""),
        (VersionPolicy.PINNED, "2.1.0", 5, ""),
        (VersionPolicy.PINNED, "0.9.0", None, "revoked"),
        (VersionPolicy.PINNED, "3.0.0", None, "does not exist"),
        (VersionPolicy.COMPATIBLE, "1.0.0", 2, ""),
        (VersionPolicy.COMPATIBLE, "1.9.5", 2, ""),
        (VersionPolicy.COMPATIBLE, "1.11.0", None, "compatible with 1.11.0"),
        (VersionPolicy.COMPATIBLE, "", 4, ""),
        (VersionPolicy.LATEST, "", 4, ""),
    ],
)
def test_version_policies(policy, named, chosen, fault):
    version, why = decide.choose_version(policy, named, V)
    assert (version.id if version else None) == chosen
    assert fault in why


# --- names ---


@pytest.mark.parametrize(
    ("asked", "there", "todo"),
    [
        ([("b", "a")], {"a": ""}, {"b": "a"}),
        ([("b", "a")], {"b": "a"}, {}),
        ([("b", "a")], {"a": "", "b": "a"}, {}),
        ([("b", "a")], {"b": ""}, {}),
        ([("b", "a")], {}, {}),
        ([("b", "a"), ("a", "b")], {"a": "", "b": ""}, {"b": "a", "a": "b"}),
        ([("b", "a"), ("a", "b")], {"a": "b", "b": "a"}, {}),
        ([("c", "b"), ("b", "a")], {"a": "", "b": ""}, {"c": "b", "b": "a"}),
        ([("c", "b"), ("b", "a")], {"b": "a", "c": "b"}, {}),
        ([("c", "b"), ("b", "a")], {"a": "", "b": "a", "c": "b"}, {}),
        ([("a", "b")], {"b": "a"}, {"a": "b"}),
        ([("d", "c"), ("c", "b")], {"b": "a", "c": "b"}, {"d": "c", "c": "b"}),
        ([("e", "d"), ("d", "c"), ("c", "b")], {"b": "", "c": "b", "d": "c"}, {"e": "d", "d": "c", "c": "b"}),
        ([("d", "c"), ("b", "a")], {"a": "", "b": "a", "c": ""}, {"d": "c"}),
    ],
)
def test_what_gets_another_name(asked, there, todo):
    assert decide.renames("step", asked, there) == decide.Renames(todo, {})


@pytest.mark.parametrize(
    ("asked", "there", "gone", "faults"),
    [
        ([("a", "a")], {"a": ""}, {}, {"a": "its own name"}),
        ([("b", "a")], {"a": "", "b": ""}, {}, {"b": "there are both"}),
        ([("b", "a"), ("c", "a")], {"a": ""}, {}, {"c": "both renamed_from 'a'"}),
        ([("b", "a")], {"a": ""}, {"b": ""}, {"b": "was removed"}),
        ([("b", "a"), ("y", "x"), ("z", "w")], {"a": "", "b": "", "x": "", "y": "", "w": ""}, {}, {"b": "", "y": ""}),
    ],
)
def test_what_cannot_get_another_name(asked, there, gone, faults):
    found = decide.renames("step", asked, there, gone)
    assert found.todo == {}, "all or nothing"
    assert found.faults.keys() == faults.keys()
    assert all(text in found.faults[name] for name, text in faults.items())


def test_what_was_renamed_and_removed_and_comes_back_is_not_renamed_once_more():
    assert decide.renames("step", [("b", "a")], {"a": ""}, {"b": "a"}) == decide.Renames({}, {})


def test_a_step_is_told_from_those_that_were_called_so_before():
    assert decide.first_identity("a", []) == "a"
    assert decide.first_identity("a", ["b", "a#2"]) == "a"
    assert decide.first_identity("a", ["a"]) == "a#2"
    assert decide.first_identity("a", ["a", "a#2", "b"]) == "a#3"


# --- gaps ---

UP = Upstream("cal", total=3, covered=3, blocked=0, digest=7)
ANY = {"fan_in": FanIn.ANY}
GAPS = [
    ("a gap", {}, CoverageState.ACTIVE, Why.RUN, True),
    ("no members", {"members": 0}, CoverageState.EMPTY, Why.EMPTY, False),
    ("covered", {"ended": EndedRun(4, RunState.COMPLETED, "")}, CoverageState.COVERED, Why.COVERED, False),
    ("failed", {"ended": EndedRun(4, RunState.FAILED, "exit 3")}, CoverageState.BLOCKED, Why.FAILED, False),
    ("cancelled", {"ended": EndedRun(4, RunState.CANCELLED, "x")}, CoverageState.BLOCKED, Why.CANCELLED, False),
    ("running", {"active": ActiveRun(5, RunState.RUNNING, "w")}, CoverageState.ACTIVE, Why.RUN, False),
    ("running old", {"active": ActiveRun(5, RunState.RUNNING, "o")}, CoverageState.ACTIVE, Why.NEWER_INPUT, False),
    ("pending old", {"active": ActiveRun(5, RunState.PENDING, "o")}, CoverageState.ACTIVE, Why.RUN, True),
    ("upstream all there", {"upstream": (UP,)}, CoverageState.ACTIVE, Why.RUN, True),
    (
        "upstream incomplete",
        {"upstream": (msgspec.structs.replace(UP, covered=2),)},
        CoverageState.WAITING,
        Why.UPSTREAM,
        False,
    ),
    ("upstream unknown", {"upstream": (Upstream("cal", 0, 0, 0, 0),)}, CoverageState.WAITING, Why.UPSTREAM, False),
    (
        "upstream failed",
        {"upstream": (msgspec.structs.replace(UP, covered=2, blocked=1),)},
        CoverageState.BLOCKED,
        Why.UPSTREAM_FAILED,
        False,
    ),
    ("no version", {"version_fault": "none"}, CoverageState.BLOCKED, Why.NO_VERSION, False),
    ("disabled", {"enabled": False}, CoverageState.HELD, Why.DISABLED, False),
    ("step gone", {"step_active": False}, CoverageState.HELD, Why.DISABLED, False),
    ("paused", {"paused": "by ada"}, CoverageState.HELD, Why.PAUSED, False),
    ("manual", {"trigger": TriggerType.MANUAL}, CoverageState.HELD, Why.MANUAL, False),
    ("manual asked", {"trigger": TriggerType.MANUAL, "requested": True}, CoverageState.ACTIVE, Why.RUN, True),
    ("not due", {"trigger": TriggerType.CRON, "not_due": "noon"}, CoverageState.HELD, Why.NOT_DUE, False),
    ("due", {"trigger": TriggerType.CRON, "requested": True}, CoverageState.ACTIVE, Why.RUN, True),
    ("any: one is there", {**ANY, "upstream": (Upstream("cal", 3, 1, 2, 7),)}, CoverageState.ACTIVE, Why.RUN, True),
    ("any: none yet", {**ANY, "upstream": (Upstream("cal", 3, 0, 2, 7),)}, CoverageState.WAITING, Why.UPSTREAM, False),
    (
        "any: none known",
        {**ANY, "upstream": (Upstream("cal", 0, 0, 0, 7),)},
        CoverageState.WAITING,
        Why.UPSTREAM,
        False,
    ),
    (
        "any: of one step none",
        {**ANY, "upstream": (Upstream("cal", 3, 3, 0, 7), Upstream("dark", 1, 0, 0, 0))},
        CoverageState.WAITING,
        Why.UPSTREAM,
        False,
    ),
    (
        "any: all blocked",
        {**ANY, "upstream": (Upstream("cal", 3, 0, 3, 7),)},
        CoverageState.BLOCKED,
        Why.UPSTREAM_FAILED,
        False,
    ),
    (
        "any: fewer than before",
        {**ANY, "upstream": (Upstream("cal", 9, 4, 1, 7),), "accepted_results": 5},
        CoverageState.WAITING,
        Why.UPSTREAM,
        False,
    ),
    (
        "any: fewer than before, and no more to come",
        {**ANY, "upstream": (Upstream("cal", 9, 4, 5, 7),), "accepted_results": 5},
        CoverageState.ACTIVE,
        Why.RUN,
        True,
    ),
    ("settling", {"settle_seconds": 9, "settle_at_most_seconds": 90}, CoverageState.WAITING, Why.SETTLING, False),
    (
        "settled",
        {"settle_seconds": 9, "settle_at_most_seconds": 90, "quiet_seconds": 9},
        CoverageState.ACTIVE,
        Why.RUN,
        True,
    ),
    (
        "settles too long",
        {"settle_seconds": 9, "settle_at_most_seconds": 90, "settling_seconds": 90},
        CoverageState.ACTIVE,
        Why.RUN,
        True,
    ),
    ("no copy", {"missing_copies": ("p1",)}, CoverageState.WAITING, Why.NO_COPY, False),
    (
        "cooling",
        {"cooldown_seconds": 60, "seconds_since_last_run": 10.0},
        CoverageState.WAITING,
        Why.COOLDOWN,
        False,
    ),
    (
        "cooled",
        {"cooldown_seconds": 60, "seconds_since_last_run": 61.0},
        CoverageState.ACTIVE,
        Why.RUN,
        True,
    ),
    (
        "covered though paused and disabled",
        {"ended": EndedRun(4, RunState.COMPLETED, ""), "enabled": False, "paused": "x"},
        CoverageState.COVERED,
        Why.COVERED,
        False,
    ),
]


@pytest.mark.parametrize(("facts", "state", "why", "run"), [g[1:] for g in GAPS], ids=[g[0] for g in GAPS])
def test_gap_decisions(facts, state, why, run):
    d = decide.gap(GapFacts(**{"members": 1, "wanted": "w", **facts}))
    assert (d.state, d.why, d.run) == (state, why, run)
    assert d.reason or d.run


def test_only_a_run_that_has_not_started_is_withdrawn_for_newer_input():
    for state in RunState:
        d = decide.gap(GapFacts(members=1, wanted="w", active=ActiveRun(5, state, "old")))
        assert (d.withdraw == 5) == (state in {RunState.PENDING, RunState.RETRY_WAIT})


def test_a_cooldown_says_when_to_look_again():
    d = decide.gap(GapFacts(members=1, wanted="w", cooldown_seconds=60, seconds_since_last_run=20.0))
    assert d.due_in == 40.0


# --- the certificate of a night ---


@pytest.mark.parametrize(
    ("selected", "unsorted", "open_pairs", "waived", "expected"),
    [
        (True, False, [], False, Standing.COVERED),
        (True, False, [], True, Standing.WAIVED),
        (True, False, [Why.MANUAL], True, Standing.EXPLAINED),
        (True, False, [Why.NOT_DUE], False, Standing.EXPLAINED),
        (False, False, [], False, Standing.EXPLAINED),
        (True, False, [Why.MANUAL, Why.FAILED], True, Standing.OPEN),
        (True, True, [], True, Standing.OPEN),
        (True, False, [Why.PAUSED], False, Standing.OPEN),
    ],
)
def test_where_a_package_of_a_night_stands(selected, unsorted, open_pairs, waived, expected):
    assert decide.standing(selected, unsorted, open_pairs, waived) is expected


def test_settling_says_when_to_look_again():
    facts = GapFacts(members=1, wanted="w", settle_seconds=60, settle_at_most_seconds=600, quiet_seconds=20.0)
    assert decide.gap(facts).due_in == 40.0
    assert decide.gap(msgspec.structs.replace(facts, settling_seconds=590.0)).due_in == 10.0


def test_what_takes_the_place_of_a_withdrawn_run_needs_not_be_asked_for_again():
    facts = GapFacts(members=1, wanted="w", trigger=TriggerType.MANUAL, active=ActiveRun(5, RunState.PENDING, "old"))
    assert (decide.gap(facts).run, decide.gap(facts).withdraw) == (True, 5)


def test_a_cause_names_everything_that_is_not_as_it_was():
    now = (5, 2, {"a": 1}, "fit", "1.3.0", "c")
    accepted = AcceptedRun(decide.wanted_digest(*now), "fit", "1.3.0", "c")
    newer = {0: 6, 1: 3, 2: {"a": 2}}
    assert decide.cause(None, *now) == "no result covers this unit yet"
    for n, value in newer.items():
        assert decide.cause(accepted, *now[:n], value, *now[n + 1 :]) == "stale: newer input"
    assert decide.cause(accepted, *now[:4], "1.4.0", "c") == "stale: fit 1.4.0 is wanted now"
    assert decide.cause(accepted, *now[:5], "d") == "stale: the config has a newer revision"
    assert decide.cause(accepted, 6, 2, {}, "map", "1.3.0", "d") == (
        "stale: newer input; map 1.3.0 is wanted now; the config has a newer revision"
    )
    assert decide.cause(accepted, *now) == "stale: its result is gone"


# --- backfills ---


@pytest.mark.parametrize(
    ("kind", "state", "why", "what"),
    [
        *((kind, CoverageState.ACTIVE, Why.RUN, Refill.FOLLOW) for kind in BackfillKind),
        *((kind, CoverageState.EMPTY, Why.EMPTY, Refill.SKIP) for kind in BackfillKind),
        (BackfillKind.MISSING, CoverageState.HELD, Why.MANUAL, Refill.ASK),
        (BackfillKind.MISSING, CoverageState.WAITING, Why.UPSTREAM, Refill.ASK),
        (BackfillKind.MISSING, CoverageState.COVERED, Why.COVERED, Refill.SKIP),
        (BackfillKind.MISSING, CoverageState.BLOCKED, Why.FAILED, Refill.SKIP),
        (BackfillKind.FAILED, CoverageState.BLOCKED, Why.FAILED, Refill.RETRY),
        (BackfillKind.FAILED, CoverageState.BLOCKED, Why.CANCELLED, Refill.SKIP),
        (BackfillKind.FAILED, CoverageState.HELD, Why.MANUAL, Refill.SKIP),
        (BackfillKind.STALE, CoverageState.HELD, Why.MANUAL, Refill.ASK),
        (BackfillKind.STALE, CoverageState.COVERED, Why.COVERED, Refill.SKIP),
        (BackfillKind.ALL, CoverageState.COVERED, Why.COVERED, Refill.REDRIVE),
        (BackfillKind.ALL, CoverageState.BLOCKED, Why.CANCELLED, Refill.RETRY),
        (BackfillKind.ALL, CoverageState.BLOCKED, Why.UPSTREAM_FAILED, Refill.ASK),
    ],
)
def test_what_a_backfill_does_with_a_unit(kind, state, why, what):
    found, note = decide.refill(kind, state, why)
    assert found is what
    assert bool(note) == (what is Refill.SKIP)


# --- admission ---


def test_admission_fills_slots_in_order_and_says_what_the_others_wait_for():
    pending = [PendingRun(i, 1.0, 2.0) for i in range(4)]
    admitted, waiting = decide.admit(pending, Capacity(0, 1.0, 0.0), Capacity(10, 3.0, 100.0))
    assert admitted == [0, 1]
    assert waiting == {2: "free cores: 3 of 3 are in use", 3: "free cores: 3 of 3 are in use"}


def test_a_large_run_is_not_starved_by_small_ones_behind_it():
    admitted, _ = decide.admit([PendingRun(1, 4.0, 1), PendingRun(2, 1.0, 1)], Capacity(1, 2.0, 0), Capacity(9, 4.0, 9))
    assert admitted == []


def test_what_can_never_fit_or_is_paused_is_passed_over():
    pending = [PendingRun(1, 99, 1), PendingRun(2, 1, 99), PendingRun(3, 1, 1, "paused by ada"), PendingRun(4, 1, 1)]
    admitted, waiting = decide.admit(pending, Capacity(0, 0.0, 0.0), Capacity(9, 4.0, 9.0))
    assert admitted == [4]
    assert "never fits: asks for 99 cores" in waiting[1]
    assert "never fits: asks for 99 GB" in waiting[2]
    assert waiting[3] == "paused by ada"


def runs_of(*queues: str, **more: object) -> list[PendingRun]:
    return [PendingRun(i, 1.0, 1.0, shares=(queue,), **more) for i, queue in enumerate(queues)]


def test_priority_comes_before_age():
    pending = [PendingRun(1, 1, 1, priority=-1), PendingRun(2, 1, 1), PendingRun(3, 1, 1, priority=5)]
    assert decide.admit(pending, Capacity(0), Capacity(2))[0] == [3, 2]


def test_a_free_slot_goes_to_who_has_the_least_in_flight_for_its_weight():
    pending = runs_of(*"aaaaaaaa", *"bbbbbbbb")
    even = {"a": Share(), "b": Share()}
    assert decide.admit(pending, Capacity(0), Capacity(4), even)[0] == [0, 8, 1, 9]
    heavy = {"a": Share(), "b": Share(weight=3.0)}
    admitted, _ = decide.admit(pending, Capacity(0), Capacity(8), heavy)
    assert sum(i >= 8 for i in admitted) == 6
    behind = {"a": Share(runs=3), "b": Share(runs=1)}
    assert decide.admit(pending, Capacity(4), Capacity(7), behind)[0] == [8, 9, 0]


def test_of_equals_the_one_served_the_longest_ago_is_next():
    """With a single slot nobody has anything in flight when it is free."""
    served = {"a": Share(served=20.0), "b": Share(served=10.0), "c": Share()}
    order = []
    for now in range(30, 36):
        (i,), _ = decide.admit(runs_of("a", "b", "c"), Capacity(0), Capacity(1), served)
        order.append("abc"[i])
        served[order[-1]] = Share(served=float(now))
    assert "".join(order) == "cbacba"


def test_who_is_at_a_limit_of_its_own_stops_nobody():
    shares = {"a": Share("pipeline maps", 2, 2), "b": Share("pipeline fits"), "s": Share("step fits/one", 0, 1)}
    pending = [
        *(PendingRun(i, 1, 1, priority=9, shares=("a",)) for i in (1, 2)),
        *(PendingRun(i, 1, 1, shares=("b", "s")) for i in (3, 4)),
        PendingRun(5, 1, 1, shares=("b",)),
    ]
    admitted, waiting = decide.admit(pending, Capacity(2), Capacity(9), shares)
    assert admitted == [3, 5]
    assert waiting == {
        **dict.fromkeys((1, 2), "pipeline maps may have 2 runs in flight, and has"),
        4: "step fits/one may have 1 run in flight, and has",
    }
    _, waiting = decide.admit(pending[:1], Capacity(2), Capacity(9), {"a": Share("pipeline maps", 5, 2)})
    assert waiting == {1: "pipeline maps may have 2 runs in flight, and has 5"}


def test_a_large_run_is_not_starved_by_small_ones_of_other_pipelines():
    pending = [PendingRun(1, 1, 1, shares=("small",)), PendingRun(2, 4, 1, shares=("large",))]
    shares = {"small": Share(runs=2), "large": Share()}
    admitted, waiting = decide.admit(pending, Capacity(2, 2.0, 0), Capacity(9, 4.0, 9), shares)
    assert admitted == []
    assert set(waiting.values()) == {"free cores: 2 of 4 are in use"}


QUEUES = st.sampled_from("abc")


@given(st.lists(st.tuples(QUEUES, QUEUES, st.integers(-1, 1), st.booleans())), st.integers(0, 6), st.integers(0, 3))
def test_admission_is_the_plain_rule(wishes, slots, most):
    """Again and again, of those that may start, the first of the queue whose turn it is."""
    shares = {q: Share(q, n, None if q == "a" else most, n + 1.0) for n, q in enumerate("abc")}
    shares |= {f"step {q}": Share(q, limit=2) for q in "abc"}
    pending = [
        PendingRun(i, 1, 1, "paused" * paused, priority, (queue, f"step {step}"))
        for i, (queue, step, priority, paused) in enumerate(wishes)
    ]
    admitted, waiting = decide.admit(pending, Capacity(0), Capacity(slots), shares)
    flight = {key: s.runs for key, s in shares.items()}
    expected: list[int] = []
    while len(expected) < slots:
        fits = [
            p
            for p in pending
            if p.id not in expected
            and not p.paused
            and all(shares[s].limit is None or flight[s] < shares[s].limit for s in p.shares)
        ]
        if not fits:
            break
        recent = {pending[i].shares[0] for i in expected}
        top = min(
            fits,
            key=lambda p: (-p.priority, flight[p.shares[0]] / shares[p.shares[0]].weight, p.shares[0] in recent, p.id),
        )
        expected.append(top.id)
        for s in top.shares:
            flight[s] += 1
    assert sorted([*admitted, *waiting]) == [p.id for p in pending]
    assert admitted == expected


@given(st.lists(st.tuples(st.floats(0.1, 8), st.floats(0.1, 8))), st.integers(0, 5))
def test_admission_never_exceeds_a_limit_and_answers_every_run(wishes, runs):
    pending = [PendingRun(i, c, m) for i, (c, m) in enumerate(wishes)]
    limit = Capacity(runs, 6.0, 7.0)
    admitted, waiting = decide.admit(pending, Capacity(0, 0.0, 0.0), limit)
    assert sorted([*admitted, *waiting]) == list(range(len(wishes)))
    assert len(admitted) <= runs
    assert sum(wishes[i][0] for i in admitted) <= 6.0 + 1e-6
    assert sum(wishes[i][1] for i in admitted) <= 7.0 + 1e-6


# --- jobs ---


@pytest.mark.parametrize(
    ("state", "status", "age", "trigger"),
    [
        (RunState.SUBMITTED, JobStatus.PENDING, 9999, None),
        (RunState.SUBMITTED, JobStatus.RUNNING, 0, "start"),
        (RunState.RUNNING, JobStatus.RUNNING, 9999, None),
        (RunState.SUBMITTED, JobStatus.COMPLETED, 0, "finish"),
        (RunState.RUNNING, JobStatus.COMPLETED, 0, "finish"),
        (RunState.RUNNING, JobStatus.FAILED, 0, "fail"),
        (RunState.RUNNING, JobStatus.CANCELLED, 0, "fail"),
        (RunState.RUNNING, JobStatus.UNKNOWN, 1e9, None),
        (RunState.RUNNING, JobStatus.VANISHED, 5, None),
        (RunState.RUNNING, JobStatus.VANISHED, 31, "fail"),
        (RunState.SUBMITTED, JobStatus.ABSENT, 5, None),
        (RunState.SUBMITTED, JobStatus.ABSENT, 31, "fail"),
    ],
)
def test_verdicts_on_jobs(state, status, age, trigger):
    verdict = decide.judge(state, Report(status), age, grace_seconds=30)
    assert verdict.trigger == trigger
    assert (verdict.failure is not None) == (trigger == "fail")


@pytest.mark.parametrize("failure", FailureClass)
@pytest.mark.parametrize(("failures", "left"), [(0, True), (1, True), (2, False), (9, False)])
def test_retries_need_a_repeatable_failure_and_retries_left(failure, failures, left):
    facts = MoveFacts(failure=failure, failures=failures, max_retries=2)
    assert decide.may_retry(facts) == (left and failure in REPEATABLE)


def test_backoff_doubles_up_to_a_limit():
    assert [decide.backoff(n, 10, 60) for n in range(1, 6)] == [10, 20, 40, 60, 60]


FIT = {"part": True, "newest": True, "active": None, "exit_code": 0, "purged": False}


@pytest.mark.parametrize(
    ("facts", "computed", "collected"),
    [
        ({}, "", ""),
        ({"part": False}, "no longer part", "no longer part"),
        ({"active": 7}, "run 7 of the same unit", "run 7 of the same unit"),
        ({"newest": False}, "no longer the newest", "no longer the newest"),
        ({"exit_code": None}, "", "no exit record"),
        ({"exit_code": 3}, "", "code 3"),
        ({"purged": True}, "", "purged"),
    ],
)
def test_when_an_ended_run_may_begin_another_attempt(facts, computed, collected):
    f = AgainFacts(**{**FIT, **facts})
    for begin, said in ((RunState.PENDING, computed), (RunState.COLLECTING_RESULTS, collected)):
        reason = decide.not_again(f, begin)
        assert said in reason
        assert bool(said) == bool(reason)
