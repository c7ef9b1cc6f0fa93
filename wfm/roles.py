"""The four roles, in the order of a run.

A role reads messages as hints, looks at Postgres, and does its part. Each has `handle` (a batch of messages, in one
transaction), `sweeps` (what it looks at from time to time, so that a lost message costs time and never work), and for
those that touch the outside world `settle` (outcomes of tasks). What a method returns is called after the commit.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import socket
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from wfm import gaps, plan
from wfm.backends import Backend
from wfm.charts import Chart
from wfm.config import Settings
from wfm.decide import (
    DIGEST_MODULUS,
    Capacity,
    PendingRun,
    Share,
    admit,
    due_text,
    due_times,
    in_place_of_revoked,
    own_members,
    wanted_digest,
)
from wfm.events import ENTRANCES, AttemptFailed, Event, PipelineChanged, PipelineFired, RunEvent
from wfm.jobs import build_spec
from wfm.kinds import POLL, Poll, job_facts, link_upstream, open_purges, worker_kinds
from wfm.model import Actor, FanIn, Role, RunState, Schedule, TaskKind
from wfm.schema import PACKAGE_READ
from wfm.store import HOLDS_SLOT, TASK_ON_ENTRY, WITHDRAWN, Move, RunRow, Store, Tx, encode
from wfm.tasks import Outcome, TaskRunner, foreign_kinds

log = logging.getLogger(__name__)

After = Callable[[], None] | None

CANDIDATES = 500
"""PENDING runs that one admission looks at. Those that cannot start, whatever is free, come last and crowd out none."""


class Sweep(Struct):
    """Something a role looks at from time to time, in a transaction of its own.

    Attributes:
        seconds: between two looks. work: the look.
        next_at: monotonic time of the next look; may be brought forward.
    """

    name: str
    seconds: float
    work: Callable[[Tx], After]
    next_at: float = 0.0

    def hasten(self, seconds: float) -> None:
        """Look again after so many seconds at the latest."""
        self.next_at = min(self.next_at, time.monotonic() + seconds)


class RoleWork(Protocol):
    """What the loop needs to know of a role."""

    role: Role
    sweeps: list[Sweep]

    def handle(self, tx: Tx, events: Sequence[Event]) -> After:
        """Act on a batch of messages."""
        ...

    def settle(self, tx: Tx, outcomes: Sequence[Outcome]) -> After:
        """Write the outcomes of tasks."""
        ...

    def stop(self) -> None:
        """Take no new work."""
        ...

    @property
    def busy(self) -> bool:
        """Whether tasks are still in hand."""
        ...

    def hand_back(self, tx: Tx) -> None:
        """Return what is in hand to others."""
        ...

    def close(self) -> None:
        """Release threads and processes."""
        ...


def streams_of(role: Role, chart: Chart) -> list[str]:
    """The event types that a role receives: those the chart addresses to it, and the entrances."""
    emitted = {e.event for s in chart.states.values() for e in s.emits if e.to is role}
    return sorted(emitted | {name for name, to in ENTRANCES.items() if to is role})


class _Quiet:
    """A role without tasks of its own."""

    busy = False

    def settle(self, tx: Tx, outcomes: Sequence[Outcome]) -> After:
        raise NotImplementedError("this role has no tasks")

    def stop(self) -> None:
        pass

    def hand_back(self, tx: Tx) -> None:
        pass

    def close(self) -> None:
        pass


def look_again(role: Role, location_id: int) -> Callable[[Tx], After]:
    """Runs that nobody has touched for longer than their state allows: tell their owner again."""

    def work(tx: Tx) -> After:
        states = [name for name, s in tx.chart.states.items() if s.owner is role]
        runs = tx.find_runs(
            "r.location_id = :loc AND r.state = ANY(:states) AND r.look_again_at < now()",
            limit=200,
            loc=location_id,
            states=states,
        )
        runs = tx.lock_runs(list(runs), coverage=False)
        overdue = {i: r for i, r in runs.items() if r.state in states}
        if not overdue:
            return None
        _reopen_tasks(tx, overdue)
        rows = [{"id": i, "look": tx.chart.states[r.state].look_again_after} for i, r in overdue.items()]
        tx.run(
            "UPDATE run r SET look_again_at = now() + m.look * interval '1 s'"
            " FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS m(id bigint, look float8) WHERE r.id = m.id",
            rows=msgspec.json.encode(rows).decode(),
        )
        tx.run(
            "UPDATE event e SET done_at = NULL, publish_at = now() FROM run r WHERE r.id = ANY(:ids)"
            " AND e.run_id = r.id AND e.run_version = r.version AND e.recipient = :role AND e.done_at IS NOT NULL",
            ids=list(overdue),
            role=role,
        )
        return None

    return work


def _reopen_tasks(tx: Tx, runs: dict[int, RunRow]) -> None:
    """A run in a worker's state always has an open task; should one be missing, it is made again."""
    waiting = {i: r for i, r in runs.items() if r.state in TASK_ON_ENTRY}
    rows = tx.all(
        """
        SELECT run_id, bool_or(t.state IN ('ready', 'leased')) AS open,
            bool_or(t.kind = 'stage' AND t.state = 'done') AS staged
        FROM task t JOIN run r ON r.id = t.run_id AND r.attempt = t.attempt
        WHERE run_id = ANY(:ids) AND kind <> 'purge' GROUP BY run_id
        """,
        ids=list(waiting),
    )
    known = {row.run_id: row for row in rows}
    missing: dict[int, str] = {}
    for i, r in waiting.items():
        row = known.get(i)
        if row is None or not row.open:
            staged = row is not None and row.staged and r.state is RunState.STAGING_DATA
            missing[i] = TaskKind.SUBMIT if staged else TASK_ON_ENTRY[r.state]
    if missing:
        log.warning("runs %s had no open task; made again", sorted(missing))
        tx.open_tasks(missing, waiting)


