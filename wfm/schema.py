"""The tables. All of them live in one schema (``wfm`` by default), which connections put on their search path.

Two halves: the *catalogue* (what was observed and where it lies) and the *workflow* (what to do with it, what was
done, and why). Rules that must never break stand here as constraints, not only in Python.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType

from wfm.decide import DIGEST_MODULUS
from wfm.model import (
    FINAL_STATES,
    BackfillKind,
    BackfillState,
    CoverageState,
    FanIn,
    OnStale,
    ProductType,
    RunState,
    TriggerType,
    VersionPolicy,
    Why,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Xid8(UserDefinedType[int]):
    """Postgres' 64-bit transaction id; lets a reader of the ledger stop before transactions still open."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        return "XID8"


ischema_names["xid8"] = Xid8  # for reflection, which compares a database with these tables


def _id() -> Column[int]:
    return Column("id", BigInteger, Identity(always=False), primary_key=True)


def _ref(name: str, target: str, *, null: bool = False, index: bool = False) -> Column[int]:
    return Column(name, BigInteger, ForeignKey(f"{target}.id"), nullable=null, index=index)


def _text(name: str, default: str | None = "") -> Column[str]:
    """A text column; ``default=None`` means that a value must be given."""
    return Column(name, Text, nullable=False, server_default=None if default is None else text(f"'{default}'"))


def _time(name: str, *, now: bool = False) -> Column[object]:
    return Column(name, DateTime(timezone=True), nullable=not now, server_default=text("now()") if now else None)


def _json(name: str, default: str = "{}") -> Column[object]:
    return Column(name, JSONB, nullable=False, server_default=text(f"'{default}'"))


def _revoked() -> tuple[Column[str], Column[str]]:
    """Who says that a thing must not be used, and why; empty: it may."""
    return _text("revoked_by"), _text("revoked_reason")


def _one_of(column: str, values: object) -> CheckConstraint:
    listed = ", ".join(f"'{v}'" for v in values)  # type: ignore[attr-defined]
    return CheckConstraint(f"{column} IN ({listed})", name=column)


# A 128-bit unsigned number: the hash of one item, or the sum modulo 2^128 of a set's items.
def _digest(name: str, *, null: bool = False) -> Column[object]:
    return Column(name, Numeric(39, 0), nullable=null, server_default=None if null else text("0"))


_FINAL = ", ".join(f"'{s}'" for s in sorted(FINAL_STATES))

# --- catalogue ---

site = Table(
    "site",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
    _text("time_zone", "UTC"),  # IANA name; says when a night ends
)

data_location = Table(
    "data_location",
    metadata,
    _id(),
    _ref("site_id", "site"),
    Column("name", Text, nullable=False, unique=True),
    _text("type", None),
    _text("storage", "disk"),
    _text("root"),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    _one_of("type", ("source", "buffer", "long_term_archive", "processing")),
    _one_of("storage", ("disk", "s3", "tape")),
)

instrument = Table(
    "instrument",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
    _ref("site_id", "site", null=True),  # where it observes
)

instrument_module = Table(
    "instrument_module",
    metadata,
    _id(),
    _ref("instrument_id", "instrument"),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
    Column("expect_every_hours", Double),  # longer without a new package is an absence; None: nothing is expected
    CheckConstraint("expect_every_hours > 0", name="expect_every_hours"),
)

source = Table(
    "source",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("type", "fixed"),
    _json("metadata"),
)

observing_program = Table(
    "observing_program",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
)

obs_unit = Table(
    "obs_unit",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _ref("source_id", "source", null=True),
    _ref("observing_program_id", "observing_program", null=True),
    _text("line"),
    _json("metadata"),
)

# What the observing plan says; which observation carried it out is found by name or by time (`wfm.plan`).
scheduled_observation = Table(
    "scheduled_observation",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _ref("obs_unit_id", "obs_unit", index=True),
    Column("planned_start", DateTime(timezone=True), nullable=False, index=True),
    Column("planned_end", DateTime(timezone=True), nullable=False),
    _json("modules", "[]"),  # names of those that are to take data; empty: any
    Column("late_after_hours", Double, nullable=False, server_default=text("12")),
    _text("state", "planned"),
    _text("lost_by"),  # who declared it lost, and why
    _text("lost_reason"),
    _time("arrived_at"),  # when it was seen to have arrived; only so that the sweep looks at it no more
    _one_of("state", ("planned", "lost")),
    CheckConstraint("planned_end > planned_start AND late_after_hours >= 0", name="times"),
    Index(
        "ix_scheduled_observation_expected",
        "planned_end",
        postgresql_where=text("state = 'planned' AND arrived_at IS NULL"),
    ),
)

