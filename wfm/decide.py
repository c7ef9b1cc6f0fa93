"""Every decision of wfm: facts in, a value with its reason out. Pure; nothing here touches the world.

The store and the roles gather facts in bulk, ask here, and carry the answers out.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby, pairwise
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError
from msgspec import Struct, structs
from packaging.version import InvalidVersion, Version

from wfm.errors import nearest
from wfm.model import (
    OF_DATA,
    REPEATABLE,
    BackfillKind,
    CoverageState,
    FailureClass,
    FanIn,
    JobStatus,
    OnStale,
    Probe,
    Report,
    RunState,
    Schedule,
    Standing,
    TriggerType,
    VersionPolicy,
    Why,
)

# --- digests ---

DIGEST_MODULUS = 1 << 128


def item_hash(*parts: object) -> int:
    """The 128-bit hash of one item of a set; parts are joined unambiguously."""
    text = "".join(f"{len(str(p))}:{p}," for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


def set_digest(items: Iterable[int]) -> int:
    """The digest of a set: the sum of its items' hashes modulo 2^128.

    Items can be added and removed one by one, in any order, also by ``sum()`` in SQL. This is the incremental
    multiset hash MSet-Add-Hash (Clarke et al., ASIACRYPT 2003) on AdHash (Bellare and Micciancio, EUROCRYPT 1997).
    It tells sets of honest data apart; it is no defence against somebody who may choose the items.
    """
    return sum(items) % DIGEST_MODULUS


def wanted_digest(
    members: int, count: int, upstream: Mapping[str, int], software: str, version: str, config: str
) -> str:
    """The digest that a run must have to cover a unit: inputs with checksums, software version and config.

    Args:
        members: digest of the unit's raw data packages. count: their number.
        upstream: by identity of the step depended on, the digest of its accepted results.
        software, version: what is to run. config: hash of its parameters, empty for none.

    Returns:
        32 hexadecimal digits.
    """
    steps = [f"{name}={upstream[name]}" for name in sorted(upstream)]
    return f"{item_hash('wanted', members, count, *steps, software, version, config):032x}"


def own_members(fan_in: FanIn, members: int, count: int) -> tuple[int, int]:
    """What of a unit's raw data packages counts for its digest; arguments as of `wanted_digest`.

    Where a step takes the upstream results that are there, only those do: it does not read data that none covers yet.
    """
    return (members, count) if fan_in is not FanIn.ANY else (0, 0)


def in_place_of_revoked(wanted: str, revoked: Collection[str]) -> str:
    """The digest that a run must have where results of some digests were revoked.

    Each revoked digest leads to one other. So the result that takes its place is another one for whatever reads it, and
    when the revocation is undone, the first result counts again.
    """
    while wanted in revoked:
        wanted = f"{item_hash('in place of', wanted):032x}"
    return wanted


# --- versions ---


class SoftwareVersion(Struct, frozen=True):
    """One version of a software. `state` is active, deprecated or revoked."""

    id: int
    version: str
    state: str


def choose_version(
    policy: VersionPolicy, named: str, versions: Sequence[SoftwareVersion]
) -> tuple[SoftwareVersion | None, str]:
    """The version a step runs now, or None and why there is none."""
    if policy is VersionPolicy.PINNED:
        for v in versions:
            if v.version == named:
                if v.state == "revoked":
                    return None, f"the pinned version {named} is revoked"
                return v, ""
        return None, f"the pinned version {named} does not exist"
    usable = [(Version(v.version), v) for v in versions if v.state == "active"]
    wish = "active version"
    if policy is VersionPolicy.COMPATIBLE and named:
        try:
            base = Version(named)
        except InvalidVersion:
            return None, f"{named!r} is not a version"
        usable = [(n, v) for n, v in usable if n.major == base.major and n >= base]
        wish = f"active version compatible with {named}"
    if not usable:
        have = ", ".join(f"{v.version} ({v.state})" for v in versions) or "none"
        return None, f"no {wish}; known: {have}"
    return max(usable, key=lambda nv: nv[0])[1], ""


# --- schedules ---


def schedule_faults(schedule: Schedule) -> Iterator[tuple[str, str]]:
    """What is wrong with a schedule: the key, and the text without its value."""
    fields = len(schedule.cron.split())
    if fields != 5:
        yield "cron", f"has {fields} fields; allowed are five: minute, hour, day of month, month, day of week"
    else:
        try:
            if next(iter(CronSim(schedule.cron, datetime(2000, 1, 1, tzinfo=UTC))), None) is None:
                yield "cron", "never comes"
        except CronSimError as e:
            yield "cron", f"is not a cron expression: {str(e)[:1].lower()}{str(e)[1:]}"
    try:
        ZoneInfo(schedule.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        near = nearest(schedule.timezone, available_timezones())
        yield "timezone", "is not a time zone" + (f", did you mean {near!r}?" if near else " such as America/Santiago")


def due_times(schedule: Schedule, after: datetime) -> Iterator[datetime]:
    """The times of a schedule after this one, in UTC.

    Where clocks are set forward, a time that does not exist comes at the first moment after the gap; where they are
    set back, one that exists twice comes the first time. Expressions that begin with ``*`` in minute or hour follow
    the hours as they pass.
    """
    for time in CronSim(schedule.cron, after.astimezone(ZoneInfo(schedule.timezone))):
        # In UTC: times of one zone compare as the clock shows them, and it shows some twice.
        if (time := time.astimezone(UTC)) > after:
            yield time


def due_text(schedule: Schedule, due: datetime) -> str:
    """A time as people read it: in its zone and in UTC."""
    utc = f"{due.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    if schedule.timezone == "UTC":
        return utc
    return f"{due.astimezone(ZoneInfo(schedule.timezone)):%Y-%m-%d %H:%M} {schedule.timezone} ({utc})"


# --- approval ---


class ApprovalLimits(Struct, frozen=True):
    """How many units, and core-hours, may become stale at once without anybody being asked."""

    units: int = 1000
    core_hours: float = 100.0


class Wish(Struct, frozen=True):
    """What a step wants since it last changed, and what that made stale.

    Attributes:
        units: whose result was of another version or config when this was first seen: all of the step, so that it is
            one answer for all of them. core_hours: that these take, None if nothing is known.
        approved: somebody said that they may run.
    """

    units: int
    core_hours: float | None = None
    approved: bool = False


def needs_approval(wish: Wish, on_stale: OnStale, limits: ApprovalLimits) -> bool:
    """Whether units that another version or config made stale wait until somebody approves."""
    if wish.approved:
        return False
    return on_stale is OnStale.HOLD or wish.units > limits.units or (wish.core_hours or 0.0) > limits.core_hours


# --- bisection ---


class Tried(Struct, frozen=True):
    """A probe that has ended: members `first` to `last` of a failed unit, by their places from 1, were run alone.

    Attributes:
        passed: None where it says nothing of the data; `message` then says why.
    """

    run: int
    first: int
    last: int
    passed: bool | None
    message: str = ""


class Look(Struct, frozen=True):
    """What a search does next; one of these.

    Attributes:
        probe: run members from this place to that one. guilty: the place of the member that the unit fails on.
        stuck: why it ends without one. proven: what was seen says so; otherwise a probe could not be finished.
        evidence: the run that failed with the guilty member alone.
    """

    probe: tuple[int, int] | None = None
    guilty: int = 0
    evidence: int = 0
    stuck: str = ""
    proven: bool = False


def bisect(members: int, tried: Collection[Tried], most: int) -> Look:
    """How to go on looking for the one of some members, in a fixed order, that a unit fails on.

    The left half of the members in question is run: if it fails they are in question next, else the others. So one
    guilty among n is found, and seen to fail by itself, in ceil(log2 n) + 1 probes at most. This is the adaptive
    group test by halves (Dorfman 1943 for tests of pools; Hwang 1972 for splitting a pool that is bad), which is what
    delta debugging does where one part of the input is to blame (Zeller and Hildebrandt 2002). Of several guilty ones
    the first is found, and the others when what is left has failed in its turn. A member that is seen alone is the only
    evidence that counts: what fails in company only, no probe can put on one member.

    Where nothing passed at all, the first member fails because all do, or because it is guilty. Others are run alone
    until one passes, or more than may be left out have failed, which proves that leaving out cannot help.

    Args:
        members: how many; more than one. most: how many of them may be left out.
        tried: the probes of this search that have ended.
    """
    unsure = [t for t in tried if t.passed is None]
    if unsure:
        return Look(stuck=f"run {unsure[0].run} says nothing of its members: {unsure[0].message}")
    known = {(t.first, t.last): t for t in tried}
    first, last = 1, members
    while first < last:
        half = first, (first + last) // 2
        if half not in known:
            return Look(probe=half)
        first, last = (half[1] + 1, last) if known[half].passed else half
    if (first, first) not in known:
        return Look(probe=(first, first))
    alone = known[first, first]
    if alone.passed:
        return Look(stuck="its members fail together, but none fails by itself", proven=True)
    bad = sorted(t.first for t in tried if t.first == t.last and not t.passed)
    if any(t.passed for t in tried):
        return Look(guilty=first, evidence=alone.run)
    if len(bad) > most or len(bad) == members:
        return Look(stuck=f"nothing passed, and {len(bad)} of its members fail by themselves", proven=True)
    # The first has failed; then the last, and then as far as possible from those seen.
    far = max(pairwise(bad), key=lambda gap: gap[1] - gap[0]) if bad[-1] == members else (members, members)
    return Look(probe=((far[0] + far[1]) // 2,) * 2)


class Search(Struct, frozen=True):
    """The search for the members that a failed unit fails on.

    Attributes:
        members: how many it has, without those in quarantine.
        most: so many may be in quarantine at once. tried: the probes that have ended.
        unproven: of the members in quarantine, those for which no result came of the rest since; of the whole search.
        over: why this search has ended already; empty if it has not.
    """

    members: int
    most: int
    tried: tuple[Tried, ...] = ()
    unproven: tuple[str, ...] = ()
    over: str = ""


# --- gaps ---


class Upstream(Struct, frozen=True):
    """What the units of one upstream step inside a unit look like.

    Attributes:
        step: its name. total: units that the catalogue has. covered, blocked: of these.
        digest: of the accepted results of the covered ones. identity: what stays when the step is renamed.
    """

    step: str
    total: int
    covered: int
    blocked: int
    digest: int
    identity: str = ""


def quarantined(names: Sequence[str]) -> str:
    """What is said of a run that leaves members out; empty where none is."""
    return f" without {len(names)} quarantined: {named(names)}" if names else ""


class ActiveRun(Struct, frozen=True):
    """The run that is on its way for a unit.

    Attributes:
        wanted: its digest; of a probe, that of the run whose failure it examines.
        missing: the scheduled observations that it did not wait for. probe: what part it tries; None of other runs.
    """

    id: int
    state: RunState
    wanted: str
    missing: tuple[str, ...] = ()
    probe: Probe | None = None


class EndedRun(Struct, frozen=True):
    """The latest run with the wanted digest that has ended.

    Attributes:
        missing: as in `ActiveRun`.
        failures: attempts that failed with this digest, however often somebody had them repeated.
        failure: class of the last one.
    """

    id: int
    state: RunState
    message: str
    missing: tuple[str, ...] = ()
    failures: int = 0
    failure: str = ""

    @property
    def of_data(self) -> bool:
        """Whether it failed, and that may lie in what it read."""
        return self.state is RunState.FAILED and self.failure in OF_DATA


class ObservingPlan(Struct, frozen=True):
    """What the observing plan says of a unit whose step waits until its group is complete.

    Attributes:
        expected: scheduled observations that fall into the unit and are not lost. missing: names of those that have
            not arrived. seconds_left: until the deadline. deadline: the same, as people read it.
    """

    expected: int
    missing: tuple[str, ...]
    seconds_left: float
    deadline: str


PLAN_LOOK_SECONDS = 300.0
"""What is missing may arrive in another unit; so the plan is looked at again before its deadline."""


def named(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def without(missing: Sequence[str]) -> str:
    """What is said of a run that did not wait any longer; empty where nothing is missing."""
    return f", without {named(missing)}" if missing else ""


class AcceptedRun(Struct, frozen=True):
    """The run that coverage rests on: its digest, software with version, and hash of its config."""

    wanted: str
    software: str
    version: str
    config: str


def cause(
    accepted: AcceptedRun | None,
    members: int,
    count: int,
    upstream: Mapping[str, int],
    software: str,
    version: str,
    config: str,
    revoked: Collection[str] = (),
) -> str:
    """Why a unit is a gap: everything that is not as it was for the run it rests on. Arguments as of `wanted_digest`.

    Whatever came first, and however many runs were withdrawn since, nothing is left out.

    Args:
        revoked: digests of the unit whose results were revoked.
    """
    if accepted is None:
        return "no result covers this unit yet"
    causes = []
    if accepted.wanted in revoked:
        causes.append("its result was revoked")
    same_otherwise = wanted_digest(members, count, upstream, accepted.software, accepted.version, accepted.config)
    if in_place_of_revoked(same_otherwise, set(revoked) - {accepted.wanted}) != accepted.wanted:
        causes.append("newer input")
    if (software, version) != (accepted.software, accepted.version):
        causes.append(f"{software} {version} is wanted now")
    if config != accepted.config:
        causes.append("the config has a newer revision")
    return "stale: " + ("; ".join(causes) or "its result is gone")


class GapFacts(Struct, frozen=True):
    """All that decides whether one (step, unit) is a gap, and whether the gap becomes a run now.

    Attributes:
        not_due: with trigger CRON, the next time and its expression. requested: somebody, or that time, asked for it.
        orphaned: what the step is grouped by now, if this unit is none of these.
        accepted_results: number of upstream results that the accepted run read; counted for fan-in other than all.
        quiet_seconds: since what is wanted last changed.
        settling_seconds: since nothing but settling keeps it from running.
        quarantine_at_most: so many members may be left out. quarantined: names of those that `wanted` leaves out.
        search: where the unit failed and members may be left out; None: nothing is to be searched.
    """

    members: int
    wanted: str
    version_fault: str = ""
    config_fault: str = ""
    upstream: tuple[Upstream, ...] = ()
    fan_in: FanIn = FanIn.ALL
    accepted_results: int = 0
    active: ActiveRun | None = None
    ended: EndedRun | None = None
    step_active: bool = True
    orphaned: str = ""
    enabled: bool = True
    paused: str = ""
    trigger: TriggerType = TriggerType.CONTINUOUS
    not_due: str = ""
    requested: bool = False
    cooldown_seconds: float = 0.0
    seconds_since_last_run: float | None = None
    settle_seconds: float = 0.0
    settle_at_most_seconds: float = 0.0
    quiet_seconds: float = 0.0
    settling_seconds: float = 0.0
    missing_copies: tuple[str, ...] = ()
    plan: ObservingPlan | None = None
    held: str = ""
    """Stale, with the same raw data, and not approved: why."""
    revoked: bool = False
    """The result that the unit has must not be used."""
    quarantine_at_most: int = 0
    quarantined: tuple[str, ...] = ()
    search: Search | None = None

    @property
    def unwanted(self) -> bool:
        """Whether the pipeline has no such pair any more."""
        return not self.step_active or bool(self.orphaned)


class GapDecision(Struct, frozen=True):
    """What coverage says, and what follows.

    Attributes:
        run: start a run. withdraw: id of a run to withdraw first. due_in: seconds until somebody must look again.
        covered_by: the run that covers the unit.
        probe: run these places of its members alone. guilty: the place of the member to leave out from now on, with
            the run that failed with it alone as evidence.
        release: what is in quarantine without proof explains nothing: why.
    """

    state: CoverageState
    why: Why
    reason: str
    run: bool = False
    withdraw: int | None = None
    due_in: float | None = None
    covered_by: int | None = None
    probe: tuple[int, int] | None = None
    guilty: int = 0
    evidence: int = 0
    release: str = ""


_NOT_STARTED = frozenset({RunState.PENDING, RunState.RETRY_WAIT})


def upstream_complete(upstream: Sequence[Upstream]) -> bool:
    """Whether the result of every upstream unit that the catalogue has is there."""
    return all(u.total > 0 and u.covered == u.total for u in upstream)


def _upstream_gap(f: GapFacts) -> GapDecision | None:
    """What the steps that it depends on keep a unit from; None if nothing."""
    if f.fan_in is not FanIn.ANY:
        return _not_all(f.upstream)
    for u in f.upstream:
        if u.total and u.blocked == u.total:
            text = f"all {u.total} units of {u.step} are blocked"
            return GapDecision(CoverageState.BLOCKED, Why.UPSTREAM_FAILED, text)
        if not u.covered:
            text = f"none of {u.total} units of {u.step} is covered"
            return GapDecision(CoverageState.WAITING, Why.UPSTREAM, text)
    covered = sum(u.covered for u in f.upstream)
    possible = sum(u.total - u.blocked for u in f.upstream)
    if covered < min(f.accepted_results, possible):
        # They are being made again. Meanwhile a result of many is not replaced by one of a few.
        text = f"its result is made of {f.accepted_results} upstream results, of which {covered} are up to date"
        return GapDecision(CoverageState.WAITING, Why.UPSTREAM, text)
    return None


def _not_all(upstream: Sequence[Upstream]) -> GapDecision | None:
    blocked = [u for u in upstream if u.blocked]
    if blocked:
        u = blocked[0]
        return GapDecision(
            CoverageState.BLOCKED,
            Why.UPSTREAM_FAILED,
            f"{u.blocked} of {u.total} units of {u.step} are blocked",
        )
    if not upstream_complete(upstream):
        u = next(u for u in upstream if u.covered < max(u.total, 1))
        text = f"{u.covered} of {u.total} units of {u.step} are covered"
        return GapDecision(CoverageState.WAITING, Why.UPSTREAM, text)
    return None


def _partial(f: GapFacts) -> str:
    """Which upstream results are missing in what is covered."""
    missing = [f"{u.total - u.covered} of {u.total} units of {u.step}" for u in f.upstream if u.covered < u.total]
    return f" without {' and '.join(missing)}" if missing else ""


def gap(f: GapFacts) -> GapDecision:
    """Whether a unit is covered, and if not, why nothing runs or that a run starts now."""
    probe = f.active is not None and f.active.probe is not None
    unwanted = f.unwanted or (f.active and f.active.wanted != f.wanted) or (probe and not f.quarantine_at_most)
    withdraw = f.active.id if f.active and f.active.state in _NOT_STARTED and unwanted else None
    if withdraw is None:
        return _gap(f, None)
    # Who asked for the run that is withdrawn asked for the one that takes its place. Nobody asked for a probe.
    asked = structs.replace(f, requested=f.requested or not probe)
    return structs.replace(_gap(asked, withdraw), withdraw=withdraw)


def _gap(f: GapFacts, withdraw: int | None) -> GapDecision:
    say = GapDecision
    if f.active and withdraw is None:
        if f.active.wanted == f.wanted and f.active.probe:
            return say(CoverageState.ACTIVE, Why.BISECTING, f"run {f.active.id}{examines(f, f.active.probe)}")
        if f.active.wanted == f.wanted:
            made = f"{without(f.active.missing)}{quarantined(f.quarantined)}"
            return say(CoverageState.ACTIVE, Why.RUN, f"run {f.active.id}{made}")
        return say(
            CoverageState.ACTIVE,
            Why.NEWER_INPUT,
            f"newer input, version or config waits for run {f.active.id}",
        )
    if f.orphaned:
        return say(CoverageState.EMPTY, Why.ORPHANED, f"its step is grouped by {f.orphaned} now")
    if f.members == 0:
        return say(CoverageState.EMPTY, Why.EMPTY, "no raw data package belongs to this unit any more")
    if not f.step_active:
        return say(CoverageState.HELD, Why.DISABLED, "the step is no longer part of its pipeline")
    if waits := _upstream_gap(f):
        return waits
    if f.version_fault:
        return say(CoverageState.BLOCKED, Why.NO_VERSION, f.version_fault)
    if f.config_fault:
        return say(CoverageState.BLOCKED, Why.NO_CONFIG, f.config_fault)
    if f.ended and f.ended.state is RunState.COMPLETED:
        return say(
            CoverageState.COVERED,
            Why.COVERED,
            f"run {f.ended.id}{_partial(f)}{without(f.ended.missing)}{quarantined(f.quarantined)}",
            covered_by=f.ended.id,
        )
    if f.ended and f.ended.state is RunState.FAILED:
        often = f" ({f.ended.failures} failures with the same input, version and config)" * (f.ended.failures > 1)
        failed = f"run {f.ended.id}{quarantined(f.quarantined)}: {f.ended.message}{often}"
        return _search(f, say(CoverageState.BLOCKED, Why.FAILED, failed))
    if f.ended and f.ended.state is RunState.CANCELLED:
        return say(CoverageState.BLOCKED, Why.CANCELLED, f"run {f.ended.id}: {f.ended.message}")
    if f.held and not f.requested:
        return say(CoverageState.HELD, Why.REVOKED if f.revoked else Why.APPROVAL, f.held)
    if not f.enabled:
        return say(CoverageState.HELD, Why.DISABLED, "the pipeline is disabled")
    if f.paused:
        return say(CoverageState.HELD, Why.PAUSED, f.paused)
    if f.trigger is TriggerType.CRON and not f.requested:
        return say(CoverageState.HELD, Why.NOT_DUE, f"not due before {f.not_due}")
    if f.trigger is not TriggerType.CONTINUOUS and not f.requested:
        return say(CoverageState.HELD, Why.MANUAL, "the pipeline runs on request only")
    if f.plan and f.plan.missing and f.plan.seconds_left > 0:
        return say(
            CoverageState.WAITING,
            Why.INCOMPLETE,
            f"{len(f.plan.missing)} of {f.plan.expected} scheduled observations have not arrived:"
            f" {named(f.plan.missing)}; runs without them from {f.plan.deadline} on",
            due_in=min(f.plan.seconds_left, PLAN_LOOK_SECONDS),
        )
    if f.missing_copies:
        copies = named(f.missing_copies)
        return say(CoverageState.WAITING, Why.NO_COPY, f"no reachable copy of {copies}", due_in=60.0)
    if f.seconds_since_last_run is not None and f.seconds_since_last_run < f.cooldown_seconds:
        left = f.cooldown_seconds - f.seconds_since_last_run
        return say(
            CoverageState.WAITING,
            Why.COOLDOWN,
            f"not more often than every {f.cooldown_seconds:g} s",
            due_in=left,
        )
    if f.quiet_seconds < f.settle_seconds and f.settling_seconds < f.settle_at_most_seconds:
        return say(
            CoverageState.WAITING,
            Why.SETTLING,
            f"until its input is quiet for {f.settle_seconds:g} s, {f.settle_at_most_seconds:g} s at most",
            due_in=min(f.settle_seconds - f.quiet_seconds, f.settle_at_most_seconds - f.settling_seconds),
        )
    made = (without(f.plan.missing) if f.plan else "") + quarantined(f.quarantined)
    return say(CoverageState.ACTIVE, Why.RUN, made, run=True)


def examines(f: GapFacts, probe: Probe) -> str:
    """What is said of a run that is a probe, after its name."""
    failed = f", because run {f.ended.id} failed: {f.ended.message}" if f.ended else ""
    return f": {probe}{failed}"


def _search(f: GapFacts, failed: GapDecision) -> GapDecision:
    """What follows where a unit has failed: a member is looked for and left out, if its step may do that.

    Whatever the trigger: what becomes of a failure belongs to the run that failed, and that was asked for.
    """
    s = f.search
    if s is None:
        return failed
    if s.over:
        return structs.replace(failed, reason=f"{failed.reason}; bisected: {s.over}")
    if not f.enabled or f.paused:
        return structs.replace(failed, reason=f"{failed.reason}; bisecting waits: {f.paused or 'disabled'}")
    left = s.most - len(f.quarantined)
    if s.members > 1 and left > 0:
        look = bisect(s.members, s.tried, left)
    elif s.unproven:
        look = Look(stuck="no other member may be left out" if s.members > 1 else "one member is left", proven=True)
    else:
        more = f"; not bisected: not more than {s.most} may be in quarantine" if left <= 0 else ""
        return structs.replace(failed, reason=failed.reason + more)
    if look.probe:
        if f.missing_copies:
            copies = f"no reachable copy of {named(f.missing_copies)}, to find the member that it fails on"
            return GapDecision(CoverageState.WAITING, Why.NO_COPY, copies, due_in=60.0)
        return GapDecision(CoverageState.ACTIVE, Why.BISECTING, "", probe=look.probe)
    if look.guilty:
        return structs.replace(failed, guilty=look.guilty, evidence=look.evidence)
    if look.proven and s.unproven:
        return structs.replace(failed, release=f"it still fails without {', '.join(s.unproven)}: {look.stuck}")
    probes = f"{len(s.tried)} probe{'' if len(s.tried) == 1 else 's'}"
    return structs.replace(failed, reason=f"{failed.reason}; bisected in {probes}: {look.stuck}")


# --- names ---


class Renames(Struct, frozen=True):
    """What is to be renamed: by new name, the old one; or, by new name, why it cannot be: then nothing is."""

    todo: dict[str, str]
    faults: dict[str, str]


def renames(
    what: str, asked: Iterable[tuple[str, str]], there: Mapping[str, str], gone: Mapping[str, str] = {}
) -> Renames:
    """Which things get another name.

    What was done already is not done again, however often it is asked for: so things may also exchange their names, and
    an old name may be given to another thing later. What is called so under neither name will be new.

    Args:
        what: the kind of thing, for people.
        asked: (new name, old name) each.
        there: by name of each thing that there is, what it was last renamed from; empty if it never was.
        gone: the same of those that were removed, and whose history keeps the name.
    """
    faults: dict[str, str] = {}
    known, wanted = {**gone, **there}, {}
    for new, old in asked:
        if new == old:
            faults[new] = f"{what} {new!r}: renamed_from is its own name; leave it out"
        elif old in there:
            wanted[new] = old
    todo = {new: old for new, old in wanted.items() if known.get(new) != old}
    # What makes room now for another one is not the one that is meant.
    while more := {new: old for new, old in wanted.items() if new not in todo and new in todo.values()}:
        todo |= more
    becomes: dict[str, str] = {}
    for new, old in todo.items():
        if becomes.setdefault(old, new) != new:
            faults[new] = (
                f"{what} {new!r} and {what} {becomes[old]!r} are both renamed_from {old!r}: only one can be it"
            )
        elif new in there and new not in todo.values():
            faults[new] = (
                f"{what} {new!r} cannot be renamed_from {old!r}: there are both, and they stay two."
                f" Leave renamed_from out, or give {old!r} a name that is free"
            )
        elif new in gone and new not in there:
            faults[new] = (
                f"{what} {old!r} cannot be called {new!r}: a {what} that was removed was called so, and its history"
                " keeps the name. Give it another one"
            )
    return Renames({} if faults else todo, faults)


def first_identity(name: str, taken: Collection[str]) -> str:
    """What a new step is, whatever it is called later: its name, or, if another one was called so first, one like it.

    The other one was renamed, or it would have this name. No step can be called like what is made here.
    """
    return next(i for i in (name, *(f"{name}#{n}" for n in range(2, len(taken) + 3))) if i not in taken)


# --- the certificate of a night ---

NOT_ASKED_FOR = frozenset({Why.MANUAL, Why.NOT_DUE})
"""Reasons that the definitions themselves give: nothing is late, and nobody has to act."""


def standing(selected: bool, unsorted: bool, open_pairs: Iterable[Why], waived: bool) -> Standing:
    """What the certificate of a night says of one raw data package.

    Args:
        selected: some enabled pipeline works on it. unsorted: it belongs to units that nobody has given it to yet.
        open_pairs: why each of its (step, unit) pairs that is neither covered nor waived is as it is.
        waived: the package, or a pair of it that is not covered, is.
    """
    reasons = set(open_pairs)
    if unsorted or reasons - NOT_ASKED_FOR:
        return Standing.OPEN
    if reasons or not selected:
        return Standing.EXPLAINED
    return Standing.WAIVED if waived else Standing.COVERED


# --- backfills ---


class Refill(StrEnum):
    """What a backfill does with a unit when its turn comes."""

    ASK = "ask"
    """Ask for its gap to become a run."""
    RETRY = "retry"
    """Have the run that failed begin another attempt."""
    REDRIVE = "redrive"
    """Have the run that covers it begin another attempt."""
    FOLLOW = "follow"
    """A run is on its way already."""
    SKIP = "skip"


def refill(kind: BackfillKind, state: CoverageState, why: Why) -> tuple[Refill, str]:
    """What a backfill of a kind does with a unit that is as its coverage says now; with the reason if it is nothing."""
    failures = kind in (BackfillKind.FAILED, BackfillKind.ALL)
    match state, why:
        case CoverageState.ACTIVE, _:
            return Refill.FOLLOW, ""
        case CoverageState.EMPTY, _:
            return Refill.SKIP, "no raw data package belongs to it any more"
        case CoverageState.COVERED, _:
            return (Refill.REDRIVE, "") if kind is BackfillKind.ALL else (Refill.SKIP, "covered meanwhile")
        case CoverageState.BLOCKED, Why.FAILED:
            return (Refill.RETRY, "") if failures else (Refill.SKIP, "failed meanwhile")
        case CoverageState.BLOCKED, Why.CANCELLED:
            return (Refill.RETRY, "") if kind is BackfillKind.ALL else (Refill.SKIP, "cancelled meanwhile")
    return (Refill.ASK, "") if kind is not BackfillKind.FAILED else (Refill.SKIP, f"no longer failed: {why}")


# --- admission ---


class PendingRun(Struct, frozen=True):
    """A run that asks for a slot; among those of equal priority and the same queue, listed in the order of service.

    Attributes:
        shares: keys of the shares it counts in. The first is its queue: those that queues belong to share the slots.
    """

    id: int
    cpu: float
    memory_gb: float
    paused: str = ""
    priority: int = 0
    shares: tuple[str, ...] = ("",)


class Share(Struct, frozen=True):
    """Runs with something in common, such as their pipeline, and what they may have in flight together.

    Attributes:
        name: for people, such as ``pipeline maps``.
        runs: in flight now. limit: how many may be; None means no limit.
        weight: of two queues that never run dry, one of twice the weight has twice as many runs in flight.
        served: when one of its runs last got a slot, by any clock; 0 for never.
    """

    name: str = ""
    runs: int = 0
    limit: int | None = None
    weight: float = 1.0
    served: float = 0.0


class Capacity(Struct, frozen=True):
    """What a location can hold at once. None means no limit."""

    runs: int
    cpu: float | None = None
    memory_gb: float | None = None


def admit(
    pending: Sequence[PendingRun], used: Capacity, limit: Capacity, shares: Mapping[str, Share] | None = None
) -> tuple[list[int], dict[int, str]]:
    """Which runs start now, in this order, and what each of the others waits for.

    Priority comes first. Among equals the next slot goes to the queue that has the least in flight for its weight,
    then to the one that was served the longest ago; in a queue, first come, first served. A run that finds no room
    stops those behind it, so that a large one is not starved by small ones; one that can never fit, is paused, or has
    used up a share of its own is passed over.
    """
    runs, cpu, memory = used.runs, used.cpu or 0.0, used.memory_gb or 0.0
    known = {key: Share() for p in pending for key in p.shares} | dict(shares or {})
    flight = {key: share.runs for key, share in known.items()}
    served = {key: share.served for key, share in known.items()}
    admitted: list[int] = []
    waiting: dict[int, str] = {}
    full = ""

    def turn(queue: str, run: PendingRun) -> tuple[float, float, int]:
        return flight[queue] / known[queue].weight, served[queue], run.id

    for queues in _levels(pending):
        heap = [(*turn(key, queue[-1]), key) for key, queue in queues.items()]
        heapq.heapify(heap)
        while heap:
            *_, key = heapq.heappop(heap)
            p = queues[key].pop()
            over = next((s for s in p.shares if (most := known[s].limit) is not None and flight[s] >= most), None)
            if p.paused:
                waiting[p.id] = p.paused
            elif limit.cpu is not None and p.cpu > limit.cpu:
                waiting[p.id] = f"never fits: asks for {p.cpu:g} cores, this location has {limit.cpu:g}"
            elif limit.memory_gb is not None and p.memory_gb > limit.memory_gb:
                has = f"this location has {limit.memory_gb:g}"
                waiting[p.id] = f"never fits: asks for {p.memory_gb:g} GB of memory, {has}"
            elif over is not None:
                waiting[p.id] = _used_up(known[over], flight[over])
            elif full:
                waiting[p.id] = full
            elif runs + 1 > limit.runs:
                waiting[p.id] = full = f"a free slot: {runs} of {limit.runs} runs are in flight"
            elif limit.cpu is not None and cpu + p.cpu > limit.cpu + 1e-9:
                waiting[p.id] = full = f"free cores: {cpu:g} of {limit.cpu:g} are in use"
            elif limit.memory_gb is not None and memory + p.memory_gb > limit.memory_gb + 1e-9:
                waiting[p.id] = full = f"free memory: {memory:.3g} of {limit.memory_gb:.3g} GB are in use"
            else:
                admitted.append(p.id)
                runs, cpu, memory = runs + 1, cpu + p.cpu, memory + p.memory_gb
                served[key] = math.inf
                for share in p.shares:
                    flight[share] += 1
            if queues[key]:
                heapq.heappush(heap, (*turn(key, queues[key][-1]), key))
    return admitted, waiting


def _levels(pending: Sequence[PendingRun]) -> Iterator[dict[str, list[PendingRun]]]:
    """By priority, the highest first: the runs of each queue, the first to be served at the end."""
    for _, level in groupby(sorted(pending, key=lambda p: -p.priority), key=lambda p: p.priority):
        queues: dict[str, list[PendingRun]] = {}
        for p in reversed(list(level)):
            queues.setdefault(p.shares[0], []).append(p)
        yield queues


def _used_up(share: Share, runs: int) -> str:
    has = "has" if runs == share.limit else f"has {runs}"
    return f"{share.name} may have {share.limit} {'run' if share.limit == 1 else 'runs'} in flight, and {has}"


# --- jobs ---


class Verdict(Struct, frozen=True):
    """What a backend's report means for a run: a trigger of its chart, or none."""

    trigger: str | None
    failure: FailureClass | None = None
    message: str = ""

    @property
    def lost(self) -> bool:
        """Whether the job counts as gone for lack of any trace, rather than for what it said."""
        return self.failure is FailureClass.VANISHED


