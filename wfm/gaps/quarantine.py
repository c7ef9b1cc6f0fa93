"""Members of a unit on which it fails: what is known of them, how they are looked for, and that they are left out.

A member of a step that reads raw data is a package; of a step that depends on others it is a finer unit, with all
results that the step reads of it. The rules are in `wfm.decide`: here are their facts, and what follows is carried out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct, structs

from wfm.decide import (
    DIGEST_MODULUS,
    EndedRun,
    Search,
    Tried,
    Upstream,
    set_digest,
)
from wfm.events import DataQuarantined, DataReleased
from wfm.model import OF_DATA, Actor, Pair, Probe, RunState, Subset
from wfm.schema import MEMBER_NAME
from wfm.store import WITHDRAWN, Prepared, Tx, encode


class Member(Struct, frozen=True, kw_only=True):
    """A member of a unit.

    Attributes:
        id: of the package, or of the finer unit. name: of the package, or the unit's key.
        dims: of the finer unit; empty for a package. item: the package's term in the digest of its unit.
        upstream: of a finer unit, its part in what `Upstream` counts, of each step with these dims.
    """

    id: int
    name: str
    dims: str = ""
    item: int = 0
    upstream: tuple[Upstream, ...] = ()

    @property
    def content(self) -> int:
        """Changes with what the step reads of it."""
        return set_digest([self.item, *(u.digest for u in self.upstream)])


class Quarantined(Member, frozen=True, kw_only=True):
    """A member that is in quarantine and is as it was when it failed; what is to run may be another thing by now.

    Attributes:
        row: of quarantine. software_version_id, config: what it failed with. since: the run that failed first.
        proven: a result came of the rest since.
    """

    row: int
    software_version_id: int
    config: str
    since: int
    proven: bool


class Inputs(Struct, frozen=True):
    """What a unit's digest is made of, before software and config.

    Attributes:
        items, members: digest and number of its packages. upstream: what lies in it.
    """

    items: int
    members: int
    upstream: tuple[Upstream, ...]

    @property
    def results(self) -> dict[str, int]:
        """By identity of the step, the digest of the results."""
        return {u.identity: u.digest for u in self.upstream}

    def without(self, members: Sequence[Member]) -> Inputs:
        """The same, without these members."""
        if not members:
            return self
        parts: dict[str, list[Upstream]] = defaultdict(list)
        for m in members:
            for u in m.upstream:
                parts[u.identity].append(u)
        packages = [m.item for m in members if not m.dims]
        return Inputs(
            (self.items - set_digest(packages)) % DIGEST_MODULUS,
            self.members - len(packages),
            tuple(_less(u, parts[u.identity]) for u in self.upstream),
        )

    def made_of(self, members: Sequence[Member]) -> bool:
        """Whether there is nothing but these members, of their kind."""
        rest, steps = self.without(members), {u.identity for m in members for u in m.upstream}
        if not steps:
            return (rest.items, rest.members) == (0, 0)
        return not any(u.digest or u.covered for u in rest.upstream if u.identity in steps)


def _less(whole: Upstream, parts: Sequence[Upstream]) -> Upstream:
    return structs.replace(
        whole,
        total=whole.total - sum(p.total for p in parts),
        covered=whole.covered - sum(p.covered for p in parts),
        blocked=whole.blocked - sum(p.blocked for p in parts),
        digest=(whole.digest - set_digest(p.digest for p in parts)) % DIGEST_MODULUS,
    )


_PAIRS = "unnest(CAST(:steps AS bigint[]), CAST(:units AS bigint[])) AS q(step_id, unit_id)"

# For unit l inside unit u of step s: what each step with these dims that s depends on has of it.
_PARTS = """
SELECT jsonb_agg(jsonb_build_object('step', us.name, 'identity', us.identity, 'total', 1,
    'covered', coalesce(c.counts, false)::int, 'blocked', coalesce(c.state = 'blocked', false)::int,
    'digest', (CASE WHEN c.counts THEN c.result ELSE 0 END)::text)) AS upstream, bool_or(c.counts) AS counts