executed_obs_unit = Table(
    "executed_obs_unit",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _ref("obs_unit_id", "obs_unit", index=True),
    _text("scheduled"),  # name of the scheduled observation that it carries out; empty: found by time
    _time("started_at"),
    _time("ended_at"),
    _json("metadata"),
    CheckConstraint("ended_at >= started_at", name="order"),
    Index("ix_executed_obs_unit_started_at", "started_at"),  # what was observed in a night
    Index("ix_executed_obs_unit_scheduled", "scheduled", postgresql_where=text("scheduled <> ''")),
)

raw_data_package = Table(
    "raw_data_package",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _ref("executed_obs_unit_id", "executed_obs_unit", index=True),
    _ref("instrument_module_id", "instrument_module"),
    _text("state", "archived"),
    Column("size", BigInteger, nullable=False),
    _digest("item"),  # hash of name and file checksums; the package's term in a unit's digest
    _json("metadata"),
    *_revoked(),  # beside `state`, which whoever registers the package says anew
    _time("registered_at", now=True),
    _one_of("state", ("waiting", "transferring", "archived", "failed")),
    CheckConstraint("size >= 0", name="size"),
    Index("ix_raw_data_package_registered_at", "registered_at"),
    Index("ix_raw_data_package_newest", "instrument_module_id", "registered_at"),  # of a module
)

raw_data_file = Table(
    "raw_data_file",
    metadata,
    _id(),
    _ref("package_id", "raw_data_package"),
    _text("name", None),
    Column("size", BigInteger, nullable=False),
    _text("checksum", None),  # "sha256:<hex>"
    UniqueConstraint("package_id", "name"),
    CheckConstraint("checksum LIKE 'sha256:%'", name="checksum"),
)

physical_copy = Table(
    "physical_copy",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    Column("package_id", BigInteger, ForeignKey("raw_data_package.id")),
    Column("product_id", BigInteger, ForeignKey("data_product.id")),
    _text("path"),  # directory of a package's files, or a product's file; relative to the location's root, or absolute
    _text("status", "present"),
    _time("created_at", now=True),
    _one_of(
        "status",
        (
            "present",
            "staged",
            "deletion_possible",
            "deletion_scheduled",
            "deletion_in_progress",
            "deleted",
            "deletion_failed",
        ),
    ),
    CheckConstraint("num_nonnulls(package_id, product_id) = 1", name="one_thing"),
    Index(
        "uq_physical_copy_package",
        "package_id",
        "location_id",
        unique=True,
        postgresql_where=text("package_id IS NOT NULL"),
    ),
    Index(
        "uq_physical_copy_product",
        "product_id",
        "location_id",
        unique=True,
        postgresql_where=text("product_id IS NOT NULL"),
    ),
)

# --- what to do ---

software = Table("software", metadata, _id(), Column("name", Text, nullable=False, unique=True), _text("description"))

software_version = Table(
    "software_version",
    metadata,
    _id(),
    _ref("software_id", "software"),
    _text("version", None),
    _json("command", "[]"),
    _text("image"),
    _text("sif"),
    _text("state", "active"),
    *_revoked(),  # who deprecated or revoked it by `wfm revoke`
    _time("created_at", now=True),
    _one_of("state", ("active", "deprecated", "revoked")),
    UniqueConstraint("software_id", "version"),
)

config = Table("config", metadata, _id(), Column("name", Text, nullable=False, unique=True), _text("description"))

# Immutable: changed parameters make a new revision; the newest one that is not revoked counts.
config_revision = Table(
    "config_revision",
    metadata,
    _id(),
    _ref("config_id", "config"),
    Column("revision", Integer, nullable=False),
    _json("parameters"),
    _text("hash", None),
    *_revoked(),
    _time("created_at", now=True),
    UniqueConstraint("config_id", "revision"),
)

data_grouping = Table(
    "data_grouping",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
    _json("rules", "[]"),
    _text("renamed_from"),  # as last applied; tells what was done already
)