def judge(state: RunState, report: Report, seconds_in_state: float, grace_seconds: float) -> Verdict:
    """What became of a job, from the evidence.

    Absence is never success. A job that is nowhere counts as gone only after a grace period, since claims and file
    systems may lag; a target that cannot be asked changes nothing.
    """
    match report.status:
        case JobStatus.COMPLETED:
            return Verdict("finish")
        case JobStatus.FAILED:
            failure = report.failure or FailureClass.EXIT
            return Verdict("fail", failure, report.reason or f"the software left with code {report.exit_code}")
        case JobStatus.RUNNING if state is RunState.SUBMITTED:
            return Verdict("start")
        case JobStatus.CANCELLED:
            return Verdict("fail", FailureClass.SIGNAL, report.reason or "the job was cancelled outside wfm")
        case JobStatus.ABSENT | JobStatus.VANISHED if seconds_in_state > grace_seconds:
            seen = f"the job is {report.status} for more than {grace_seconds:g} s and left no exit record"
            return Verdict("fail", FailureClass.VANISHED, f"{seen}; {report.reason}".rstrip("; "))
    return Verdict(None)


class AgainFacts(Struct, frozen=True):
    """What decides whether an ended run may begin another attempt.

    Attributes:
        part: its step is still part of its pipeline. newest: its inputs, version and config are those wanted now.
        active: another run of its unit that has not ended; None if there is none.
        exit_code: of its last job, None if that left no record.
        probe_of: the failed run that it examines, if it is a probe.
        purged: the files of its attempts were removed, or are about to be.
    """

    part: bool
    newest: bool
    active: int | None
    exit_code: int | None
    purged: bool
    probe_of: int | None = None


