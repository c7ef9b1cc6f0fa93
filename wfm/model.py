"""The words of wfm as frozen structs and enums. Pure: nothing here touches the world."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from msgspec import Struct

Pair = tuple[int, int]
"""(step id, unit id)"""


class Role(StrEnum):
    """The four roles, in the order of a run."""

    TRIGGER_MANAGER = "trigger-manager"
    WORKFLOW_MANAGER = "workflow-manager"
    WORKER = "worker"
    RESULT_MANAGER = "result-manager"


class RunState(StrEnum):
    """The states of a run. Their meaning, owner and moves are in ``statecharts/run*.yaml``; a test proves all equal."""

    PENDING = "PENDING"
    STAGING_DATA = "STAGING_DATA"
    SUBMITTED = "SUBMITTED"
    RUNNING = "RUNNING"
    COLLECTING_RESULTS = "COLLECTING_RESULTS"
    RETRY_WAIT = "RETRY_WAIT"
    CANCELLING = "CANCELLING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


FINAL_STATES = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})
ACTIVE_STATES = frozenset(RunState) - FINAL_STATES


class CoverageState(StrEnum):
    """What is known of one (step, unit)."""

    COVERED = "covered"
    """A COMPLETED run has the wanted digest."""
    ACTIVE = "active"
    """A run is on its way."""
    WAITING = "waiting"
    """Nothing runs; the reason will pass by itself."""
    BLOCKED = "blocked"
    """Nothing runs; somebody must act (the reason says how) or new input must come."""
    HELD = "held"
    """Nothing runs because somebody said so: paused, disabled, manual only."""
    EMPTY = "empty"
    """Nothing is to be covered: the unit has no members any more, or its step is grouped otherwise."""


class Why(StrEnum):
    """The reasons a coverage row can give. The text beside it names the particulars."""

    COVERED = "covered"
    RUN = "run"
    BISECTING = "bisecting"
    """It failed on data, and parts of it are run to find on which."""
    NEWER_INPUT = "newer_input"
    UPSTREAM = "waiting_for_upstream"
    UPSTREAM_FAILED = "upstream_failed"
    ARRIVALS = "arrivals_not_sorted_yet"
    INCOMPLETE = "group_not_complete"
    COOLDOWN = "cooling_down"
    SETTLING = "settling"
    NO_COPY = "no_reachable_copy"
    NO_VERSION = "no_usable_software_version"
    NO_CONFIG = "no_usable_config"
    MANUAL = "manual_only"
    NOT_DUE = "not_due"
    APPROVAL = "held_for_approval"
    """Stale, and too much to do unasked: the older result counts until somebody approves."""
    REVOKED = "revoked_and_held_for_approval"
    """The same, but the older result was revoked: nothing counts."""
    PAUSED = "paused"
    DISABLED = "disabled"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EMPTY = "empty"
    ORPHANED = "orphaned"
    QUARANTINED = "quarantined"
    """Of a member, where others are told of it; no row of coverage: its unit is covered without it."""


class Standing(StrEnum):
    """What the certificate of a night says of a raw data package."""

    COVERED = "covered"
    """By every step of every enabled pipeline that selects it."""
    WAIVED = "waived"
    """What is not covered need not be, as somebody said, until a certain time."""
    EXPLAINED = "explained"
    """What is not covered is not asked for: by the definitions, nothing is to be done with it now."""
    OPEN = "open"
    """Something must still be done, or decided."""


class BackfillKind(StrEnum):
    """What a backfill runs."""

    MISSING = "missing"
    """What has no result yet and has not failed."""
    FAILED = "failed"
    """What stopped after failures: another attempt."""
    STALE = "stale"
    """What has a result of older input, version or config."""
    ALL = "all"
    """All of these, and again what is covered."""


class BackfillState(StrEnum):
    """How far a backfill is."""

    RUNNING = "running"
    PAUSED = "paused"
    CANCELLED = "cancelled"
    """Nothing more is begun; what had a slot goes on."""
    DONE = "done"


class TriggerType(StrEnum):
    """When gaps of a pipeline become runs."""

    CONTINUOUS = "CONTINUOUS"
    CRON = "CRON"
    MANUAL = "MANUAL"


class Schedule(Struct, frozen=True, omit_defaults=True):
    """When a pipeline with trigger CRON works.

    Attributes:
        cron: five fields (minute, hour, day of month, month, day of week); empty for other triggers.
        timezone: name in the IANA database; the fields are told by its clocks.
    """

    cron: str = ""
    timezone: str = "UTC"


class OnStale(StrEnum):
    """What becomes of units that another version or config, or a revocation, made stale."""

    RUN = "run"
    """They run again; above a limit they wait until somebody approves."""
    HOLD = "hold"
    """They always wait until somebody approves."""


class VersionPolicy(StrEnum):
    """How a step picks the version of its software."""

    PINNED = "pinned"
    """Exactly the named version."""
    COMPATIBLE = "compatible"
    """The newest active version with the same major number, not older than the named one."""
    LATEST = "latest"
    """The newest active version."""


class FanIn(StrEnum):
    """Which units of the steps it depends on a unit needs to run."""

    ALL = "all"
    """All that lie in it."""
    ANY = "any"
    """Those that are covered, and one of each step at least."""
    COMPLETE = "complete"
    """All that lie in it; and what the observing plan expects of it has arrived, is lost, or is past its deadline."""


class ProductType(StrEnum):
    """The kinds of data products; all but INTERMEDIATE follow from the directory under ``output/``."""

    SCIENCE = "SCIENCE"
    QA_METRIC = "QA_METRIC"
    PLOT = "PLOT"
    STATISTICS = "STATISTICS"
    LOG = "LOG"
    INTERMEDIATE = "INTERMEDIATE"


PRODUCT_DIRECTORIES = {
    "science": ProductType.SCIENCE,
    "qa": ProductType.QA_METRIC,
    "plots": ProductType.PLOT,
    "statistics": ProductType.STATISTICS,
    "logs": ProductType.LOG,
}


class JobStatus(StrEnum):
    """What a backend says of a job."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    """The job left an exit record with code 0."""
    FAILED = "failed"
    """The job left an exit record with another code, or the backend gives a definite failure."""
    CANCELLED = "cancelled"
    ABSENT = "absent"
    """The target answered, and knows nothing of the job: no claim, no process, no record."""
    VANISHED = "vanished"
    """The job had started and is gone without an exit record."""
    UNKNOWN = "unknown"
    """The target could not be asked. Clocks stop; nothing fails."""


class FailureClass(StrEnum):
    """Why an attempt failed; decides whether it is repeated."""

    EXIT = "exit"
    """The software left with a code other than 0."""
    NOT_FOUND = "command_not_found"
    TIMEOUT = "timeout"
    OOM = "out_of_memory"
    SIGNAL = "signal"
    VANISHED = "vanished"
    INPUT = "input"
    """An input is missing or does not match its checksum."""
    OUTPUT = "output"
    """The output breaks the contract."""
    REJECTED = "rejected"
    """The backend refused the job for good."""
    TASK = "task"
    """Staging, submitting or collecting broke, repeatedly."""


REPEATABLE = frozenset(
    {
        FailureClass.EXIT,
        FailureClass.TIMEOUT,
        FailureClass.OOM,
        FailureClass.SIGNAL,
        FailureClass.VANISHED,
        FailureClass.TASK,
    }
)
"""Failures that `max_retries` applies to; the others would fail again in the same way."""

OF_DATA = frozenset({FailureClass.EXIT, FailureClass.OUTPUT})
"""Failures that may lie in what was read, rather than in the machine: a search for the guilty member rests on them."""


class TaskKind(StrEnum):
    """The side-effecting work that wfm itself gives to workers; entry points may add more kinds."""

    STAGE = "stage"
    SUBMIT = "submit"
    CANCEL = "cancel"
    COLLECT = "collect"
    PURGE = "purge"


class Resources(Struct, frozen=True, forbid_unknown_fields=True):
    """What a step asks for.

    Attributes:
        cpu: cores, may be a fraction.
        memory_gb: memory in 10^9 bytes.
        time_hours: wall-clock limit in hours; None means no limit.
        gpu: number of GPUs.
    """

    cpu: float = 1.0
    memory_gb: float = 1.0
    time_hours: float | None = None
    gpu: int = 0


class JobSpec(Struct, frozen=True):
    """One attempt of a run, ready for a backend.

    Attributes:
        name: made of location, run and attempt; the key by which every backend can look the job up.
        directory: absolute path of the attempt directory; holds ``claim``, ``cancelled`` and ``exit.json``.
        command: argument list; no shell is involved.
        environment: variables beside the job's base environment.
        working_directory: absolute path.
        resources: what the job may use.
    """

    name: str
    directory: str
    command: tuple[str, ...]
    environment: dict[str, str]
    working_directory: str
    resources: Resources


class UpstreamRead(Struct, frozen=True):
    """What a run with fan-in other than all reads of one upstream step.

    Attributes:
        step: its name. units: that there were when the run was built. read: of these, those whose result it reads.
        missing: keys of the others, the first few.
    """

    step: str
    units: int
    read: int
    missing: tuple[str, ...] = ()


class Subset(Struct, frozen=True):
    """What of its unit's members a run reads, where that is not all of them.

    Attributes:
        of: packages, or units: the finer ones whose results it reads.
        dims: of the finer units that `first` and `last` are about; the results of others are read as ever.
        first, last: ids of the first and the last member of a range, in the order of ids; None: all.
        without: ids of members that are in quarantine.
    """

    of: Literal["packages", "units"]
    dims: str = ""
    first: int | None = None
    last: int | None = None
    without: tuple[int, ...] = ()


class Probe(Struct, frozen=True):
    """Which part of a failed unit a run tries, to find the member that the unit fails on.

    Attributes:
        version: of the failed run, by its transitions: when that run fails once more, a new search begins.
        number: of the probe in its search, from 1.
        first, last: places of its members among all `members`, from 1, both included.
    """

    version: int
    number: int
    first: int
    last: int
    members: int

    def __str__(self) -> str:
        which = f"member {self.first}" if self.first == self.last else f"members {self.first} to {self.last}"
        return f"probe {self.number}, {which} of {self.members}"


class LeftOut(Struct, frozen=True):
    """A member of a run's unit that the run does not read, since it is in quarantine.

    Attributes:
        member: name of a package, or key of a finer unit. reason: which runs failed with it, and how.
    """

    member: str
    reason: str


class JobRef(Struct, frozen=True):
    """A job as wfm knows it.

    Attributes:
        name: see `JobSpec.name`.
        directory: see `JobSpec.directory`.
        handle: what the backend gave at submission (a pid with its start time, a Slurm job id); empty if unknown.
    """

    name: str
    directory: str
    handle: str = ""


class Report(Struct, frozen=True):
    """What a backend found out about one job.

    Attributes:
        status: see `JobStatus`.
        exit_code: of the software; None while unknown.
        signal: number of the signal that ended it, if one did.
        failure: class of failure where status is FAILED.
        wall_seconds, cpu_hours, peak_memory_gb: resource use; None where unknown.
        node: host name.
        reason: one line for people.
        evidence: what the verdict rests on, for example ``{"exit.json": {...}, "process": "gone"}``.
    """

    status: JobStatus
    handle: str = ""
    exit_code: int | None = None
    signal: int | None = None
    failure: FailureClass | None = None
    wall_seconds: float | None = None
    cpu_hours: float | None = None
    peak_memory_gb: float | None = None
    node: str = ""
    reason: str = ""
    evidence: dict[str, Any] = {}


class Actor(Struct, frozen=True):
    """Who caused a change, and why.

    Attributes:
        name: a role (``workflow-manager``) or a person (``user:ada``).
        reason: free text; required of people for destructive acts.
    """

    name: str
    reason: str = ""
