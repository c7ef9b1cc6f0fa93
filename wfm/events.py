"""Every event that travels: tagged structs, their codec, and who may be addressed.

A message is one stream field named ``event`` that holds JSON. It is a hint: it says where to look; the
recipient reads the truth from Postgres. Unknown fields are ignored, so newer senders may add some.
Events of a run are emitted by its statechart (which also names their recipient); `ENTRANCES` lists the others.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta, Struct

from wfm.model import Role

SCHEMA_VERSION = 1

Key = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""What Postgres takes for a key: a message from outside may hold any number."""


class Event(Struct, frozen=True, tag_field="type", kw_only=True, omit_defaults=True):
    """What all events carry.

    Attributes:
        id: key of the ledger row; None for a message that somebody outside wfm wrote.
        schema: version of the body's layout.
        at: time of the change, ISO 8601 in UTC.
        actor: who caused it. reason: why.
    """

    id: Key | None = None
    schema: int = SCHEMA_VERSION
    at: str = ""
    actor: str = ""
    reason: str = ""

    durable: ClassVar[bool] = True
    """False for a pure wake-up that has no ledger row: losing it costs one sweep interval."""


class DataArrived(Event, frozen=True, tag="data.arrived", kw_only=True):
    """A raw data package was registered or changed. Anybody may write this one; it is idempotent.

    Attributes:
        raw_data_package: id or name in the catalogue.
    """

    raw_data_package: Key | str


class PipelineChanged(Event, frozen=True, tag="pipeline.changed", kw_only=True):
    """A pipeline, or something it uses, was applied, paused, enabled or triggered.

    Attributes:
        pipeline: name. pipeline_id: key.
    """

    pipeline: str = ""
    pipeline_id: Key


class WaiverChanged(Event, frozen=True, tag="waiver.changed", kw_only=True):
    """A package, or a unit of a step, need not be covered for a while; or it must be again, before that time.

    Attributes:
        package: its name; empty where it is about a unit.
        pipeline: name. step: name. unit: key.
        until: when it ends by itself, ISO 8601. ended: it was ended before.
    """

    package: str = ""
    pipeline: str = ""
    step: str = ""
    unit: str = ""
    until: str
    ended: bool = False


class DataAbsent(Event, frozen=True, tag="data.absent", kw_only=True):
    """Nothing came where something was expected; once for each time.

    Attributes:
        module: name of the instrument module; empty where it is about an observation.
        scheduled_observation: its name; empty where it is about a module.
        since: time of the last package, or of the planned end, ISO 8601.
    """

    module: str = ""
    scheduled_observation: str = ""
    since: str


class DataBack(Event, frozen=True, tag="data.back", kw_only=True):
    """An absence is over: data came, or nothing is expected any more.

    Attributes:
        module: as in data.absent. scheduled_observation: as in data.absent. since: as in data.absent.
    """

    module: str = ""
    scheduled_observation: str = ""
    since: str


class ObservationLost(Event, frozen=True, tag="observation.lost", kw_only=True):
    """Somebody said that the data of a scheduled observation will not come.

    Attributes:
        scheduled_observation: its name.
    """

    scheduled_observation: str


class PipelineFired(Event, frozen=True, tag="pipeline.fired", kw_only=True):
    """The time of a pipeline with trigger CRON came, and its gaps were asked for.

    Attributes:
        pipeline: name. pipeline_id: key.
        window: the time that had come. Where it is long past, this firing also stands for all later ones until `next`.
        next: the next time. Both ISO 8601 in UTC.
        units: how many (step, unit) pairs were asked for.
    """

    pipeline: str = ""
    pipeline_id: Key
    window: str = ""
    next: str = ""
    units: int = 0


class CampaignCreated(Event, frozen=True, tag="campaign.created", kw_only=True):
    """A set of packages and pinned versions was frozen, to be processed as a pipeline of its own.

    Attributes:
        pipeline: name of the campaign. template: name of the pipeline that it was made from.
        packages: how many.
    """

    pipeline: str
    template: str
    packages: int


class DataQuarantined(Event, frozen=True, tag="data.quarantined", kw_only=True):
    """A unit failed, and so did one of its members alone: the unit is run without it. It counts for this step only.

    Attributes:
        pipeline: name. step: name. unit: key.
        member: the name of a package, or the key of a finer unit.
        run: that failed. probe: the run that failed with the member alone.
    """

    pipeline: str
    step: str
    unit: str
    member: str
    run: Key
    probe: Key