pipeline = Table(
    "pipeline",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    _text("description"),
    _ref("grouping_id", "data_grouping"),
    _ref("location_id", "data_location"),
    _text("trigger_type", TriggerType.CONTINUOUS),
    _json("trigger_config"),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    Column("weight", Double, nullable=False, server_default=text("1")),  # its share among those of equal priority
    Column("max_in_flight", Integer),  # None: no limit of its own
    Column("stale_priority", Integer),  # of runs for data that have a result already; None: the same
    _text("paused_by"),  # empty: not paused
    _text("paused_reason"),
    _time("frozen_at"),  # a campaign: since then no package joins or leaves its units
    _time("deleted_at"),
    _text("renamed_from"),
    _one_of("trigger_type", TriggerType),
    CheckConstraint("weight > 0 AND max_in_flight >= 1", name="share"),
)

# When a pipeline with trigger CRON is due; kept by the trigger-manager, which makes it anew when the config is another.
schedule = Table(
    "schedule",
    metadata,
    Column("pipeline_id", BigInteger, ForeignKey("pipeline.id"), primary_key=True),
    _json("config"),
    Column("due_at", DateTime(timezone=True), nullable=False),
    _time("fired_for"),  # the last time that was due and has had its firing
)

campaign = Table(
    "campaign",
    metadata,
    Column("pipeline_id", BigInteger, ForeignKey("pipeline.id"), primary_key=True),
    _ref("template_id", "pipeline"),
    Column("packages", BigInteger, nullable=False),
    _text("actor", None),
    _text("reason"),
    _time("created_at", now=True),
)

reduction_step = Table(
    "reduction_step",
    metadata,
    _id(),
    _ref("pipeline_id", "pipeline"),
    _text("name", None),
    _text("identity", None),  # its first name, or like it; goes into digests, so that the name does not
    _text("renamed_from"),
    Column("position", Integer, nullable=False),  # topological order, from 0
    _text("description"),
    _json("group_by", "[]"),
    _text("dims", None),  # canonical text of group_by; steps with equal dims share units
    _ref("software_id", "software"),
    _text("version_policy", VersionPolicy.COMPATIBLE),
    _text("version"),
    _ref("config_id", "config", null=True),
    _text("fan_in", FanIn.ALL),
    Column("fan_in_deadline_hours", Double),  # after the last planned end of a unit; with fan_in complete
    _ref("config_revision_id", "config_revision", null=True),  # of a campaign; else the newest counts
    _json("resources"),
    _json("environment"),
    Column("max_retries", Integer, nullable=False, server_default=text("3")),
    # So many members of a unit, at once, may be left out because it fails on them; 0: none is looked for.
    Column("quarantine_at_most", Integer, nullable=False, server_default=text("0")),
    Column("cooldown_seconds", Double, nullable=False, server_default=text("0")),
    Column("settle_seconds", Double, nullable=False, server_default=text("0")),
    Column("settle_at_most_seconds", Double),  # None: ten times as long as settle_seconds
    _text("on_stale", OnStale.RUN),
    Column("approval_units", BigInteger),  # None: as the settings say
    Column("approval_core_hours", Double),
    Column("retention_days", Double),  # None: kept for ever
    Column("max_in_flight", Integer),
    Column("final", Boolean, nullable=False),  # no other step depends on it
    Column("active", Boolean, nullable=False, server_default=text("true")),  # False: no longer in the applied pipeline
    _text("paused_by"),
    _text("paused_reason"),
    UniqueConstraint("pipeline_id", "name"),
    UniqueConstraint("pipeline_id", "identity"),
    _one_of("version_policy", VersionPolicy),
    _one_of("fan_in", FanIn),
    CheckConstraint("(fan_in = 'complete') = (fan_in_deadline_hours IS NOT NULL)", name="fan_in_deadline_hours"),
    _one_of("on_stale", OnStale),
    CheckConstraint("version_policy <> 'pinned' OR version <> ''", name="pinned_version"),
    CheckConstraint("max_retries >= 0 AND cooldown_seconds >= 0 AND retention_days >= 0", name="not_negative"),
    CheckConstraint("quarantine_at_most >= 0", name="quarantine_at_most"),
    CheckConstraint("max_in_flight >= 1", name="share"),
    CheckConstraint("settle_seconds >= 0 AND settle_at_most_seconds >= settle_seconds", name="settle"),
)

step_dependency = Table(
    "step_dependency",
    metadata,
    Column("step_id", BigInteger, ForeignKey("reduction_step.id"), primary_key=True),
    Column("upstream_id", BigInteger, ForeignKey("reduction_step.id"), primary_key=True, index=True),
    CheckConstraint("step_id <> upstream_id", name="not_itself"),
)

