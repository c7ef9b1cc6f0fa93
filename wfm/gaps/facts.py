"""All that a decision about a (step, unit) rests on, gathered for many at once, and its fingerprint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
from msgspec import Struct

from wfm import plan
from wfm.decide import (
    DIGEST_MODULUS,
    AcceptedRun,
    ActiveRun,
    ApprovalLimits,
    EndedRun,
    GapFacts,
    ObservingPlan,
    SoftwareVersion,
    Upstream,
    Wish,
    cause,
    choose_version,
    due_text,
    due_times,
    in_place_of_revoked,
    needs_approval,
    own_members,
    wanted_digest,
    without,
)
from wfm.gaps.quarantine import Guilty, Inputs, Quarantined, Suspects, probe_run, subset, suspects, unchanged
from wfm.model import (
    FanIn,
    OnStale,
    Pair,
    Probe,
    Resources,
    RunState,
    Schedule,
    TriggerType,
    VersionPolicy,
)
from wfm.schema import UPSTREAM_COUNTS
from wfm.store import WITHDRAWN, Prepared, Tx, encode, result_hash
from wfm.views.cost import about, step_costs

TALLY_ROWS = 100
"""Rows of a tally that are read as they are; more are summed into one first."""


class Situation(Struct, frozen=True):
    """The facts of one pair, the fingerprints of what they rest on, and the run that would follow from them.

    Attributes:
        names: of pipeline, step and unit. config: hash of the parameters.
        inputs: what the digest is made of, without `aside`. digest: of inputs, with what else is wanted.
        aside: the members that are in quarantine. suspects: where the unit failed and members may be left out.
    """

    facts: GapFacts
    basis: int
    gates: int
    cause: str
    new_run: dict[str, Any]
    names: tuple[str, str, str]
    config: str
    inputs: Inputs
    digest: Callable[[Inputs], str]
    aside: Sequence[Quarantined]
    suspects: Suspects | None

    def guilty(self, pair: Pair, place: int, evidence: int) -> Guilty:
        """The member at this place, to be put into quarantine."""
        assert self.suspects is not None
        pipeline, step, unit = self.names
        return Guilty(
            pair=pair,
            location_id=self.new_run["location_id"],
            pipeline=pipeline,
            step=step,
            unit=unit,
            member=self.suspects.members[place - 1],
            found=self.suspects,
            evidence=evidence,
            software_version_id=self.new_run["software_version_id"],
            config=self.config,
        )

    def probe(self, range_: tuple[int, int]) -> dict[str, Any]:
        """The run that tries these of its members."""
        assert self.suspects is not None
        return probe_run(self.new_run, self.suspects, range_, self.inputs, self.digest)

    def unread(self, range_: tuple[int, int] | None) -> set[str]:
        """Names of the members that a run does not read: in quarantine, or not in the range of a probe."""
        left = {m.name for m in self.aside}
        if range_ and self.suspects:
            first, last = range_
            left |= {m.name for m in (*self.suspects.members[: first - 1], *self.suspects.members[last:])}
        return left


RULES = """
SELECT s.id AS step_id, hashtextextended(ROW(s.identity, s.active, s.dims, s.software_id, s.version_policy, s.version,
        s.fan_in, s.config_id, s.config_revision_id,
        (SELECT max(id) FROM config_revision r WHERE r.config_id = s.config_id),
        (SELECT array_agg(r.id ORDER BY r.id) FROM config_revision r
            WHERE r.config_id = s.config_id AND r.revoked_by <> ''),
        (SELECT array_agg(v ORDER BY v.id) FROM software_version v WHERE v.software_id = s.software_id),
        (SELECT array_agg(d.upstream_id ORDER BY d.upstream_id) FROM step_dependency d WHERE d.step_id = s.id)
    )::text, 0) AS basis, hashtextextended(ROW(s, p, CAST(:limits AS text),
        (SELECT max(w.approved_at) FROM step_wish w WHERE w.step_id = s.id),
        (SELECT array_agg(us.name ORDER BY us.id) FROM step_dependency d JOIN reduction_step us
            ON us.id = d.upstream_id WHERE d.step_id = s.id))::text, 0) AS gates
FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
"""
"""Fingerprints of what all units of a step have in common.