def not_again(f: AgainFacts, begin: RunState) -> str:
    """Why an ended run may not begin another attempt in this state; empty if it may.

    In PENDING everything is done again. In COLLECTING_RESULTS what its last job left is collected again.
    """
    if f.probe_of is not None:
        return f"it is a probe of run {f.probe_of}; `wfm runs retry {f.probe_of}` begins a new search"
    if not f.part:
        return "its step is no longer part of its pipeline"
    if f.active is not None:
        return f"run {f.active} of the same unit is on its way"
    if not f.newest:
        return "its inputs, version or config are no longer the newest; see `wfm why`"
    if begin is RunState.COLLECTING_RESULTS:
        if f.exit_code is None:
            return "its last job left no exit record, so there is nothing to collect; begin from PENDING"
        if f.exit_code != 0:
            return f"its last job left with code {f.exit_code}, so there is nothing to collect; begin from PENDING"
        if f.purged:
            return "the files of its attempts were purged; begin from PENDING"
    return ""


class MoveFacts(Struct, frozen=True):
    """What the guards of the run chart look at."""

    exit_record: bool = False
    failure: FailureClass | None = None
    failures: int = 0
    max_retries: int = 0


def may_retry(f: MoveFacts) -> bool:
    """Whether a failed attempt may be repeated: of a class that can end otherwise, and retries are left."""
    return f.failure in REPEATABLE and f.failures < f.max_retries


GUARDS: dict[str, Callable[[Any], bool]] = {
    "has_exit_record": lambda f: f.exit_record,
    "may_retry": may_retry,
}
"""The guards that statecharts may name."""


def backoff(failures: int, first_seconds: float, most_seconds: float) -> float:
    """Seconds until repetition number `failures` (from 1): doubling, bounded."""
    return float(min(first_seconds * 2.0 ** max(failures - 1, 0), most_seconds))