# What a step wants, a row for each time that it changed; the newest counts. Approval is for one row.
step_wish = Table(
    "step_wish",
    metadata,
    _id(),
    _ref("step_id", "reduction_step"),
    _ref("software_version_id", "software_version"),
    _ref("config_revision_id", "config_revision", null=True),
    Column("units", BigInteger, nullable=False),  # that it made stale
    Column("core_hours", Double),  # that these take; None: unknown
    _text("approved_by"),
    _text("approved_reason"),
    _time("approved_at"),
    _time("created_at", now=True),
    Index("ix_step_wish_step_id", "step_id", "id"),
)

# --- units and coverage ---

unit = Table(
    "unit",
    metadata,
    _id(),
    _ref("pipeline_id", "pipeline"),
    _text("dims", None),
    _text("key", None),
    _json("values"),
    Column("generation", BigInteger, nullable=False, server_default=text("0")),  # counts changes of the member set
    _digest("digest"),
    Column("members", BigInteger, nullable=False, server_default=text("0")),
    UniqueConstraint("pipeline_id", "dims", "key"),
    CheckConstraint("members >= 0", name="members"),
)

# A member belongs to the generations added <= g < removed; a run that pins generation g pins its inputs.
unit_member = Table(
    "unit_member",
    metadata,
    Column("unit_id", BigInteger, ForeignKey("unit.id"), primary_key=True),
    Column("package_id", BigInteger, ForeignKey("raw_data_package.id"), primary_key=True),
    Column("added", BigInteger, primary_key=True),
    Column("removed", BigInteger),
    _digest("item"),
    CheckConstraint("removed > added", name="order"),
    Index(
        "uq_unit_member_current",
        "package_id",
        "unit_id",
        unique=True,
        postgresql_where=text("removed IS NULL"),
    ),
)

# Which finer unit lies inside which coarser one, for pairs of steps that depend on each other: as long as they share a
# package.
unit_edge = Table(
    "unit_edge",
    metadata,
    Column("upper_id", BigInteger, ForeignKey("unit.id"), primary_key=True),
    Column("lower_id", BigInteger, ForeignKey("unit.id"), primary_key=True, index=True),
)

UNITS_INSIDE = """
SELECT u.id, u.key WHERE us.dims = s.dims
UNION ALL SELECT lu.id, lu.key FROM unit_edge e JOIN unit lu ON lu.id = e.lower_id
WHERE e.upper_id = u.id AND us.dims <> s.dims AND lu.dims = us.dims
"""
"""For a LATERAL join: the units (id, key) of step ``us``, on which step ``s`` depends, that lie in unit ``u`` of ``s``.

What a unit waits for, what its run reads and what its digest is made of all come from here or from `UPSTREAM_COUNTS`,
which is the same counted, so that they agree.
"""

# What lies in a coarse unit, counted: the sum of the rows of (upper_id, dims, step_id). Triggers on `coverage` and
# `unit_edge` append what a statement changes, so no writer can forget it and none waits for another; the gap engine
# sums many rows into one. No foreign keys: they would lock the coarse unit for every run that ends.
upstream_tally = Table(
    "upstream_tally",
    metadata,
    _id(),
    Column("upper_id", BigInteger, nullable=False),
    _text("dims", None),  # of the finer units
    Column("step_id", BigInteger),  # whose results are counted; none for the units themselves
    Column("units", BigInteger, nullable=False, server_default=text("0")),
    Column("covered", BigInteger, nullable=False, server_default=text("0")),
    Column("blocked", BigInteger, nullable=False, server_default=text("0")),
    _digest("digest"),  # of the results of the covered ones
    Index("ix_upstream_tally_upper_id", "upper_id", "dims"),
)

# Units of these dims, and how many of them a step's coverage has in which state; sums of rows, as above.
coverage_tally = Table(
    "coverage_tally",
    metadata,
    _id(),
    Column("pipeline_id", BigInteger, nullable=False),
    _text("dims", None),
    Column("step_id", BigInteger),  # none, as state and why: all units, with or without coverage
    Column("state", Text),
    Column("why", Text),
    Column("units", BigInteger, nullable=False),
    Index("ix_coverage_tally_pipeline_id", "pipeline_id", "dims"),
)