`basis`: what decides what a unit wants, and so whether it is covered; a step's name is not in it. `gates`: all of the
step and its pipeline, limits and approvals, which decide what becomes of a unit that is not, and the names of the steps
it depends on, which its reason tells. `gap` looks at nothing else of them.
"""

UPSTREAM = f"""
SELECT jsonb_agg(to_jsonb(z)) AS steps, string_agg(ROW(z.identity, z.total, z.covered, z.blocked, z.digest)::text, ' '
    ORDER BY z.identity) AS seen
FROM (
    SELECT us.name AS step, us.identity, n.total, n.covered, n.blocked, n.digest::text AS digest, n.parts
    FROM step_dependency d JOIN reduction_step us ON us.id = d.upstream_id
    JOIN LATERAL ({UPSTREAM_COUNTS}) n ON true
    WHERE d.step_id = s.id) z
"""
"""For a LATERAL join: what lies in unit ``u`` of step ``s``, by upstream step."""

REVOKED = """
SELECT r.unit_id, string_agg(DISTINCT r.wanted, ' ') AS digests
FROM data_product d JOIN run r ON r.id = d.run_id WHERE d.revoked_by <> '' AND r.step_id = s.id
"""
"""The digests whose results must not be used, of units of step ``s``."""

IN_QUARANTINE = """
SELECT step_id, unit_id, string_agg(id::text, ' ' ORDER BY id) AS rows FROM quarantine
WHERE released_at IS NULL AND step_id = ANY(CAST(:steps AS bigint[])) GROUP BY step_id, unit_id
"""
"""What was not released, of all units of some steps: few have any."""

FINGERPRINTS = """
hashtextextended(ROW(rules.basis, u.generation, up.seen, rv.digests)::text
    || coalesce(' without ' || qu.rows || ' of ' || s.quarantine_at_most, ''), 0) AS basis,
hashtextextended(ROW(rules.gates, c.requested, c.paused_by, c.paused_reason, b)::text, 0) AS gates
"""
"""Of one pair: all facts that `gap` looks at, except runs, whose moves write coverage, and time, for which it is due.

