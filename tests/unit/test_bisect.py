"""The search for the member that a unit fails on."""

from __future__ import annotations

from math import ceil, log2

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from wfm.decide import ActiveRun, AgainFacts, EndedRun, GapFacts, Look, Search, Tried, Upstream, bisect, gap, not_again
from wfm.gaps.quarantine import Inputs, Member
from wfm.model import CoverageState, FailureClass, Probe, RunState, TriggerType, Why


def searched(n, fails, most=1):
    """How a search among n members ends, and what it tried; `fails` tells of a set of members whether it does."""
    tried: list[Tried] = []
    while (look := bisect(n, tried, most)).probe:
        first, last = look.probe
        assert 1 <= first <= last <= n
        assert look.probe not in {(t.first, t.last) for t in tried}, "nothing is tried twice"
        tried.append(Tried(100 + len(tried), first, last, not fails(set(range(first, last + 1))), "it chokes"))
    return look, tried


members = st.integers(2, 200)


@given(members, st.data())
def test_one_guilty_member_is_found_and_has_failed_alone(n, data):
    guilty = data.draw(st.integers(1, n))
    look, tried = searched(n, lambda some: guilty in some)
    assert look.guilty == guilty
    assert next(t for t in tried if t.run == look.evidence) == Tried(look.evidence, guilty, guilty, False, "it chokes")
    assert len(tried) <= ceil(log2(n)) + 1
    assert any(t.passed for t in tried), "something passes without it"


@given(members, st.data())
def test_of_several_the_first_is_found_and_the_others_when_the_rest_has_failed(n, data):
    guilty = data.draw(st.sets(st.integers(1, n), min_size=1, max_size=n - 1))
    left, found = list(range(1, n + 1)), set()
    most = len(guilty)
    while guilty - found:
        if len(left) < 2:
            break
        at = list(left)
        look, tried = searched(len(at), lambda some, at=at: any(at[i - 1] in guilty for i in some), most - len(found))
        assert look.guilty, (look, found)
        assert at[look.guilty - 1] == min(guilty - found)
        assert len(tried) <= ceil(log2(len(at))) + 1 + most
        found.add(at[look.guilty - 1])
        left.remove(at[look.guilty - 1])
    assert len(guilty - found) <= (len(left) < 2)


@given(members, st.integers(1, 5))
def test_what_fails_on_everything_is_given_up_after_few_probes(n, most):
    look, tried = searched(n, lambda some: True, most)
    assert look.stuck.startswith("nothing passed, and ")
    assert look.proven
    assert len(tried) <= ceil(log2(n)) + most


@given(members, st.data())
def test_a_pair_that_fails_only_together_puts_it_on_no_member(n, data):
    pair = data.draw(st.sets(st.integers(1, n), min_size=2, max_size=2))
    look, tried = searched(n, lambda some: pair <= some)
    assert (look.guilty, look.stuck) == (0, "its members fail together, but none fails by itself")
    assert look.proven
    assert len(tried) <= ceil(log2(n)) + 1


@given(members)
def test_where_nothing_fails_any_more_nobody_is_guilty(n):
    assert searched(n, lambda some: False)[0].stuck == "its members fail together, but none fails by itself"


def test_a_probe_that_says_nothing_of_its_members_ends_the_search():
    look = bisect(8, [Tried(7, 1, 4, None, "the job is vanished")], 1)
    assert look == Look(stuck="run 7 says nothing of its members: the job is vanished")


FAILED = EndedRun(12, RunState.FAILED, "exit code 3", failure=FailureClass.EXIT)
FACTS = GapFacts(members=8, wanted="d", ended=FAILED, quarantine_at_most=2, search=Search(members=8, most=2))
PASSED, BAD = Tried(13, 1, 4, True), Tried(14, 5, 5, False, "exit code 3")
FOUND = (PASSED, Tried(15, 5, 6, False), BAD)


def decide(search=None, **more):
    facts = structs.replace(FACTS, **more)
    return gap(structs.replace(facts, search=structs.replace(facts.search, **(search or {}))))


def test_a_failed_unit_is_searched_whatever_its_trigger():
    for trigger in TriggerType:
        assert decide(trigger=trigger).probe == (1, 4)
    d = decide()
    assert (d.state, d.why, d.run) == (CoverageState.ACTIVE, Why.BISECTING, False)


def test_what_is_found_is_left_out_on_its_evidence():
    d = decide({"tried": FOUND})
    assert (d.guilty, d.evidence, d.probe) == (5, 14, None)


def test_nothing_is_searched_while_the_pipeline_stands():
    d = decide(paused="pipeline paused by ada")
    assert (d.state, d.why, d.probe) == (CoverageState.BLOCKED, Why.FAILED, None)
    assert d.reason == "run 12: exit code 3; bisecting waits: pipeline paused by ada"
    assert decide(enabled=False).reason.endswith("bisecting waits: disabled")
    assert decide({"tried": FOUND}, paused="x").guilty == 0