# --- trigger-manager ---


class TriggerManager(_Quiet):
    """Finds gaps: folds arrivals into units, evaluates what they touch, and reconciles with the catalogue."""

    role = Role.TRIGGER_MANAGER
    actor = Actor(Role.TRIGGER_MANAGER)

    def __init__(self, settings: Settings) -> None:
        self.location = settings.processing_location_id
        self.reconcile_seconds = settings.reconcile_seconds
        self.sweeps = [
            Sweep("due coverage", settings.sweep_seconds, self.evaluate_due),
            Sweep("due pipelines", settings.sweep_seconds, self.fire_due),
            Sweep("reconcile", min(settings.reconcile_seconds, 5.0), self.reconcile_when_due),
            Sweep("absence", 30.0, self.notice_absence),
        ]
        self._started = False

    def handle(self, tx: Tx, events: Sequence[Event]) -> After:
        pairs: set[gaps.Pair] = set()
        named = [e.raw_data_package for e in events if hasattr(e, "raw_data_package")]
        pairs |= gaps.fold(tx, self.location, self._arrivals(tx, named))
        changed = {e.pipeline_id for e in events if isinstance(e, PipelineChanged)}
        if changed:
            gaps.reconcile(tx, self.location, self.actor, changed)
        ended = [e.run for e in events if isinstance(e, RunEvent)]
        if ended:
            own = {
                (r.step_id, r.unit_id)
                for r in tx.all("SELECT DISTINCT step_id, unit_id FROM run WHERE id = ANY(:ids)", ids=ended)
            }
            pairs |= own | gaps.pairs_below(tx, own)
        gaps.evaluate(tx, pairs, self.actor)
        return None

    def _arrivals(self, tx: Tx, named: Iterable[int | str]) -> set[int]:
        """Packages to fold: those that messages name, and all others whose arrival is recorded.

        Folding all recorded arrivals before anything is decided keeps a coarse unit from running with half of what one
        transaction registered. Waits for a copy of this role that is folding them, rather than skipping its rows.
        """
        (recorded,) = tx.all(
            """
            WITH arrived AS MATERIALIZED (
                SELECT id FROM event
                WHERE location_id = :loc AND recipient = :role AND type = 'data.arrived' AND done_at IS NULL
                    AND failures = 0 AND jsonb_typeof(body -> 'raw_data_package') = 'number'
                ORDER BY id FOR NO KEY UPDATE),
            done AS (UPDATE event e SET done_at = now() FROM arrived a WHERE a.id = e.id
                RETURNING (body ->> 'raw_data_package')::bigint AS package)
            SELECT coalesce(array_agg(DISTINCT package), '{}') AS packages FROM done
            """,
            loc=self.location,
            role=self.role,
        )
        found = tx.all(
            "SELECT id FROM raw_data_package WHERE id = ANY(:ids) OR name = ANY(:names)",
            ids=[n for n in named if isinstance(n, int)],
            names=[n for n in named if isinstance(n, str)],
        )
        return {*recorded.packages, *(r.id for r in found)}

    def evaluate_due(self, tx: Tx) -> After:
        """Coverage whose time has come: a cooldown is over, a copy may be back."""
        rows = tx.all(
            """
            SELECT c.step_id, c.unit_id FROM coverage c JOIN reduction_step s ON s.id = c.step_id
            JOIN pipeline p ON p.id = s.pipeline_id
            WHERE c.due_at <= now() AND p.location_id = :loc
            ORDER BY c.step_id, c.unit_id LIMIT 500 FOR NO KEY UPDATE OF c SKIP LOCKED
            """,
            loc=self.location,
        )
        if rows:
            gaps.evaluate(tx, {(r.step_id, r.unit_id) for r in rows}, self.actor)
        return None

    def fire_due(self, tx: Tx) -> After:
        """Pipelines with trigger CRON whose time has come: ask for their gaps, once however often that time has passed.

        A schedule that is new, or another one than before, counts from now.
        """
        tx.run(
            "DELETE FROM schedule d USING pipeline p WHERE p.id = d.pipeline_id AND p.location_id = :loc"
            " AND NOT (p.trigger_type = 'CRON' AND p.enabled AND p.deleted_at IS NULL)",
            loc=self.location,
        )
        rows = tx.all(
            """
            SELECT p.id, p.trigger_config AS config, d.due_at <= now() AS due, now() AS now
            FROM pipeline p LEFT JOIN schedule d ON d.pipeline_id = p.id AND d.config = p.trigger_config
            WHERE p.location_id = :loc AND p.trigger_type = 'CRON' AND p.enabled AND p.deleted_at IS NULL
                AND (d.due_at <= now() OR d.pipeline_id IS NULL)
            """,
            loc=self.location,
        )
        schedules = {r.id: msgspec.convert(r.config, Schedule) for r in rows}
        following = {r.id: next(due_times(schedules[r.id], r.now)) for r in rows}
        new = [{"id": r.id, "config": r.config, "due": following[r.id].isoformat()} for r in rows if not r.due]
        if new:
            tx.run(
                """
                INSERT INTO schedule (pipeline_id, config, due_at)
                SELECT id, config, due FROM jsonb_to_recordset(CAST(:rows AS jsonb))
                    AS n(id bigint, config jsonb, due timestamptz) ORDER BY id
                ON CONFLICT (pipeline_id) DO UPDATE SET config = excluded.config, due_at = excluded.due_at
                WHERE schedule.config <> excluded.config
                """,
                rows=encode(new),
            )
        # Another copy of this role that fires one of these holds its row until that is committed; then it is not due.
        mine = tx.all(
            """
            SELECT d.pipeline_id AS id, d.due_at, p.name FROM schedule d JOIN pipeline p ON p.id = d.pipeline_id
            WHERE d.pipeline_id = ANY(:ids) AND d.due_at <= now() ORDER BY d.pipeline_id
            FOR NO KEY UPDATE OF d SKIP LOCKED
            """,
            ids=[r.id for r in rows if r.due],
        )
        if not mine:
            return None
        gaps.evaluate(tx, gaps.fold(tx, self.location, self._arrivals(tx, ())), self.actor)
        for d in mine:
            window, then = due_text(schedules[d.id], d.due_at), following[d.id]
            pairs = gaps.request(tx, d.id, f"due at {window}")
            tx.run("UPDATE schedule SET fired_for = due_at, due_at = :then WHERE pipeline_id = :id", then=then, id=d.id)
            times = {"window": d.due_at.isoformat(), "next": then.isoformat()}
            event = PipelineFired(pipeline=d.name, pipeline_id=d.id, units=len(pairs), **times)
            tx.emit(self.location, event, "", Actor(self.actor.name, f"due at {window}"))
            gaps.evaluate(tx, pairs, self.actor)
        return None

    def reconcile_when_due(self, tx: Tx) -> After:
        """Compare coverage with the whole catalogue: finds what no message told. One copy of this role at a time."""
        tx.run(
            "INSERT INTO task (location_id, kind) VALUES (:loc, 'reconcile') ON CONFLICT DO NOTHING", loc=self.location
        )
        mine = tx.all(
            """
            WITH due AS MATERIALIZED (SELECT id FROM task WHERE location_id = :loc AND kind = 'reconcile'
                AND (due_at <= now() OR :first) FOR NO KEY UPDATE SKIP LOCKED)
            UPDATE task t SET due_at = now() + :later * interval '1 s' FROM due WHERE due.id = t.id RETURNING t.id
            """,
            loc=self.location,
            first=not self._started,
            later=self.reconcile_seconds,
        )
        self._started = True
        if mine:
            gaps.fold(tx, self.location, self._arrivals(tx, ()))
            if wrong := gaps.mend_tallies(tx, self.location):
                log.error("%d tallies of units and coverage were wrong, and are counted anew", wrong)
            gaps.reconcile(tx, self.location, self.actor)
        return None

    def notice_absence(self, tx: Tx) -> After:
        """Tell what is expected and did not come."""
        plan.notice(tx, self.location, self.actor)
        return None