FROM step_dependency d JOIN reduction_step us ON us.id = d.upstream_id
LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id)
WHERE d.step_id = s.id AND us.dims = l.dims AND us.dims <> s.dims
"""


_UNCHANGED = Prepared(
    "unchanged",
    f"""
    SELECT w.step_id, w.unit_id, w.id AS row, w.content, w.software_version_id, w.config, w.run_id AS since,
        EXISTS (SELECT 1 FROM run r WHERE (r.step_id, r.unit_id) = (w.step_id, w.unit_id) AND r.id > w.run_id
            AND r.state = 'COMPLETED' AND r.probe_of IS NULL) AS proven,
        coalesce(k.id, l.id) AS id, coalesce(k.name, l.key) AS name, coalesce(l.dims, '') AS dims,
        coalesce(m.item, 0)::text AS item, coalesce(z.upstream, '[]') AS upstream
    FROM {_PAIRS} JOIN quarantine w ON (w.step_id, w.unit_id) = (q.step_id, q.unit_id) AND w.released_at IS NULL
    JOIN reduction_step s ON s.id = w.step_id
    LEFT JOIN unit_member m ON (m.unit_id, m.package_id) = (w.unit_id, w.package_id) AND m.removed IS NULL
        AND NOT EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = s.id)
    LEFT JOIN raw_data_package k ON k.id = m.package_id
    LEFT JOIN unit_edge e ON (e.upper_id, e.lower_id) = (w.unit_id, w.member_id)
    LEFT JOIN unit l ON l.id = e.lower_id
    LEFT JOIN LATERAL ({_PARTS}) z ON l.id IS NOT NULL
    WHERE m.package_id IS NOT NULL OR z.counts
    ORDER BY w.id
    """,
)


def unchanged(tx: Tx, pairs: Collection[Pair]) -> Mapping[Pair, list[Quarantined]]:
    """By pair, the members in quarantine that belong to it and are as they were when they failed, the oldest first."""
    found: dict[Pair, list[Quarantined]] = defaultdict(list)
    rows = tx.all(
        _UNCHANGED,
        steps=[p[0] for p in pairs],
        units=[p[1] for p in pairs],
    )
    for r in rows:
        member = msgspec.convert({k: v for k, v in r._mapping.items() if k != "content"}, Quarantined, strict=False)
        if member.content == int(r.content):
            found[r.step_id, r.unit_id].append(member)
    return found


class Suspects(Struct, frozen=True):
    """Where a unit failed on data: the members to look among, in their order, and what was found of them so far."""

    run: int
    version: int
    priority: int
    backfill_id: int | None
    members: list[Member]
    search: Search


def suspects(
    tx: Tx,
    failed: Mapping[Pair, EndedRun],
    most: Mapping[Pair, int],
    aside: Mapping[Pair, Sequence[Quarantined]],
    inputs: Mapping[Pair, Inputs],
) -> dict[Pair, Suspects]:
    """By pair that failed on data: among what the guilty member is, and what the search has found.

    Args:
        failed: the run that failed with what the pair wants. most: how many members may be left out.
        aside: what is left out already. inputs: all else that the digest is made of. Where the members are others by
            now, for they are asked for later, there is no search yet: whoever changed them has the pair decided again.
    """
    if not failed:
        return {}
    runs = {
        r.id: r
        for r in tx.all(
            "SELECT id, version, priority, backfill_id FROM run WHERE id = ANY(:ids)",
            ids=[e.id for e in failed.values()],
        )
    }
    tried, over = _tried(tx, runs), _over(tx, runs)
    members = _members(tx, list(failed))
    found = {}
    for pair, ended in failed.items():
        run = runs[ended.id]
        left_out = {(m.dims, m.id) for m in aside[pair]}
        among = [m for m in members[pair] if (m.dims, m.id) not in left_out]
        if not inputs[pair].made_of(among):
            continue
        found[pair] = Suspects(
            run=run.id,
            version=run.version,
            priority=run.priority,
            backfill_id=run.backfill_id,
            members=among,
            search=Search(
                members=len(among),
                most=most[pair],
                tried=tuple(tried[run.id]),
                unproven=tuple(m.name for m in aside[pair] if not m.proven),
                over=over.get(run.id, ""),
            ),
        )
    return found


def _tried(tx: Tx, runs: Mapping[int, Any]) -> Mapping[int, list[Tried]]:
    """By failed run, the probes that have ended of its present search; withdrawn ones have not begun."""
    tried: dict[int, list[Tried]] = defaultdict(list)
    for r in tx.all(
        "SELECT id, probe_of, probe, state, failure, message FROM run WHERE probe_of = ANY(:ids)"
        " AND finished_at IS NOT NULL AND failure <> :withdrawn ORDER BY id",
        ids=list(runs),
        withdrawn=WITHDRAWN,
    ):
        probe = msgspec.convert(r.probe, Probe)
        if probe.version != runs[r.probe_of].version:
            continue
        of_data = r.state == RunState.FAILED and r.failure in OF_DATA
        passed = True if r.state == RunState.COMPLETED else False if of_data else None
        tried[r.probe_of].append(Tried(r.id, probe.first, probe.last, passed, r.message))
    return tried


def _over(tx: Tx, runs: Mapping[int, Any]) -> dict[int, str]:
    """By failed run whose search has ended with a release, why that was."""
    rows = tx.all(
        "SELECT DISTINCT ON (run_id) run_id, run_version, released_reason FROM quarantine"
        " WHERE run_id = ANY(:ids) AND released_at IS NOT NULL ORDER BY run_id, run_version DESC",
        ids=list(runs),
    )
    return {r.run_id: r.released_reason for r in rows if r.run_version == runs[r.run_id].version}


def _members(tx: Tx, pairs: Sequence[Pair]) -> Mapping[Pair, list[Member]]:
    """By pair, its members in the order of their ids; of finer units of several dims those of which there are most."""
    by_dims: dict[Pair, dict[str, list[Member]]] = defaultdict(lambda: defaultdict(list))
    where = {"steps": [p[0] for p in pairs], "units": [p[1] for p in pairs]}
    for r in tx.all(
        f"""
        SELECT q.step_id, q.unit_id, k.id, k.name, m.item::text AS item FROM {_PAIRS}
        JOIN unit_member m ON m.unit_id = q.unit_id AND m.removed IS NULL
        JOIN raw_data_package k ON k.id = m.package_id
        WHERE NOT EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = q.step_id) ORDER BY k.id
        """,
        **where,
    ):
        by_dims[r.step_id, r.unit_id][""].append(Member(id=r.id, name=r.name, item=int(r.item)))
    for r in tx.all(
        f"""
        SELECT q.step_id, q.unit_id, l.id, l.key AS name, l.dims, z.upstream
        FROM {_PAIRS} JOIN reduction_step s ON s.id = q.step_id
        JOIN unit_edge e ON e.upper_id = q.unit_id JOIN unit l ON l.id = e.lower_id
        CROSS JOIN LATERAL ({_PARTS}) z WHERE z.counts ORDER BY l.id
        """,
        **where,
    ):
        by_dims[r.step_id, r.unit_id][r.dims].append(msgspec.convert(dict(r._mapping), Member, strict=False))
    found: dict[Pair, list[Member]] = defaultdict(list)
    for pair, divisions in by_dims.items():
        found[pair] = max(divisions.values(), key=lambda members: (len(members), members[0].dims))
    return found


def subset(aside: Sequence[Member]) -> Subset | None:
    """What a run reads that leaves these out; None for all."""
    if not aside:
        return None
    return Subset(of="units" if aside[0].dims else "packages", without=tuple(sorted(m.id for m in aside)))


def probe_run(
    run: Mapping[str, Any],
    found: Suspects,
    range_: tuple[int, int],
    inputs: Inputs,
    digest: Callable[[Inputs], str],
) -> dict[str, Any]:
    """The run that tries a part of a unit's members: like `run`, which would try them all, for the same slots.

    Args:
        inputs: of `run`. digest: of inputs with what else is wanted.
    """
    first, last = range_
    chosen = found.members[first - 1 : last]
    others = [*found.members[: first - 1], *found.members[last:]]
    part = msgspec.convert(run["subset"], Subset | None) or Subset(of="units" if chosen[0].dims else "packages")
    place = Probe(found.version, len(found.search.tried) + 1, first, last, len(found.members))
    return {
        **run,
        "wanted": digest(inputs.without(others)),
        "result": "0",
        "subset": structs.replace(part, dims=chosen[0].dims, first=chosen[0].id, last=chosen[-1].id),
        "probe_of": found.run,
        "probe": place,
        "priority": found.priority,
        "backfill_id": found.backfill_id,
        "missing": (),
    }


class Guilty(Struct, frozen=True):
    """A member that goes into quarantine.

    Attributes:
        pipeline, step, unit: names. found: the search. evidence: the run that failed with the member alone.
        software_version_id, config: what failed.
    """

    pair: Pair
    location_id: int
    pipeline: str
    step: str
    unit: str
    member: Member
    found: Suspects
    evidence: int
    software_version_id: int
    config: str


def set_aside(tx: Tx, guilty: Sequence[Guilty], actor: Actor) -> None:
    """Put members into quarantine, and ask for the rest of their units: it belongs to the run that was asked for."""
    rows = []
    for g in guilty:
        said = next(t.message for t in g.found.search.tried if t.run == g.evidence)
        rows.append(
            {
                "step_id": g.pair[0],
                "unit_id": g.pair[1],
                "package_id": None if g.member.dims else g.member.id,
                "member_id": g.member.id if g.member.dims else None,
                "content": str(g.member.content),
                "software_version_id": g.software_version_id,
                "config": g.config,
                "run_id": g.found.run,
                "run_version": g.found.version,
                "probe_id": g.evidence,
                "backfill_id": g.found.backfill_id,
                "asked": f"run {g.found.run} without {g.member.name}",
                "reason": f"run {g.found.run} failed, and so did run {g.evidence} with it alone: {said}",
            }
        )
    tx.run(
        """
        WITH given AS (SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS g(step_id bigint, unit_id bigint,
            package_id bigint, member_id bigint, content numeric, software_version_id bigint, config text,
            run_id bigint, run_version int, probe_id bigint, backfill_id bigint, asked text, reason text)),
        new AS (INSERT INTO quarantine (step_id, unit_id, package_id, member_id, content, software_version_id, config,
                run_id, run_version, probe_id, actor, reason)
            SELECT step_id, unit_id, package_id, member_id, content, software_version_id, config, run_id, run_version,
                probe_id, :actor, reason FROM given ORDER BY step_id, unit_id)
        UPDATE coverage c SET requested = true, requested_for = g.asked, backfill_id = coalesce(b.id, c.backfill_id)
        FROM given g LEFT JOIN backfill b ON b.id = g.backfill_id AND b.state IN ('running', 'paused')
        WHERE (c.step_id, c.unit_id) = (g.step_id, g.unit_id)
        """,
        rows=encode(rows),
        actor=actor.name,
    )
    for g, row in zip(guilty, rows, strict=True):
        event = DataQuarantined(
            pipeline=g.pipeline, step=g.step, unit=g.unit, member=g.member.name, run=g.found.run, probe=g.evidence
        )
        tx.emit(g.location_id, event, "", Actor(actor.name, str(row["reason"])))


def release(tx: Tx, ids: Sequence[int], actor: Actor) -> Sequence[Any]:
    """Release rows of quarantine, for the actor's reason; returns them (step_id, unit_id, member)."""
    rows = tx.all(
        f"""
        UPDATE quarantine w SET released_at = now(), released_by = :by, released_reason = :reason
        FROM reduction_step s, pipeline p, unit u
        WHERE w.id = ANY(:ids) AND w.released_at IS NULL AND s.id = w.step_id AND p.id = s.pipeline_id
            AND u.id = w.unit_id
        RETURNING w.step_id, w.unit_id, p.location_id, p.name AS pipeline, s.name AS step, u.key AS unit, w.run_id,
            {MEMBER_NAME} AS member
        """,
        ids=list(ids),
        by=actor.name,
        reason=actor.reason,
    )
    for r in rows:
        event = DataReleased(pipeline=r.pipeline, step=r.step, unit=r.unit, member=r.member, run=r.run_id)
        tx.emit(r.location_id, event, "", actor)
    return rows
