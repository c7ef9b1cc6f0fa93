"""Every decision of wfm: facts in, a value with its reason out. Pure; nothing here touches the world.

The store and the roles gather facts in bulk, ask here, and carry the answers out.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any

from msgspec import Struct
from packaging.version import InvalidVersion, Version

from wfm.model import (
    REPEATABLE,
    BackfillKind,
    CoverageState,
    FailureClass,
    JobStatus,
    Report,
    RunState,
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
        upstream: by name of the step depended on, the digest of its accepted results.
        software, version: what is to run. config: hash of its parameters, empty for none.

    Returns:
        32 hexadecimal digits.
    """
    steps = [f"{name}={upstream[name]}" for name in sorted(upstream)]
    return f"{item_hash('wanted', members, count, *steps, software, version, config):032x}"


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


# --- gaps ---


class Upstream(Struct, frozen=True):
    """What the units of one upstream step inside a unit look like.

    Attributes:
        step: its name. total: units that the catalogue has. covered, blocked: of these.
        digest: of the accepted results of the covered ones.
    """

    step: str
    total: int
    covered: int
    blocked: int
    digest: int


class ActiveRun(Struct, frozen=True):
    """The run that is on its way for a unit."""

    id: int
    state: RunState
    wanted: str


class EndedRun(Struct, frozen=True):
    """The latest run with the wanted digest that has ended."""

    id: int
    state: RunState
    message: str


class GapFacts(Struct, frozen=True):
    """All that decides whether one (step, unit) is a gap, and whether the gap becomes a run now."""

    members: int
    wanted: str
    version_fault: str = ""
    upstream: tuple[Upstream, ...] = ()
    active: ActiveRun | None = None
    ended: EndedRun | None = None
    step_active: bool = True
    enabled: bool = True
    paused: str = ""
    trigger: TriggerType = TriggerType.CONTINUOUS
    requested: bool = False
    cooldown_seconds: float = 0.0
    seconds_since_last_run: float | None = None
    missing_copies: tuple[str, ...] = ()


class GapDecision(Struct, frozen=True):
    """What coverage says, and what follows.

    Attributes:
        run: start a run. withdraw: id of a run to withdraw first. due_in: seconds until somebody must look again.
        covered_by: the run that covers the unit.
    """

    state: CoverageState
    why: Why
    reason: str
    run: bool = False
    withdraw: int | None = None
    due_in: float | None = None
    covered_by: int | None = None


_NOT_STARTED = frozenset({RunState.PENDING, RunState.RETRY_WAIT})


def upstream_complete(upstream: Sequence[Upstream]) -> bool:
    """Whether the result of every upstream unit that the catalogue has is there."""
    return all(u.total > 0 and u.covered == u.total for u in upstream)


def gap(f: GapFacts) -> GapDecision:
    """Whether a unit is covered, and if not, why nothing runs or that a run starts now."""
    withdraw = f.active.id if f.active and f.active.state in _NOT_STARTED and f.active.wanted != f.wanted else None
    decision = _gap(f, withdraw)
    return decision if withdraw is None else _with(decision, withdraw)


def _with(d: GapDecision, withdraw: int) -> GapDecision:
    return GapDecision(d.state, d.why, d.reason, d.run, withdraw, d.due_in, d.covered_by)


def _gap(f: GapFacts, withdraw: int | None) -> GapDecision:
    say = GapDecision
    if f.active and withdraw is None:
        if f.active.wanted == f.wanted:
            return say(CoverageState.ACTIVE, Why.RUN, f"run {f.active.id}")
        return say(
            CoverageState.ACTIVE,
            Why.NEWER_INPUT,
            f"newer input, version or config waits for run {f.active.id}",
        )
    if f.members == 0:
        return say(CoverageState.EMPTY, Why.EMPTY, "no raw data package belongs to this unit any more")
    if not f.step_active:
        return say(CoverageState.HELD, Why.DISABLED, "the step is no longer part of its pipeline")
    blocked = [u for u in f.upstream if u.blocked]
    if blocked:
        u = blocked[0]
        return say(
            CoverageState.BLOCKED,
            Why.UPSTREAM_FAILED,
            f"{u.blocked} of {u.total} units of {u.step} are blocked",
        )
    if not upstream_complete(f.upstream):
        u = next(u for u in f.upstream if u.covered < max(u.total, 1))
        return say(CoverageState.WAITING, Why.UPSTREAM, f"{u.covered} of {u.total} units of {u.step} are covered")
    if f.version_fault:
        return say(CoverageState.BLOCKED, Why.NO_VERSION, f.version_fault)
    if f.ended and f.ended.state is RunState.COMPLETED:
        return say(CoverageState.COVERED, Why.COVERED, f"run {f.ended.id}", covered_by=f.ended.id)
    if f.ended and f.ended.state is RunState.FAILED:
        return say(CoverageState.BLOCKED, Why.FAILED, f"run {f.ended.id}: {f.ended.message}")
    if f.ended and f.ended.state is RunState.CANCELLED:
        return say(CoverageState.BLOCKED, Why.CANCELLED, f"run {f.ended.id}: {f.ended.message}")
    if not f.enabled:
        return say(CoverageState.HELD, Why.DISABLED, "the pipeline is disabled")
    if f.paused:
        return say(CoverageState.HELD, Why.PAUSED, f.paused)
    if f.trigger is not TriggerType.CONTINUOUS and not f.requested:
        return say(CoverageState.HELD, Why.MANUAL, "the pipeline runs on request only")
    if f.missing_copies:
        listed = ", ".join(f.missing_copies[:3]) + (", ..." if len(f.missing_copies) > 3 else "")
        return say(CoverageState.WAITING, Why.NO_COPY, f"no reachable copy of {listed}", due_in=60.0)
    if f.seconds_since_last_run is not None and f.seconds_since_last_run < f.cooldown_seconds:
        left = f.cooldown_seconds - f.seconds_since_last_run
        return say(
            CoverageState.WAITING,
            Why.COOLDOWN,
            f"not more often than every {f.cooldown_seconds:g} s",
            due_in=left,
        )
    return say(CoverageState.ACTIVE, Why.RUN, "", run=True)


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
        purged: the files of its attempts were removed, or are about to be.
    """

    part: bool
    newest: bool
    active: int | None
    exit_code: int | None
    purged: bool


def not_again(f: AgainFacts, begin: RunState) -> str:
    """Why an ended run may not begin another attempt in this state; empty if it may.

    In PENDING everything is done again. In COLLECTING_RESULTS what its last job left is collected again.
    """
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