# --- workflow-manager ---


class WorkflowManager(_Quiet):
    """Admits PENDING runs by priority, fair share and free slots, and builds their jobs."""

    role = Role.WORKFLOW_MANAGER
    actor = Actor(Role.WORKFLOW_MANAGER)

    def __init__(self, settings: Settings, limit: Capacity) -> None:
        self.settings = settings
        self.location = settings.processing_location_id
        self.limit = limit
        self.sweeps = [
            Sweep("admission", settings.sweep_seconds, self.admit),
        ]

    def handle(self, tx: Tx, events: Sequence[Event]) -> After:
        return self.admit(tx)

    def admit(self, tx: Tx) -> After:
        """Start what fits. Which runs those are is a question to Postgres, not to the order of a stream."""
        # That a run is PENDING says only "look". What was said before this look is answered by it, published or not.
        tx.run(
            "UPDATE event SET done_at = now()"
            " WHERE location_id = :loc AND type = 'gap.detected' AND recipient = :role AND done_at IS NULL",
            loc=self.location,
            role=self.role,
        )
        if not tx.all("SELECT 1 FROM run WHERE location_id = :loc AND state = 'PENDING' LIMIT 1", loc=self.location):
            return None
        tx.run("SELECT 1 FROM data_location WHERE id = :loc FOR NO KEY UPDATE", loc=self.location)
        busy = self._in_flight(tx)
        candidates = self._candidates(tx, busy)
        shares = self._shares(tx, candidates, busy)
        pending = [PendingRun(c.id, c.cpu, c.memory_gb, _pause(c), c.priority, _shares_of(c)) for c in candidates]
        used = Capacity(sum(b.runs for b in busy), sum(b.cpu for b in busy), sum(b.memory_gb for b in busy))
        chosen, waiting = admit(pending, used, self.limit, shares)
        said = {c.id: c.waiting_for for c in candidates}
        news = {i: text for i, text in waiting.items() if said[i] != text}
        # Whoever holds one of these is about to change it: it is looked at another time.
        mine = {
            r.id
            for r in tx.all(
                "SELECT id FROM run WHERE id = ANY(:ids) AND state = 'PENDING'"
                " ORDER BY id FOR NO KEY UPDATE SKIP LOCKED",
                ids=[*chosen, *news],
            )
        }
        if mine & news.keys():
            tx.run(
                """
                UPDATE run r SET waiting_for = w.reason
                FROM unnest(CAST(:ids AS bigint[]), CAST(:reasons AS text[])) AS w(id, reason) WHERE r.id = w.id
                """,
                ids=[i for i in news if i in mine],
                reasons=[text for i, text in news.items() if i in mine],
            )
        self._take_turns(tx, {_shares_of(c)[0] for c in candidates if c.id in set(chosen) & mine})
        self._build(tx, [i for i in chosen if i in mine])
        return None

    def _in_flight(self, tx: Tx) -> Sequence[Any]:
        """What the runs in flight take up, by step and backfill."""
        return tx.all(
            """
            SELECT pipeline_id, step_id, backfill_id, count(*) AS runs, sum(cpu) AS cpu, sum(memory_gb) AS memory_gb
            FROM run WHERE location_id = :loc AND state = ANY(:states) GROUP BY pipeline_id, step_id, backfill_id
            """,
            loc=self.location,
            states=sorted(HOLDS_SLOT),
        )

    def _shares(self, tx: Tx, candidates: Sequence[Any], busy: Sequence[Any]) -> dict[str, Share]:
        """The shares that candidates count in: their queues, pipelines and steps.

        A pipeline is a queue, and each backfill of it is one of its own.
        """
        runs: Counter[str] = Counter()
        for b in busy:
            runs.update(dict.fromkeys(_shares_of(b), b.runs))
        served = {
            r.queue: r.served
            for r in tx.all(
                "SELECT queue, extract(epoch FROM served_at)::float AS served FROM slot_turn WHERE location_id = :loc",
                loc=self.location,
            )
        }
        shares = {}
        for c in candidates:
            queue, pipeline, step = _shares_of(c)
            most, last = c.backfill_most, served.get(queue, 0.0)
            shares[queue] = Share(f"backfill {c.backfill}", runs[queue], most, c.weight, last)
            shares[pipeline] = Share(f"pipeline {c.pipeline}", runs[pipeline], c.pipeline_most)
            shares[step] = Share(f"step {c.pipeline}/{c.step}", runs[step], c.step_most)
        return shares

    def _take_turns(self, tx: Tx, queues: Collection[str]) -> None:
        if queues:
            tx.run(
                """
                INSERT INTO slot_turn (location_id, queue, served_at)
                SELECT :loc, queue, clock_timestamp() FROM unnest(CAST(:queues AS text[])) AS q(queue)
                ON CONFLICT (location_id, queue) DO UPDATE SET served_at = excluded.served_at
                """,
                loc=self.location,
                queues=sorted(queues),
            )

    def _candidates(self, tx: Tx, busy: Sequence[Any]) -> list[Any]:
        """The first of the PENDING runs that can start; where there is place left, others, to be told why they wait."""
        can_start = """
            p.enabled AND p.paused_by = '' AND s.paused_by = '' AND r.cpu <= :cpu AND r.memory_gb <= :memory_gb
            AND (r.step_id, r.unit_id) NOT IN (SELECT step_id, unit_id FROM coverage WHERE paused_by <> '')
            AND coalesce(r.backfill_id, 0) NOT IN (SELECT id FROM backfill WHERE paused_by <> '')
        """  # NOT IN: both are small, and looked up while the index is read; an anti-join would read the whole backlog
        first = self._first(tx, can_start, busy, CANDIDATES)
        left = CANDIDATES - len(first)
        return [*first, *(self._first(tx, f"NOT ({can_start})", busy, left) if left else ())]

    def _first(self, tx: Tx, which: str, busy: Sequence[Any], most: int) -> Sequence[Any]:
        """Of each step those at the front are read from an index: how many wait behind them costs nothing.

        Queues of equal priority take turns, and what is over a limit of its pipeline or step comes last: a long backlog
        crowds out nobody.
        """
        return tx.all(
            f"""
            WITH busy AS (SELECT * FROM unnest(CAST(:pipelines AS bigint[]), CAST(:steps AS bigint[]),
                CAST(:backfills AS bigint[]), CAST(:runs AS bigint[])) AS b(pipeline_id, step_id, backfill_id, runs)),
            front AS (
                SELECT r.id, r.cpu, r.memory_gb, r.priority, r.waiting_for, r.step_id, p.id AS pipeline_id,
                    p.name AS pipeline, p.weight, p.max_in_flight AS pipeline_most, p.enabled, p.paused_by,
                    s.name AS step, s.max_in_flight AS step_most, s.paused_by AS step_paused_by,
                    r.backfill_id, b.name AS backfill, b.max_in_flight AS backfill_most,
                    coalesce(b.paused_by, '') AS backfill_paused_by, coalesce(c.paused_by, '') AS unit_paused_by,
                    row_number() OVER (PARTITION BY p.id, r.backfill_id, r.priority ORDER BY r.id) AS turn,
                    row_number() OVER (PARTITION BY p.id ORDER BY r.priority DESC, r.id) + coalesce(bp.runs, 0)
                        > p.max_in_flight IS TRUE
                    OR row_number() OVER (PARTITION BY s.id ORDER BY r.priority DESC, r.id) + coalesce(bs.runs, 0)
                        > s.max_in_flight IS TRUE
                    OR row_number() OVER (PARTITION BY b.id ORDER BY r.priority DESC, r.id) + coalesce(bb.runs, 0)
                        > b.max_in_flight IS TRUE AS over
                FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
                LEFT JOIN (SELECT step_id, sum(runs) AS runs FROM busy GROUP BY 1) bs ON bs.step_id = s.id
                LEFT JOIN (SELECT pipeline_id, sum(runs) AS runs FROM busy GROUP BY 1) bp ON bp.pipeline_id = p.id
                CROSS JOIN LATERAL (SELECT * FROM run r
                    WHERE r.location_id = :loc AND r.step_id = s.id AND r.state = 'PENDING' AND {which}
                    ORDER BY r.priority DESC, r.id LIMIT :most) r
                LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (r.step_id, r.unit_id) AND c.paused_by <> ''
                LEFT JOIN backfill b ON b.id = r.backfill_id
                LEFT JOIN (SELECT backfill_id, sum(runs) AS runs FROM busy GROUP BY 1) bb ON bb.backfill_id = b.id)
            SELECT * FROM front ORDER BY over, priority DESC, turn, id LIMIT :most
            """,
            loc=self.location,
            cpu=math.inf if self.limit.cpu is None else self.limit.cpu,
            memory_gb=math.inf if self.limit.memory_gb is None else self.limit.memory_gb,
            pipelines=[b.pipeline_id for b in busy],
            steps=[b.step_id for b in busy],
            backfills=[b.backfill_id for b in busy],
            runs=[b.runs for b in busy],
            most=most,
        )

    def _build(self, tx: Tx, ids: Sequence[int]) -> None:
        """Fix version, command, inputs and directory of admitted runs, and hand them to the workers."""
        if not ids:
            return
        runs = tx.lock_runs(ids, coverage=False)
        stale = self._pin_inputs(tx, list(runs))
        facts = job_facts(tx, list(runs), str(self.settings.pipeline_base_dir))
        moves = []
        for i, run in runs.items():
            if i in stale:
                reason = "its inputs, or its pipeline, changed before it was built"
                sets: dict[str, Any] = {"failure": WITHDRAWN, "message": reason}
                moves.append(Move(run, "withdraw", Actor(self.actor.name, reason), sets=sets))
            else:
                moves.append(Move(run, "build", self.actor, sets={"job": build_spec(facts[i])}))
        tx.move(moves)

    def _pin_inputs(self, tx: Tx, ids: Sequence[int]) -> set[int]:
        """Link the upstream results that runs read; returns the runs that are not wanted any more.

        These no longer give their digest, or something they would use was revoked, or their pipeline has no such step
        or unit any more.
        """
        link_upstream(tx, ids)
        rows = tx.all(
            f"""
            SELECT r.id, r.step_id, r.unit_id, r.wanted, s.active AND u.dims = s.dims AS part, s.fan_in,
                coalesce(part.digest, u.digest) AS digest, coalesce(part.members, u.members) AS members,
                sw.name AS software, sv.version,
                coalesce(cr.hash, '') AS config, sv.state = 'revoked' OR cr.revoked_by <> '' AS revoked,
                us.identity AS step,
                (SELECT coalesce(sum(ur.result), 0) % :modulus
                    FROM run_input i JOIN run ur ON ur.id = i.upstream_run_id
                    WHERE i.run_id = r.id AND ur.step_id = us.id) AS results
            FROM run r JOIN unit u ON u.id = r.unit_id JOIN software_version sv ON sv.id = r.software_version_id
            JOIN reduction_step s ON s.id = r.step_id
            JOIN software sw ON sw.id = sv.software_id LEFT JOIN config_revision cr ON cr.id = r.config_revision_id
            LEFT JOIN step_dependency d ON d.step_id = r.step_id LEFT JOIN reduction_step us ON us.id = d.upstream_id
            LEFT JOIN LATERAL (SELECT coalesce(sum(m.item), 0) % :modulus AS digest, count(*) AS members
                FROM unit_member m WHERE r.subset ->> 'of' = 'packages' AND m.unit_id = r.unit_id
                    AND m.removed IS NULL AND {PACKAGE_READ}) part ON r.subset ->> 'of' = 'packages'
            WHERE r.id = ANY(:ids)
            """,
            modulus=DIGEST_MODULUS,
            ids=list(ids),
        )
        upstream: dict[int, dict[str, int]] = defaultdict(dict)
        for r in rows:
            if r.step is not None:
                upstream[r.id][r.step] = int(r.results)
        revoked = gaps.revoked_results(tx, [(r.step_id, r.unit_id) for r in rows])

        def wanted(r: Any) -> str:
            own = own_members(FanIn(r.fan_in), int(r.digest), r.members)
            now = wanted_digest(*own, upstream[r.id], r.software, r.version, r.config)
            return in_place_of_revoked(now, revoked[r.step_id, r.unit_id])

        return {r.id for r in rows if not r.part or r.revoked or wanted(r) != r.wanted}