A fact of the unit itself that is new in `GapFacts` belongs here: into `basis` if it may change what is covered, else
into `gates`.
"""


_SITUATIONS = Prepared(
    "situations",
    f"""
    WITH c AS MATERIALIZED (
        SELECT c.step_id, c.unit_id, c.requested, c.requested_for, c.run_id, c.wanted, c.wanted_since,
            c.settling_since, c.paused_by, c.paused_reason, c.backfill_id
        FROM coverage c
        JOIN unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS w(step_id, unit_id)
            ON (w.step_id, w.unit_id) = (c.step_id, c.unit_id)
        ORDER BY c.step_id, c.unit_id FOR NO KEY UPDATE OF c),
    rules AS MATERIALIZED ({RULES} WHERE s.id = ANY(CAST(:steps AS bigint[]))),
    qu AS MATERIALIZED ({IN_QUARANTINE})
    SELECT c.step_id, c.unit_id, c.requested, c.requested_for, s.name AS step, s.identity, s.active AS step_active,
        s.version_policy, s.version AS named_version, s.software_id, sw.name AS software, s.resources,
        s.cooldown_seconds, s.paused_by AS step_paused_by, s.paused_reason AS step_paused_reason,
        s.on_stale, s.approval_units, s.approval_core_hours, s.quarantine_at_most,
        p.name AS pipeline, p.id AS pipeline_id, p.location_id, p.priority, p.stale_priority,
        p.enabled AND p.deleted_at IS NULL AS enabled,
        p.paused_by, p.paused_reason, p.trigger_type, p.trigger_config, now() AS now,
        c.paused_by AS unit_paused_by, c.paused_reason AS unit_paused_reason, b.id AS backfill_id,
        b.name AS backfill, b.priority AS backfill_priority, coalesce(b.paused_by, '') AS backfill_paused_by,
        b.paused_reason AS backfill_paused_reason,
        s.dims, s.group_by, u.dims AS unit_dims, u.key AS unit, u.members, u.digest, u.generation,
        cf.name AS config, cr.id AS config_id,
        cr.revision AS config_revision, coalesce(cr.hash, '') AS config_hash,
        a.id AS active_id, a.state AS active_state, a.missing AS active_missing, a.probe AS active_probe,
        CASE WHEN a.probe_of IS NULL THEN a.wanted ELSE (SELECT f.wanted FROM run f WHERE f.id = a.probe_of)
            END AS active_wanted,
        prev.id AS prev_id, prev.wanted AS prev_wanted, prev.generation AS prev_generation,
        prev.software_version_id AS prev_version_id, psw.name AS prev_software, pv.version AS prev_version,
        coalesce(pc.hash, '') AS prev_config_hash,
        pv.state = 'revoked' OR coalesce(pc.revoked_by, '') <> '' AS prev_revoked,
        s.fan_in, CASE WHEN s.fan_in = 'any' THEN
            (SELECT sum((x ->> 'read')::int) FROM jsonb_array_elements(prev.upstream) x) END AS accepted_results,
        c.wanted AS known_wanted, s.settle_seconds, s.settle_at_most_seconds,
        extract(epoch FROM now() - c.wanted_since)::float AS quiet_seconds,
        extract(epoch FROM now() - c.settling_since)::float AS settling_seconds,
        CASE WHEN s.cooldown_seconds > 0 THEN extract(epoch FROM now() - (SELECT max(created_at) FROM run r
            WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.failure <> :withdrawn
                AND r.id IS DISTINCT FROM a.id AND r.probe_of IS NULL))::float END AS since_last_run,
        up.steps AS upstream, {FINGERPRINTS}
    FROM c JOIN rules ON rules.step_id = c.step_id
    JOIN reduction_step s ON s.id = c.step_id JOIN pipeline p ON p.id = s.pipeline_id
    JOIN software sw ON sw.id = s.software_id JOIN unit u ON u.id = c.unit_id
    LEFT JOIN run prev ON prev.id = c.run_id LEFT JOIN software_version pv ON pv.id = prev.software_version_id
    LEFT JOIN software psw ON psw.id = pv.software_id
    LEFT JOIN config_revision pc ON pc.id = prev.config_revision_id
    LEFT JOIN backfill b ON b.id = c.backfill_id
    -- One by one, from its index: in the transaction of a flood nobody knows yet how many active runs there are.
    LEFT JOIN LATERAL (SELECT id, state, wanted, missing, probe_of, probe FROM run r
        WHERE (r.step_id, r.unit_id) = (c.step_id, c.unit_id) AND r.finished_at IS NULL LIMIT 1) a ON true
    LEFT JOIN config cf ON cf.id = s.config_id
    LEFT JOIN LATERAL (SELECT id, revision, hash FROM config_revision WHERE config_id = s.config_id
            AND revoked_by = '' AND (s.config_revision_id IS NULL OR id = s.config_revision_id)
        ORDER BY revision DESC LIMIT 1) cr ON true
    LEFT JOIN LATERAL ({UPSTREAM}) up ON true
    LEFT JOIN LATERAL ({REVOKED} AND r.unit_id = c.unit_id GROUP BY r.unit_id) rv ON true
    LEFT JOIN qu ON (qu.step_id, qu.unit_id) = (c.step_id, c.unit_id)
    """,
)


def situations(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, Situation]:
    """Everything `decide.gap` looks at, in few statements; locks the coverage rows."""
    rows = tx.all(
        _SITUATIONS,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
        withdrawn=WITHDRAWN,
        limits=limits(tx),
    )
    sum_up(tx, [r.unit_id for r in rows if any(z["parts"] > TALLY_ROWS for z in r.upstream or ())])
    versions: dict[int, list[SoftwareVersion]] = defaultdict(list)
    for v in tx.all(
        "SELECT software_id, id, version, state FROM software_version WHERE software_id = ANY(:ids)",
        ids=sorted({r.software_id for r in rows}),
    ):
        versions[v.software_id].append(SoftwareVersion(v.id, v.version, v.state))
    revoked = revoked_results(tx, pairs)
    in_quarantine = unchanged(tx, pairs)

    @cache
    def chosen(policy: str, named: str, software: int) -> tuple[SoftwareVersion | None, str]:
        return choose_version(VersionPolicy(policy), named, versions[software])

    known = {}
    aside: dict[Pair, list[Quarantined]] = {}
    for r in rows:
        pair = r.step_id, r.unit_id
        version, fault = chosen(r.version_policy, r.named_version, r.software_id)
        upstream = tuple(msgspec.convert(z, Upstream, strict=False) for z in r.upstream or ())
        # What failed is left out as long as it would run as it was: another version or config may do better.
        same = [m for m in in_quarantine[pair] if version and _runs(m) == (version.id, r.config_hash)]
        aside[pair] = same[: r.quarantine_at_most]
        inputs = Inputs(int(r.digest), r.members, upstream).without(aside[pair])
        wanted = _digest(r, version, revoked[pair], inputs) if version and not _config_fault(r) else ""
        known[pair] = (r, version, fault, inputs, wanted)
    ended = _ended(tx, {pair: k[4] for pair, k in known.items() if k[4]})
    failed = {pair: e for pair, e in ended.items() if e.of_data and _may_search(*known[pair])}
    most = {pair: known[pair][0].quarantine_at_most for pair in failed}
    among = suspects(tx, failed, most, aside, {pair: known[pair][3] for pair in failed})
    plans = _plans(tx, [(r.step_id, r.unit_id) for r in rows if r.fan_in == FanIn.COMPLETE])
    wishes = _wishes(tx, {r.step_id: (v.id, r.config_id) for r, v, _, _, wanted in known.values() if wanted and v})

    @cache
    def not_due(cron: str, timezone: str) -> str:
        schedule = Schedule(cron, timezone)
        return f"{due_text(schedule, next(due_times(schedule, rows[0].now)))}, cron {cron}"

    def next_time(r: Any) -> str:
        schedule = msgspec.convert(r.trigger_config, Schedule)
        return not_due(schedule.cron, schedule.timezone) if r.trigger_type == TriggerType.CRON else ""

    return {
        pair: _situation(
            *k,
            ended.get(pair),
            plans.get(pair),
            next_time(k[0]),
            revoked[pair],
            _held(tx, k[0], k[1], wishes, revoked[pair]),
            aside[pair],
            among.get(pair),
        )
        for pair, k in known.items()
    }


def _runs(m: Quarantined) -> tuple[int, str]:
    return m.software_version_id, m.config


def _may_search(r: Any, _version: Any, _fault: str, _inputs: Inputs, wanted: str) -> bool:
    """Whether members of a failed unit may be left out, and no run of it is on its way that goes on all the same."""
    return bool(r.quarantine_at_most) and not (r.active_id and r.active_wanted == wanted)


def _digest(r: Any, version: SoftwareVersion, revoked: Collection[str], inputs: Inputs) -> str:
    """What a run of a pair with these inputs must have."""
    own = own_members(FanIn(r.fan_in), inputs.items, inputs.members)
    wanted = wanted_digest(*own, inputs.results, r.software, version.version, r.config_hash)
    return in_place_of_revoked(wanted, revoked)


def _wishes(tx: Tx, wanted: Mapping[int, tuple[int, int | None]]) -> dict[int, Wish]:
    """By step, since when it wants what it wants now, (version, config revision), and what that made stale.

    Who sees first that it changed counts, for the whole step and for good: so it is one decision for all its units,
    whatever is evaluated first, and does not turn while some of them get new data.
    """
    rows = tx.all(
        "SELECT DISTINCT ON (step_id) * FROM step_wish WHERE step_id = ANY(:steps) ORDER BY step_id, id DESC",
        steps=list(wanted),
    )
    known = {r.step_id: r for r in rows if (r.software_version_id, r.config_revision_id) == wanted[r.step_id]}
    new = [step for step in wanted if step not in known]
    if new:
        with tx.by_key(False):
            known |= {r.step_id: r for r in _new_wishes(tx, wanted, new)}
    return {step: Wish(r.units, r.core_hours, r.approved_by != "") for step, r in known.items()}


def _new_wishes(tx: Tx, wanted: Mapping[int, tuple[int, int | None]], new: Sequence[int]) -> Sequence[Any]:
    costs = step_costs(tx.conn, new)
    return tx.all(
        """
        INSERT INTO step_wish (step_id, software_version_id, config_revision_id, units, core_hours)
        SELECT w.step_id, w.version_id, w.config_id, n.units, n.units * w.core_hours
        FROM jsonb_to_recordset(CAST(:rows AS jsonb))
            AS w(step_id bigint, version_id bigint, config_id bigint, core_hours float8)
        LEFT JOIN config_revision wc ON wc.id = w.config_id
        CROSS JOIN LATERAL (
            SELECT count(*) AS units FROM coverage c JOIN run r ON r.id = c.run_id JOIN unit u ON u.id = c.unit_id
            LEFT JOIN config_revision rc ON rc.id = r.config_revision_id
            WHERE c.step_id = w.step_id AND u.members > 0 AND u.generation = r.generation
                AND (r.software_version_id, rc.hash) IS DISTINCT FROM (w.version_id, wc.hash)
                AND NOT EXISTS (SELECT 1 FROM run o LEFT JOIN config_revision oc ON oc.id = o.config_revision_id
                    WHERE (o.step_id, o.unit_id, o.generation) = (c.step_id, c.unit_id, u.generation)
                        AND o.state = 'COMPLETED' AND o.probe_of IS NULL AND o.software_version_id = w.version_id
                        AND oc.hash IS NOT DISTINCT FROM wc.hash)) n
        ORDER BY w.step_id RETURNING *
        """,
        rows=encode(
            [
                {
                    "step_id": step,
                    "version_id": wanted[step][0],
                    "config_id": wanted[step][1],
                    "core_hours": costs[step].core_hours,
                }
                for step in new
            ]
        ),
    )


def _reprocessed(r: Any) -> bool:
    """Whether the unit has a result of the same raw data."""
    return r.prev_id is not None and r.prev_generation == r.generation


def _held(tx: Tx, r: Any, version: SoftwareVersion | None, wishes: Mapping[int, Wish], revoked: Collection[str]) -> str:
    """Why a stale unit waits for approval; empty if it does not."""
    wish = wishes.get(r.step_id)
    if version is None or wish is None or not _reprocessed(r):
        return ""
    on_stale, how = OnStale(r.on_stale), f"approve with `wfm approve {r.pipeline}/{r.step}`"
    changed = []
    if r.prev_version_id != version.id:
        changed.append(f"{r.software} {version.version}")
    if r.prev_config_hash != r.config_hash:
        changed.append(f"config {r.config} revision {r.config_revision}" if r.config else "no config")
    if not changed:
        held = r.prev_wanted in revoked and on_stale is OnStale.HOLD
        return f"its result was revoked; {how}" if held else ""
    default = tx.approval
    limits = ApprovalLimits(
        default.units if r.approval_units is None else r.approval_units,
        default.core_hours if r.approval_core_hours is None else r.approval_core_hours,
    )
    if not needs_approval(wish, on_stale, limits):
        return ""
    units = f"{wish.units} unit{'' if wish.units == 1 else 's'}"
    cost = "of unknown cost" if wish.core_hours is None else about(wish.core_hours)
    return f"{units}, {cost}, because {' and '.join(changed)} is wanted; {how}"


def _config_fault(r: Any) -> str:
    return f"every revision of config {r.config} is revoked" if r.config and r.config_id is None else ""


_REVOKED_RESULTS = Prepared(
    "revoked_results",
    """
    SELECT DISTINCT r.step_id, r.unit_id, r.wanted
    FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(s, u)
    JOIN run r ON (r.step_id, r.unit_id) = (q.s, q.u) JOIN data_product d ON d.run_id = r.id
    WHERE d.revoked_by <> ''
    """,
)


def revoked_results(tx: Tx, pairs: Collection[Pair]) -> Mapping[Pair, set[str]]:
    """By pair, the digests whose result must not be used: a product of the run that made it is revoked."""
    found: dict[Pair, set[str]] = defaultdict(set)
    for r in tx.all(
        _REVOKED_RESULTS,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    ):
        found[r.step_id, r.unit_id].add(r.wanted)
    return found


def sum_up(tx: Tx, units: Sequence[int]) -> None:
    """Make one row of the many rows of a tally; its sum is the same at all times. Rows in other hands stay."""
    if units:
        tx.run(
            """
            WITH many AS MATERIALIZED (SELECT id FROM upstream_tally WHERE upper_id = ANY(:units)
                FOR UPDATE SKIP LOCKED),
            gone AS (DELETE FROM upstream_tally t USING many WHERE t.id = many.id RETURNING t.*)
            INSERT INTO upstream_tally (upper_id, dims, step_id, units, covered, blocked, digest)
            SELECT upper_id, dims, step_id, sum(units), sum(covered), sum(blocked), mod(sum(digest), :modulus)
            FROM gone GROUP BY upper_id, dims, step_id
            """,
            units=sorted(set(units)),
            modulus=DIGEST_MODULUS,
        )


def _plans(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, ObservingPlan]:
    """What the observing plan says of units whose steps wait until their group is complete."""
    if not pairs:
        return {}
    found: dict[Pair, ObservingPlan] = {}
    for s in tx.all(
        """
        SELECT s.id, s.group_by, s.fan_in_deadline_hours AS hours, g.rules,
            jsonb_object_agg(u.id::text, u."values") AS units
        FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
        JOIN reduction_step s ON s.id = q.step_id JOIN unit u ON u.id = q.unit_id AND u.dims = s.dims
        JOIN pipeline p ON p.id = s.pipeline_id JOIN data_grouping g ON g.id = p.grouping_id
        WHERE p.frozen_at IS NULL GROUP BY s.id, g.rules
        """,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    ):
        units = {int(unit): values for unit, values in s.units.items()}
        of = plan.expected(tx, s.rules, s.group_by, units, s.hours)
        found |= {(s.id, unit): said for unit, said in of.items()}
    return found


_ENDED = Prepared(
    "ended",
    """
    SELECT DISTINCT ON (r.step_id, r.unit_id) r.step_id, r.unit_id, r.id, r.state, r.message,
        CASE r.state WHEN 'FAILED' THEN (SELECT count(*) FROM run f JOIN transition t ON t.run_id = f.id
            WHERE (f.step_id, f.unit_id, f.wanted) = (q.s, q.u, q.w) AND f.probe_of IS NULL AND t.trigger = 'fail')
            ELSE 0 END AS failures,
        r.missing, r.failure
    FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[]), CAST(:wanted AS text[])) AS q(s, u, w)
    JOIN run r ON (r.step_id, r.unit_id, r.wanted) = (q.s, q.u, q.w)
    WHERE r.finished_at IS NOT NULL AND r.probe_of IS NULL AND r.failure <> :withdrawn
        AND NOT (r.state = 'COMPLETED' AND EXISTS (SELECT 1 FROM task t
            WHERE t.run_id = r.id AND t.attempt = r.attempt AND t.kind = 'purge' AND t.state <> 'closed'))
    ORDER BY r.step_id, r.unit_id, r.state = 'COMPLETED' DESC, r.id DESC
    """,
)


def _ended(tx: Tx, wanted: Mapping[Pair, str]) -> dict[Pair, EndedRun]:
    """The latest ended run with the wanted digest; a completed one before all others, unless its files were purged."""
    rows = tx.all(
        _ENDED,
        steps=[p[0] for p in wanted],
        units=[p[1] for p in wanted],
        wanted=list(wanted.values()),
        withdrawn=WITHDRAWN,
    )
    return {
        (r.step_id, r.unit_id): EndedRun(
            r.id, RunState(r.state), r.message, tuple(r.missing), failures=r.failures, failure=r.failure
        )
        for r in rows
    }


def _situation(
    r: Any,
    version: SoftwareVersion | None,
    fault: str,
    inputs: Inputs,
    wanted: str,
    ended: EndedRun | None,
    planned: ObservingPlan | None,
    not_due: str,
    revoked: Collection[str],
    held: str,
    aside: Sequence[Quarantined],
    among: Suspects | None,
) -> Situation:
    paused = ""
    for what, by, reason in (
        ("pipeline", r.paused_by, r.paused_reason),
        ("step", r.step_paused_by, r.step_paused_reason),
        ("unit", r.unit_paused_by, r.unit_paused_reason),
        (f"backfill {r.backfill}", r.backfill_paused_by, r.backfill_paused_reason),
    ):
        if by:
            paused = f"{what} paused by {by}" + (f": {reason}" if reason else "")
            break
    facts = GapFacts(
        members=r.members,
        wanted=wanted,
        version_fault=fault,
        config_fault=_config_fault(r),
        upstream=inputs.upstream,
        fan_in=FanIn(r.fan_in),
        accepted_results=r.accepted_results or 0,
        active=ActiveRun(
            r.active_id,
            RunState(r.active_state),
            r.active_wanted,
            tuple(r.active_missing),
            probe=msgspec.convert(r.active_probe, Probe | None),
        )
        if r.active_id
        else None,
        ended=ended,
        step_active=r.step_active,
        orphaned="" if r.unit_dims == r.dims else ", ".join(r.group_by) or "nothing",
        enabled=r.enabled,
        paused=paused,
        trigger=TriggerType(r.trigger_type),
        not_due=not_due,
        requested=r.requested,
        cooldown_seconds=r.cooldown_seconds,
        seconds_since_last_run=r.since_last_run,
        settle_seconds=r.settle_seconds,
        settle_at_most_seconds=10 * r.settle_seconds if r.settle_at_most_seconds is None else r.settle_at_most_seconds,
        quiet_seconds=(r.quiet_seconds or 0.0) if wanted == r.known_wanted else 0.0,
        settling_seconds=r.settling_seconds or 0.0,
        held=held,
        revoked=r.prev_revoked or r.prev_wanted in revoked,
        plan=planned,
        quarantine_at_most=r.quarantine_at_most,
        quarantined=tuple(m.name for m in aside),
        search=among.search if among else None,
    )
    resources = msgspec.convert(r.resources, Resources)
    new_run = {
        "step_id": r.step_id,
        "unit_id": r.unit_id,
        "pipeline_id": r.pipeline_id,
        "location_id": r.location_id,
        "generation": r.generation,
        "wanted": wanted,
        "result": str(result_hash(r.identity, r.unit, wanted)),
        "software_version_id": version.id if version else None,
        "config_revision_id": r.config_id,
        "priority": _priority(r),
        "backfill_id": r.backfill_id,
        "cpu": resources.cpu,
        "memory_gb": resources.memory_gb,
        "missing": planned.missing if planned else (),
        "subset": msgspec.to_builtins(subset(aside)),
    }
    accepted = r.prev_wanted and AcceptedRun(r.prev_wanted, r.prev_software, r.prev_version, r.prev_config_hash)
    own = own_members(FanIn(r.fan_in), inputs.items, inputs.members)
    now_wanted = (*own, inputs.results, r.software, version.version if version else "", r.config_hash)
    why = cause(accepted, *now_wanted, revoked=revoked)
    if r.requested_for and (r.requested or r.active_id):
        why += f"; {r.requested_for}"
    if r.backfill_id:
        why += f"; backfill {r.backfill}"
    why += without(planned.missing if planned else ())
    return Situation(
        facts=facts,
        basis=r.basis,
        gates=r.gates,
        cause=why,
        new_run=new_run,
        names=(r.pipeline, r.step, r.unit),
        config=r.config_hash,
        inputs=inputs,
        digest=lambda inputs: _digest(r, version, revoked, inputs) if version else "",
        aside=aside,
        suspects=among,
    )


def _priority(r: Any) -> int:
    if r.backfill_id:
        return int(r.backfill_priority)
    return int(r.stale_priority if _reprocessed(r) and r.stale_priority is not None else r.priority)


_WITHOUT_COPIES = Prepared(
    "without_copies",
    """
    SELECT q.step_id, q.unit_id, m.names
    FROM unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)
    CROSS JOIN LATERAL (
        -- In WHERE, "removed IS NULL" would have each unit's members looked for in the index of all packages.
        SELECT array_agg(p.name ORDER BY p.name) FILTER (WHERE m.removed IS NULL) AS names FROM unit_member m
        JOIN raw_data_package p ON p.id = m.package_id
        WHERE m.unit_id = q.unit_id
            AND NOT EXISTS (SELECT 1 FROM physical_copy c JOIN data_location l ON l.id = c.location_id
                WHERE c.package_id = p.id AND c.status IN ('present', 'staged') AND l.storage = 'disk')) m
    WHERE m.names IS NOT NULL AND NOT EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = q.step_id)
    """,
)


def without_copies(tx: Tx, pairs: Sequence[Pair]) -> dict[Pair, tuple[str, ...]]:
    """Of pairs that read raw data: names of packages that lie on no disk."""
    if not pairs:
        return {}
    rows = tx.all(
        _WITHOUT_COPIES,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    return {(r.step_id, r.unit_id): tuple(r.names) for r in rows}


def limits(tx: Tx) -> str:
    """The settings that decisions rest on, as text."""
    return str(msgspec.structs.astuple(tx.approval))