def test_without_a_copy_a_probe_waits():
    d = decide(missing_copies=("a",))
    assert (d.state, d.why, d.due_in, d.probe) == (CoverageState.WAITING, Why.NO_COPY, 60.0, None)


def test_when_as_many_as_may_are_left_out_and_the_rest_fails_these_are_released():
    d = decide({"unproven": ("a", "b")}, quarantined=("a", "b"))
    assert d.release == "it still fails without a, b: no other member may be left out"
    assert decide({"unproven": ("a",), "members": 1}, quarantined=("a",)).release.endswith("one member is left")
    # What a result was made without since has proven its worth, and stays.
    d = decide(quarantined=("a", "b"))
    assert (d.release, d.guilty, d.probe) == ("", 0, None)
    assert d.reason.endswith("not bisected: not more than 2 may be in quarantine")
    # Where a search of the rest proves that no one member is to blame, the former one explains nothing either.
    together = (Tried(13, 1, 4, True), Tried(14, 5, 6, True), Tried(15, 7, 7, True), Tried(16, 8, 8, True))
    assert decide({"tried": together, "unproven": ("a",)}, quarantined=("a",)).release.startswith("it still fails")
    vanished = (Tried(13, 1, 4, None, "gone"),)
    assert decide({"tried": vanished, "unproven": ("a",)}, quarantined=("a",)).release == ""


def test_a_search_that_is_over_is_not_begun_again():
    d = decide({"over": "it still fails without a"})
    assert (d.state, d.why, d.probe) == (CoverageState.BLOCKED, Why.FAILED, None)
    assert d.reason == "run 12: exit code 3; bisected: it still fails without a"


def test_an_active_probe_goes_on_as_long_as_the_unit_wants_what_failed():
    probe = Probe(version=4, number=3, first=5, last=6, members=8)
    active = ActiveRun(17, RunState.PENDING, "d", probe=probe)
    d = decide(active=active)
    assert (d.state, d.why, d.withdraw) == (CoverageState.ACTIVE, Why.BISECTING, None)
    assert d.reason == "run 17: probe 3, members 5 to 6 of 8, because run 12 failed: exit code 3"
    # Newer input takes its place; nobody asked for it, though, as nobody asked for the probe.
    d = gap(structs.replace(FACTS, active=active, wanted="e", ended=None, search=None, trigger=TriggerType.MANUAL))
    assert (d.withdraw, d.why, d.run) == (17, Why.MANUAL, False)
    # So does the word that nothing is to be left out.
    d = gap(structs.replace(FACTS, active=active, quarantine_at_most=0, search=None))
    assert (d.withdraw, d.why) == (17, Why.FAILED)


def test_what_is_left_out_is_said_of_runs_and_results():
    done = EndedRun(20, RunState.COMPLETED, "")
    d = gap(structs.replace(FACTS, ended=done, search=None, quarantined=("a",)))
    assert (d.reason, d.covered_by) == ("run 20 without 1 quarantined: a", 20)
    d = gap(structs.replace(FACTS, ended=None, search=None, quarantined=("a",)))
    assert (d.run, d.reason) == (True, " without 1 quarantined: a")


def test_members_that_are_others_than_the_digest_says_are_not_searched():
    a, b = (Member(id=i, name=str(i), item=i) for i in (1, 2))
    assert Inputs(3, 2, ()).made_of([a, b])
    assert not Inputs(4, 2, ()).made_of([a, b]), "one has other content"
    assert not Inputs(3, 2, ()).made_of([a]), "one is missing"

    def part(digest, covered=1):
        return Upstream(step="scan", total=1, covered=covered, blocked=0, digest=digest, identity="scan")

    whole = Inputs(9, 9, (Upstream("scan", 3, 2, 0, 3, "scan"), Upstream("same", 1, 1, 0, 7, "same")))
    units = [Member(id=i, name=str(i), dims="x", upstream=(part(i),)) for i in (1, 2)]
    assert whole.made_of(units), "one has no result yet: that step takes those that are there"
    assert not whole.made_of(units[:1])
    assert not whole.made_of([units[0], Member(id=2, name="2", dims="x", upstream=(part(5),))])
    left = whole.without(units[:1])
    assert (left.items, left.members) == (9, 9)
    assert left.upstream == (Upstream("scan", 2, 1, 0, 2, "scan"), Upstream("same", 1, 1, 0, 7, "same"))


def test_a_probe_is_not_repeated_by_hand():
    facts = AgainFacts(part=True, newest=True, active=None, exit_code=3, purged=False, probe_of=12)
    assert not_again(facts, RunState.PENDING).startswith("it is a probe of run 12")