def _shares_of(row: Any) -> tuple[str, str, str]:
    """The shares that a run counts in: its queue, its pipeline, its step."""
    queue = f"queue {row.pipeline_id}" if row.backfill_id is None else f"backfill {row.backfill_id}"
    return queue, f"pipeline {row.pipeline_id}", f"step {row.step_id}"


def _pause(row: Any) -> str:
    if not row.enabled:
        return "the pipeline is disabled"
    if row.paused_by:
        return f"pipeline paused by {row.paused_by}"
    if row.step_paused_by:
        return f"step paused by {row.step_paused_by}"
    if row.unit_paused_by:
        return f"unit paused by {row.unit_paused_by}"
    if row.backfill_paused_by:
        return f"backfill {row.backfill} paused by {row.backfill_paused_by}"
    return ""


# --- worker ---


class _Tasked:
    """A role that performs tasks. Its first sweep claims them."""

    runner: TaskRunner
    sweeps: list[Sweep]

    def claim(self, tx: Tx) -> After:
        """Lease what there are threads for."""
        return self.runner.claim(tx)

    def settle(self, tx: Tx, outcomes: Sequence[Outcome]) -> After:
        forget = self.runner.settle(tx, outcomes)
        begin = self.runner.claim(tx)
        again = self.runner.again_in
        if again is not None:
            self.sweeps[0].hasten(again)

        def after() -> None:
            forget()
            begin()

        return after

    @property
    def busy(self) -> bool:
        return self.runner.held > 0

    def stop(self) -> None:
        self.runner.stop()

    def hand_back(self, tx: Tx) -> None:
        self.runner.hand_back(tx)

    def close(self) -> None:
        self.runner.close()