class DataReleased(Event, frozen=True, tag="data.released", kw_only=True):
    """A member that was in quarantine is used again; by a person, or since the rest of its unit fails as well.

    New content, another version or config release it without this event: nothing was said of these.

    Attributes:
        pipeline: as in data.quarantined. step: as in data.quarantined. unit: as in data.quarantined.
        member: as in data.quarantined. run: as in data.quarantined.
    """

    pipeline: str
    step: str
    unit: str
    member: str
    run: Key


class SlotFreed(Event, frozen=True, tag="slot.freed", kw_only=True):
    """Something that a PENDING run may have waited for is free."""

    durable: ClassVar[bool] = False


class RunEvent(Event, frozen=True, kw_only=True):
    """A run entered a state.

    Attributes:
        run: id of the run. version: its transition number; a recipient that finds another one looks again.
        attempt: number of the computation, from 1.
        pipeline, step, unit: names. state: the state entered.
        probe_of: the run whose failure it examines: it makes no products. Not there for other runs.
    """

    run: Key
    version: int
    attempt: int = 1
    pipeline: str = ""
    step: str = ""
    unit: str = ""
    state: str = ""
    probe_of: Key | None = None


class GapDetected(RunEvent, frozen=True, tag="gap.detected", kw_only=True):
    """A gap became a run, or a retry is due."""


class JobBuilt(RunEvent, frozen=True, tag="job.built", kw_only=True):
    """The run was admitted; its inputs are to be staged."""


class JobSubmitted(RunEvent, frozen=True, tag="job.submitted", kw_only=True):
    """The backend holds the job."""


class JobRunning(RunEvent, frozen=True, tag="job.running", kw_only=True):
    """The backend says the job executes."""


class JobCompleted(RunEvent, frozen=True, tag="job.completed", kw_only=True):
    """The job ended well; its outputs are to be collected."""


class AttemptFailed(RunEvent, frozen=True, tag="attempt.failed", kw_only=True):
    """An attempt failed and will be repeated."""


class RunCancelling(RunEvent, frozen=True, tag="run.cancelling", kw_only=True):
    """Someone cancelled a run that may have a job."""


class RunCollected(RunEvent, frozen=True, tag="run.collected", kw_only=True):
    """Outputs are registered, lineage is linked."""


class RunFailed(RunEvent, frozen=True, tag="run.failed", kw_only=True):
    """The run failed for good."""


class RunCancelled(RunEvent, frozen=True, tag="run.cancelled", kw_only=True):
    """The run was cancelled or withdrawn."""


class RunRevoked(RunEvent, frozen=True, tag="run.revoked", kw_only=True):
    """A product of the run was revoked, so that its result does not count any more; or this was undone."""


AnyEvent = (
    DataArrived
    | PipelineChanged
    | WaiverChanged
    | DataAbsent
    | DataBack
    | ObservationLost
    | PipelineFired
    | CampaignCreated
    | DataQuarantined
    | DataReleased
    | SlotFreed
    | GapDetected
    | JobBuilt
    | JobSubmitted
    | JobRunning
    | JobCompleted
    | AttemptFailed
    | RunCancelling
    | RunCollected
    | RunFailed
    | RunCancelled
    | RunRevoked
)

TYPES: dict[str, type[AnyEvent]] = {str(t.__struct_config__.tag): t for t in AnyEvent.__args__}
"""Every event by its type name, which is also the last part of its stream's key."""

RUN_EVENTS = frozenset(name for name, t in TYPES.items() if issubclass(t, RunEvent))

ENTRANCES: dict[str, Role] = {
    "data.arrived": Role.TRIGGER_MANAGER,
    "pipeline.changed": Role.TRIGGER_MANAGER,
    "slot.freed": Role.WORKFLOW_MANAGER,
    "run.revoked": Role.TRIGGER_MANAGER,
}
"""Recipients of the events that no statechart emits."""


class Message(Struct, frozen=True):
    """An encoded event on its way to Redis.

    Attributes:
        type: names its stream. recipient: the role that reads it; empty for the public stream alone.
        body: the JSON. id: of its ledger row; None for a pure wake-up, which the public stream does not show.
    """

    type: str
    recipient: str
    body: bytes
    id: int | None = None


_encoder = msgspec.json.Encoder()
_decoders = {name: msgspec.json.Decoder(t) for name, t in TYPES.items()}


def encode(event: AnyEvent) -> bytes:
    """The JSON that goes into the stream field ``event``."""
    return _encoder.encode(event)


def decode(name: str, body: bytes) -> AnyEvent:
    """The event in a message of stream ``name``.

    The body may leave out ``type``: the stream says it, which keeps the door for other systems simple.

    Raises:
        msgspec.DecodeError: the body is not such an event; the text says where and why.
        KeyError: no such event type.
    """
    event: AnyEvent = _decoders[name].decode(body)
    return event