UPSTREAM_COUNTS = f"""
SELECT coalesce(sum(n.units), 0)::bigint AS total, coalesce(sum(n.covered), 0)::bigint AS covered,
    coalesce(sum(n.blocked), 0)::bigint AS blocked,
    mod(mod(coalesce(sum(n.digest), 0), {DIGEST_MODULUS}) + {DIGEST_MODULUS}, {DIGEST_MODULUS}) AS digest,
    count(*) AS parts
FROM (
    SELECT 1 AS units, c.counts::int AS covered, (c.state = 'blocked')::int AS blocked,
        CASE WHEN c.counts THEN c.result END AS digest
    FROM (SELECT 1 WHERE us.dims = s.dims) itself LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, u.id)
    UNION ALL
    SELECT t.units, t.covered, t.blocked, t.digest FROM upstream_tally t
    WHERE us.dims <> s.dims AND t.upper_id = u.id AND t.dims = us.dims AND (t.step_id IS NULL OR t.step_id = us.id)) n
"""
"""For a LATERAL join: of the units that `UNITS_INSIDE` gives, how many there are, how many are covered and blocked, the
digest of the results of the covered ones, and of how many rows this is the sum. Reads none of the units."""

coverage = Table(
    "coverage",
    metadata,
    Column("step_id", BigInteger, ForeignKey("reduction_step.id"), primary_key=True),
    Column("unit_id", BigInteger, ForeignKey("unit.id"), primary_key=True, index=True),
    _text("state", None),
    _text("why", None),
    _text("reason"),
    _text("wanted"),  # digest that a covering run must have
    _time("wanted_since"),
    _time("settling_since"),  # since when nothing but settling keeps it from running
    _ref("run_id", "run", null=True),  # the accepted COMPLETED run
    _digest("result", null=True),  # the accepted result's term in the digest of units that depend on it
    Column("requested", Boolean, nullable=False, server_default=text("false")),  # to run at once, whatever the trigger
    _text("requested_for"),  # who asked, or which time of a schedule
    _ref("backfill_id", "backfill", null=True),  # the one that asks for it
    _text("paused_by"),  # `wfm pause` of the unit alone
    _text("paused_reason"),
    _time("due_at"),  # when the trigger-manager must look again
    _time("updated_at", now=True),
    # Fingerprints of what the decision rested on (`wfm.gaps`): what the unit wants, and what may hold it. With equal
    # ones the decision would be the same.
    Column("basis", BigInteger),
    Column("gates", BigInteger),
    Column("quarantined", ARRAY(BigInteger)),  # rows of quarantine that `wanted` leaves out; None: nothing
    # Whether what depends on it may read its accepted result.
    Column(
        "counts",
        Boolean,
        Computed(f"state = '{CoverageState.COVERED}' OR why = '{Why.APPROVAL}'", persisted=True),
        nullable=False,
    ),
    _one_of("state", CoverageState),
    CheckConstraint("state <> 'covered' OR (run_id IS NOT NULL AND result IS NOT NULL)", name="covered_by"),
    Index("ix_coverage_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    # What may need somebody is looked up among the rest, which is nearly all.
    Index(
        "ix_coverage_open", "step_id", "state", "unit_id", postgresql_where=text("state NOT IN ('covered', 'empty')")
    ),
    Index("ix_coverage_paused", "step_id", "unit_id", postgresql_where=text("paused_by <> ''")),
)

# --- backfills ---

# A named piece of work over what there was when it began; new data does not change it.
backfill = Table(
    "backfill",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    Column("name", Text, nullable=False, unique=True),
    _ref("pipeline_id", "pipeline"),
    _ref("step_id", "reduction_step", null=True),  # None: all steps
    _text("kind", None),
    _json("selection"),  # wfm.backfill.Selection
    Column("priority", Integer, nullable=False),
    Column("max_in_flight", Integer),
    _text("state", "running"),
    _text("actor", None),
    _text("reason"),
    _text("paused_by"),
    _text("paused_reason"),
    _time("created_at", now=True),
    _time("finished_at"),
    _one_of("kind", BackfillKind),
    _one_of("state", BackfillState),
    CheckConstraint("max_in_flight >= 1", name="share"),
    CheckConstraint("(state = 'paused') = (paused_by <> '')", name="paused"),
    CheckConstraint("(state IN ('done', 'cancelled')) = (finished_at IS NOT NULL)", name="finished_at"),
)

backfill_unit = Table(
    "backfill_unit",
    metadata,
    Column("backfill_id", BigInteger, ForeignKey("backfill.id"), primary_key=True),
    Column("step_id", BigInteger, ForeignKey("reduction_step.id"), primary_key=True),
    Column("unit_id", BigInteger, ForeignKey("unit.id"), primary_key=True),
    Column("place", BigInteger, nullable=False),  # in its order; after all that it depends on
    _text("state", "waiting"),
    _text("note"),  # why it was left out, or failed
    _one_of("state", ("waiting", "begun", "done", "failed", "skipped")),
    Index(
        "ix_backfill_unit_open", "backfill_id", "state", "place", postgresql_where=text("state IN ('waiting', 'begun')")
    ),
)

# That nothing came where something was expected: from a module, or of a scheduled observation. One row, and one event,
# for each time; it ends when data come (or the observation is lost, or nothing is expected any more).
absence = Table(
    "absence",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    _ref("instrument_module_id", "instrument_module", null=True),
    _ref("scheduled_observation_id", "scheduled_observation", null=True),
    Column("since", DateTime(timezone=True), nullable=False),  # the last package, or the planned end
    _text("reason", None),
    _time("noticed_at", now=True),
    _time("ended_at"),
    CheckConstraint("num_nonnulls(instrument_module_id, scheduled_observation_id) = 1", name="one_thing"),
    Index(
        "uq_absence_module",
        "instrument_module_id",
        "location_id",
        unique=True,
        postgresql_where=text("ended_at IS NULL"),
    ),
    Index(
        "uq_absence_observation",
        "scheduled_observation_id",
        "location_id",
        unique=True,
        postgresql_where=text("ended_at IS NULL"),
    ),
)

# That something of a night need not be covered, for its certificate alone: a package, or a unit of a step.
waiver = Table(
    "waiver",
    metadata,
    _id(),
    _ref("package_id", "raw_data_package", null=True),
    _ref("step_id", "reduction_step", null=True),
    _ref("unit_id", "unit", null=True),
    Column("until", DateTime(timezone=True), nullable=False),
    _text("actor", None),
    _text("reason", None),
    _time("created_at", now=True),
    _time("ended_at"),  # before its time, or because another one took its place
    _text("ended_by"),
    _text("ended_reason"),
    CheckConstraint(
        "(package_id IS NULL) = (step_id IS NOT NULL) AND (step_id IS NULL) = (unit_id IS NULL)", name="one_thing"
    ),
    Index("uq_waiver_package", "package_id", unique=True, postgresql_where=text("ended_at IS NULL")),
    Index("uq_waiver_unit", "step_id", "unit_id", unique=True, postgresql_where=text("ended_at IS NULL")),
)

# --- runs ---

run = Table(
    "run",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    _ref("pipeline_id", "pipeline", index=True),
    _ref("step_id", "reduction_step"),
    _text("pipeline_name", None),  # as they were called when it was made: the names of its directories
    _text("step_name", None),
    _ref("unit_id", "unit"),
    Column("generation", BigInteger, nullable=False),  # of the unit's member set: pins the raw inputs
    _text("wanted", None),
    _json("missing", "[]"),  # scheduled observations that it did not wait for
    Column("subset", JSONB),  # wfm.model.Subset; None: it reads all members of its unit
    _ref("probe_of", "run", null=True),  # whose failure it examines; it covers nothing, and has no products
    Column("probe", JSONB),  # wfm.model.Probe
    _digest("result"),  # this run's term in the digest of units that depend on it
    _json("upstream", "[]"),  # wfm.model.UpstreamRead each; of fan-in other than all, once it is built
    _ref("software_version_id", "software_version"),
    _ref("config_revision_id", "config_revision", null=True),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    _ref("backfill_id", "backfill", null=True),  # the one that it was last begun for
    Column("cpu", Double, nullable=False),
    Column("memory_gb", Double, nullable=False),
    # moved only through the chart
    _text("state", None),
    Column("version", Integer, nullable=False, server_default=text("1")),
    Column("chart_version", Integer, nullable=False),
    Column("attempt", Integer, nullable=False, server_default=text("1")),
    Column("failures", Integer, nullable=False, server_default=text("0")),  # of the retries allowed, those used
    _time("due_at"),
    _time("look_again_at"),
    _text("waiting_for"),  # why an active run does not move: no free slot, held: disk, ...
    # the current attempt's job
    Column("job", JSONB),  # wfm.model.JobSpec
    _text("backend"),
    _text("handle"),
    # what became of it
    _text("failure"),
    _text("message"),
    Column("exit_code", Integer),
    Column("wall_seconds", Double),
    Column("cpu_hours", Double),
    Column("peak_memory_gb", Double),
    _text("node"),
    _json("evidence"),
    _time("created_at", now=True),
    _time("state_since", now=True),
    _time("submitted_at"),
    _time("started_at"),
    _time("finished_at"),
    _one_of("state", RunState),
    CheckConstraint(f"(state IN ({_FINAL})) = (finished_at IS NOT NULL)", name="finished_at"),
    CheckConstraint("attempt >= 1 AND version >= 1 AND failures >= 0", name="counts"),
    CheckConstraint("(probe_of IS NULL) = (probe IS NULL)", name="probe"),
    Index("ix_run_probe_of", "probe_of", postgresql_where=text("probe_of IS NOT NULL")),
    # Of the runs in states that are not final, said so that no other index fits: whoever makes many runs at once looks
    # for each pair's active run while the planner still thinks that there is none.
    Index("uq_run_active", "step_id", "unit_id", unique=True, postgresql_where=text("finished_at IS NULL")),
    Index("ix_run_wanted", "step_id", "unit_id", "wanted"),
    Index("ix_run_failed", "step_id", "unit_id", "id", postgresql_where=text("state IN ('FAILED', 'CANCELLED')")),
    Index(
        "ix_run_pending",
        "location_id",
        "step_id",
        text("priority DESC"),
        "id",
        postgresql_where=text("state = 'PENDING'"),
    ),
    Index("ix_run_state", "location_id", "state", "due_at", postgresql_where=text(f"state NOT IN ({_FINAL})")),
)


def _in_subset(of: str, key: str, ranged: str) -> str:
    return f"""
    (r.subset IS NULL OR r.subset ->> 'of' <> '{of}' OR (NOT r.subset -> 'without' @> to_jsonb({key})
        AND (NOT ({ranged}) OR {key} BETWEEN coalesce((r.subset ->> 'first')::bigint, {key})
            AND coalesce((r.subset ->> 'last')::bigint, {key}))))
    """


PACKAGE_READ = _in_subset("packages", "m.package_id", "true")
"""Whether run ``r`` reads package ``m.package_id`` of its unit."""

UNIT_READ = _in_subset("units", "l.id", "us.dims = r.subset ->> 'dims'")
"""Whether run ``r`` reads the result of step ``us`` for unit ``l`` that lies in its own."""

PINNED = f"""
m.unit_id = r.unit_id AND m.added <= r.generation AND (m.removed IS NULL OR m.removed > r.generation) AND {PACKAGE_READ}
"""
"""The members ``m`` of its unit that run ``r`` pinned."""

# A member that a unit of a step fails on, by itself too: it is left out, as long as neither the member nor what is to
# run differs from what failed. Whether it is left out now stands in `coverage.quarantined`.
quarantine = Table(
    "quarantine",
    metadata,
    _id(),
    _ref("step_id", "reduction_step"),
    _ref("unit_id", "unit"),
    _ref("package_id", "raw_data_package", null=True),
    _ref("member_id", "unit", null=True),  # a finer unit
    _digest("content"),  # the member's term in the unit's digest, as it failed
    _ref("software_version_id", "software_version"),
    _text("config"),  # hash of the parameters
    _ref("run_id", "run", index=True),  # that failed with all that the search was about
    Column("run_version", Integer, nullable=False),
    _ref("probe_id", "run"),  # that failed with the member alone
    _text("actor", None),
    _text("reason", None),
    _time("created_at", now=True),
    _time("released_at"),
    _text("released_by"),
    _text("released_reason"),
    CheckConstraint("num_nonnulls(package_id, member_id) = 1", name="one_thing"),
    Index("ix_quarantine_unreleased", "step_id", "unit_id", postgresql_where=text("released_at IS NULL")),
    Index(
        "uq_quarantine_package",
        *("step_id", "unit_id", "package_id", "content", "software_version_id", "config"),
        unique=True,
        postgresql_where=text("released_at IS NULL AND package_id IS NOT NULL"),
    ),
    Index(
        "uq_quarantine_member",
        *("step_id", "unit_id", "member_id", "content", "software_version_id", "config"),
        unique=True,
        postgresql_where=text("released_at IS NULL AND member_id IS NOT NULL"),
    ),
)

MEMBER_NAME = """coalesce((SELECT name FROM raw_data_package x WHERE x.id = w.package_id),
    (SELECT key FROM unit x WHERE x.id = w.member_id))"""
"""The name of the member that row ``w`` of quarantine is about."""

# When one of a queue's runs last got a slot: among equals, who was served the longest ago comes next. It is written by
# admission alone, and so is no column of the queue's own row, which others lock.
slot_turn = Table(
    "slot_turn",
    metadata,
    Column("location_id", BigInteger, ForeignKey("data_location.id"), primary_key=True),
    Column("queue", Text, primary_key=True),
    _time("served_at", now=True),
)

# Which upstream results a run read; its raw inputs follow from its unit and generation.
run_input = Table(
    "run_input",
    metadata,
    Column("run_id", BigInteger, ForeignKey("run.id"), primary_key=True),
    Column("upstream_run_id", BigInteger, ForeignKey("run.id"), primary_key=True, index=True),
    Column("upstream_attempt", Integer, nullable=False, server_default=text("1")),  # whose products it read
    _text("step_name", None),  # of the upstream run's step when the job was built: below it the products are placed
)

transition = Table(
    "transition",
    metadata,
    Column("run_id", BigInteger, ForeignKey("run.id"), primary_key=True),
    Column("version", Integer, primary_key=True),  # of the run, after this transition; gap-free from 1
    Column("attempt", Integer, nullable=False),
    _text("trigger", None),
    _text("source"),  # empty for the first
    _text("dest", None),
    Column("chart_version", Integer, nullable=False),
    _text("actor", None),
    _text("reason"),
    # of the attempt, where it failed
    _text("failure"),
    Column("exit_code", Integer),
    _time("at", now=True),
)

event = Table(
    "event",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    _text("type", None),
    _text("recipient"),  # a role; empty: for the public stream only
    _json("body"),
    Column("run_id", BigInteger),  # no foreign key: events outlive pruned runs
    Column("run_version", Integer),
    _text("actor", None),
    _text("reason"),
    _time("created_at", now=True),
    _time("publish_at", now=True),
    Column("publishes", Integer, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    _time("done_at"),
    Column("txid", Xid8(), nullable=False, server_default=text("pg_current_xact_id()")),
    UniqueConstraint("run_id", "run_version", "type", "recipient"),
    Index("ix_event_pending", "location_id", "type", "publish_at", postgresql_where=text("done_at IS NULL")),
    Index("ix_event_txid", "txid", "id"),
)

task = Table(
    "task",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    _text("kind", None),
    _ref("run_id", "run", null=True),
    Column("attempt", Integer, nullable=False, server_default=text("1")),
    _text("state", "ready"),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    _text("owner"),
    Column("epoch", Integer, nullable=False, server_default=text("0")),  # fencing: grows with every lease
    _time("lease_until"),
    Column("tries", Integer, nullable=False, server_default=text("0")),  # leases that ended in an error or in silence
    _time("due_at", now=True),
    _json("payload"),
    _text("error"),
    _time("created_at", now=True),
    _time("finished_at"),
    _one_of("state", ("ready", "leased", "done", "failed", "closed")),
    CheckConstraint("(state = 'leased') = (lease_until IS NOT NULL)", name="lease"),
    Index("uq_task_run", "kind", "run_id", "attempt", unique=True, postgresql_where=text("run_id IS NOT NULL")),
    Index("uq_task_location", "kind", "location_id", unique=True, postgresql_where=text("run_id IS NULL")),
    Index("ix_task_open", "location_id", "kind", "due_at", postgresql_where=text("state IN ('ready', 'leased')")),
)

data_product = Table(
    "data_product",
    metadata,
    _id(),
    _ref("run_id", "run"),
    Column("attempt", Integer, nullable=False),
    _text("type", None),
    _text("path", None),  # relative to the attempt's directory
    Column("size", BigInteger, nullable=False),
    _text("checksum", None),
    _json("metrics"),
    Column("superseded_by", BigInteger, ForeignKey("run.id")),  # its own run: by a later attempt of it
    *_revoked(),
    _time("created_at", now=True),
    _one_of("type", ProductType),
    UniqueConstraint("run_id", "attempt", "path"),
    # Only of those that are: nearly all are not, and looking these up by it would read the whole table.
    Index("ix_data_product_superseded_by", "superseded_by", postgresql_where=text("superseded_by IS NOT NULL")),
    Index("ix_data_product_revoked", "run_id", postgresql_where=text("revoked_by <> ''")),
)

dead_letter = Table(
    "dead_letter",
    metadata,
    _id(),
    _ref("location_id", "data_location"),
    _text("stream", None),
    _text("entry_id", None),
    Column("body", LargeBinary, nullable=False),
    _text("reason", None),
    Column("event_id", BigInteger),
    _text("state", "open"),
    _text("actor"),  # who resent or dropped it, why, and when
    _text("actor_reason"),
    _time("settled_at"),
    _time("created_at", now=True),
    _one_of("state", ("open", "resent", "dropped")),
    UniqueConstraint("stream", "entry_id"),
)