def _owner(name: str) -> str:
    return f"{name}@{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Worker(_Tasked):
    """Performs tasks: stages inputs, submits jobs, collects products, cancels, purges; and kinds from entry points."""

    role = Role.WORKER

    def __init__(
        self, settings: Settings, store: Store, backend: Backend, inbox: queue.SimpleQueue[Any], name: str, slots: int
    ) -> None:
        self.location = settings.processing_location_id
        self.runner = TaskRunner(
            store,
            [*worker_kinds(settings, backend, slots), *foreign_kinds()],
            owner=_owner(name),
            location_id=self.location,
            lease_seconds=settings.lease_seconds,
            max_tries=settings.max_task_tries,
            deliver=inbox.put,
        )
        self.sweeps = [
            Sweep("claim tasks", settings.sweep_seconds, self.claim),
            Sweep("look again", 5.0, look_again(self.role, self.location)),
            Sweep("retention", 60.0, self._retention),
        ]

    def handle(self, tx: Tx, events: Sequence[Event]) -> After:
        return self.runner.claim(tx)

    def _retention(self, tx: Tx) -> After:
        open_purges(tx, self.location)
        return None


# --- result-manager ---


class ResultManager(_Tasked):
    """Follows jobs to their end, and starts retries when their back-off is over."""

    role = Role.RESULT_MANAGER
    actor = Actor(Role.RESULT_MANAGER)

    def __init__(self, settings: Settings, store: Store, backend: Backend, inbox: queue.SimpleQueue[Any]) -> None:
        self.location = settings.processing_location_id
        self.poll_seconds = backend.poll_seconds
        self.runner = TaskRunner(
            store,
            [Poll(settings, backend)],
            owner=_owner(self.role),
            location_id=self.location,
            lease_seconds=settings.lease_seconds,
            max_tries=settings.max_task_tries,
            deliver=inbox.put,
        )
        self.sweeps = [
            Sweep("claim the poll", settings.sweep_seconds, self.claim),
            Sweep("due retries", settings.sweep_seconds, self.retry_due),
            Sweep("look again", 5.0, self._look_again),
        ]

    def handle(self, tx: Tx, events: Sequence[Event]) -> After:
        if any(isinstance(e, AttemptFailed) for e in events):
            self.retry_due(tx)
        # A job that was submitted just now is not over yet: to ask at once would only find that.
        self._poll_in(tx, self.poll_seconds)
        self.sweeps[0].hasten(self.poll_seconds)
        return None

    def _poll_in(self, tx: Tx, seconds: float) -> None:
        """Have the backend asked after so long at the latest."""
        tx.run(
            """
            INSERT INTO task (location_id, kind) VALUES (:loc, :kind)
            ON CONFLICT (kind, location_id) WHERE run_id IS NULL DO UPDATE SET due_at = now() + :wait * interval '1 s'
            WHERE task.state = 'ready' AND task.due_at > now() + :wait * interval '1 s'
            """,
            loc=self.location,
            kind=POLL,
            wait=seconds,
        )

    def _look_again(self, tx: Tx) -> After:
        self._poll_in(tx, 0.0)
        return look_again(self.role, self.location)(tx)

    def retry_due(self, tx: Tx) -> After:
        """Start the next attempt of runs whose back-off is over."""
        ids = [
            r.id
            for r in tx.all(
                "SELECT id FROM run WHERE location_id = :loc AND state = 'RETRY_WAIT' AND due_at <= now()"
                " ORDER BY id LIMIT 500",
                loc=self.location,
            )
        ]
        runs = tx.lock_runs(ids)
        tx.move([Move(r, "retry_due", self.actor, sets=next_attempt(r)) for r in runs.values()])
        return None


def next_attempt(run: RunRow) -> dict[str, Any]:
    """The columns of a run that begins another attempt: nothing of the last one's job remains."""
    return {
        "attempt": run.attempt + 1,
        "job": None,
        "backend": "",
        "handle": "",
        "exit_code": None,
        "wall_seconds": None,
        "cpu_hours": None,
        "peak_memory_gb": None,
        "node": "",
        "evidence": {},
    }
