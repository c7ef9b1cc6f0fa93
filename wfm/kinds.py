"""The tasks that a run needs, in the order of its life: stage, submit, poll, collect, cancel, purge.

Each is a `wfm.tasks.Kind`: set-based reads, an effect without the database, set-based writes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Struct

from wfm.backends import Backend
from wfm.collect import Collected, collect
from wfm.config import Settings
from wfm.decide import MoveFacts, Verdict, backoff, judge
from wfm.errors import HeldError, InputError, OutputError, UnavailableError, WfmError
from wfm.jobs import OUTPUT, WORKSPACE, InputFile, InputProduct, JobFacts, StagePlan, attempt_directory, built_for
from wfm.model import (
    Actor,
    FailureClass,
    JobRef,
    JobSpec,
    JobStatus,
    Probe,
    Report,
    Resources,
    Role,
    RunState,
    TaskKind,
    UpstreamRead,
)
from wfm.schema import PINNED, UNIT_READ, UNITS_INSIDE
from wfm.staging import StagingPolicy, stage
from wfm.store import Move, RunRow, TaskRow, Tx, encode, failed
from wfm.tasks import Kind, Outcome
from wfm.views.quarantine import left_out

WORKER = Actor(Role.WORKER)
RESULT_MANAGER = Actor(Role.RESULT_MANAGER)

POLL = "poll"

MISSING_NAMED = 20
"""So many upstream units that a run does without are named in its manifest."""

NOT_RUNNING = frozenset(
    {JobStatus.CANCELLED, JobStatus.ABSENT, JobStatus.VANISHED, JobStatus.COMPLETED, JobStatus.FAILED}
)
"""Reports after which a job can change nothing any more."""


class _Base:
    """What most kinds share: one task at a time, and it does not repeat."""

    slots = 1
    batch = 1

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self.settings = settings
        self.backend = backend

    def again_in(self, tx: Tx) -> float | None:
        return None

    def retry_in(self, run: RunRow) -> float:
        return backoff(run.failures + 1, self.settings.retry_backoff_seconds, self.settings.retry_backoff_max_seconds)

    def give_up(
        self,
        runs: Mapping[int, RunRow],
        outcomes: Sequence[Outcome],
        actor: Actor,
        classes: Mapping[type, FailureClass],
    ) -> list[Move]:
        """The moves of runs whose task cannot succeed."""
        moves = []
        for o in outcomes:
            assert o.task.run_id is not None
            run = runs[o.task.run_id]
            failure = next((c for t, c in classes.items() if isinstance(o.error, t)), FailureClass.TASK)
            message = f"{o.task.kind}: {o.error}"
            moves.append(failed(run, failure, message, actor, self.retry_in(run)))
        return moves


def _runs_of(tx: Tx, tasks: Sequence[TaskRow], *states: RunState) -> dict[int, RunRow]:
    """By task id, the runs that are still in one of these states, at the task's attempt."""
    ids = [t.run_id for t in tasks if t.run_id is not None]
    runs = tx.find_runs("r.id = ANY(:ids)", limit=len(ids) or 1, ids=ids)
    wanted = {}
    for t in tasks:
        run = runs.get(t.run_id or 0)
        if run and run.state in states and run.attempt == t.attempt:
            wanted[t.id] = run
    return wanted


# --- stage ---


class Stage(_Base):
    """Makes the attempt directory, places and verifies the inputs."""

    name: str = TaskKind.STAGE

    def __init__(self, settings: Settings, backend: Backend, slots: int) -> None:
        super().__init__(settings, backend)
        self.slots = slots
        self.policy = StagingPolicy(
            mode=settings.staging_mode, reserve_bytes=int(settings.staging_reserve_gb * 1_000_000_000)
        )

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, StagePlan]:
        runs = _runs_of(tx, tasks, RunState.STAGING_DATA)
        facts = job_facts(tx, list({r.id for r in runs.values()}), str(self.settings.pipeline_base_dir))
        files = input_files(tx, list(facts))
        products = input_products(tx, list(facts))
        plans = {}
        for task, run in runs.items():
            assert run.job is not None
            step, final = built_for(run.job)
            as_built = msgspec.structs.replace(facts[run.id], step=step, final=final)
            plans[task] = StagePlan(run.job, as_built, tuple(files[run.id]), tuple(products[run.id]))
        return plans

    def perform(self, work: Sequence[StagePlan], alive: Callable[[], bool]) -> Sequence[Any]:
        return [stage(plan, self.policy, alive=alive) for plan in work]

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        staged = {o.task.run_id: runs[o.task.run_id] for o in outcomes if o.task.run_id is not None}
        ready = {i: TaskKind.SUBMIT for i, r in staged.items() if r.state is RunState.STAGING_DATA}
        tx.open_tasks(ready, staged)
        return []

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        return self.give_up(runs, outcomes, WORKER, {InputError: FailureClass.INPUT})


def job_facts(tx: Tx, run_ids: Sequence[int], base: str) -> dict[int, JobFacts]:
    """All that fixes an attempt: names, software, config, resources."""
    rows = tx.all(
        """
        SELECT r.id, r.location_id, r.attempt, r.pipeline_name, r.step_name, s.name AS step, s.final, u.key,
            u."values", sw.name AS software, sv.version, sv.command, s.environment, s.resources, r.upstream,
            coalesce(cr.parameters, '{}') AS parameters, r.missing, r.subset, r.probe_of, r.probe
        FROM run r JOIN reduction_step s ON s.id = r.step_id
        JOIN unit u ON u.id = r.unit_id JOIN software_version sv ON sv.id = r.software_version_id
        JOIN software sw ON sw.id = sv.software_id LEFT JOIN config_revision cr ON cr.id = r.config_revision_id
        WHERE r.id = ANY(:ids)
        """,
        ids=list(run_ids),
    )
    left = left_out(tx.conn, [r.id for r in rows if r.subset])
    return {
        r.id: JobFacts(
            location_id=r.location_id,
            run_id=r.id,
            attempt=r.attempt,
            pipeline=r.pipeline_name,
            made_as=r.step_name,
            step=r.step,
            final=r.final,
            unit_key=r.key,
            unit_values=r.values,
            software=r.software,
            version=r.version,
            command=tuple(r.command),
            environment=r.environment,
            resources=msgspec.convert(r.resources, Resources),
            config_parameters=r.parameters,
            missing=tuple(r.missing),
            base_directory=base,
            python=sys.executable,
            upstream=msgspec.convert(r.upstream, tuple[UpstreamRead, ...]),
            quarantined=tuple(left.get(r.id, ())),
            probe_of=r.probe_of,
            probe=msgspec.convert(r.probe, Probe | None),
        )
        for r in rows
    }


def link_upstream(tx: Tx, run_ids: Sequence[int]) -> None:
    """Fix which upstream results runs read: those that coverage rests on now, of the attempt that made them.

    No step of their pipelines can be renamed until this transaction ends: the names of a job's own directory and of
    those it reads are asked for by several statements, and must tell them apart.
    """
    tx.run(
        "SELECT 1 FROM reduction_step WHERE pipeline_id IN (SELECT pipeline_id FROM run WHERE id = ANY(:ids))"
        " ORDER BY id FOR KEY SHARE",
        ids=list(run_ids),
    )
    tx.run("DELETE FROM run_input WHERE run_id = ANY(:ids)", ids=list(run_ids))
    tx.run(
        f"""
        INSERT INTO run_input (run_id, upstream_run_id, upstream_attempt, step_name)
        SELECT r.id, c.run_id, cr.attempt, us.name
        FROM run r JOIN reduction_step s ON s.id = r.step_id JOIN unit u ON u.id = r.unit_id
        JOIN step_dependency d ON d.step_id = r.step_id JOIN reduction_step us ON us.id = d.upstream_id
        CROSS JOIN LATERAL ({UNITS_INSIDE}) l
        JOIN coverage c ON (c.step_id, c.unit_id) = (us.id, l.id) AND c.counts
        JOIN run cr ON cr.id = c.run_id
        WHERE r.id = ANY(:ids) AND {UNIT_READ}
        """,
        ids=list(run_ids),
    )
    # What is missing follows from what was linked, not from coverage, which others may have changed in between.
    tx.run(
        f"""
        UPDATE run SET upstream = z.upstream
        FROM (
            SELECT r.id, jsonb_agg(jsonb_build_object('step', us.name, 'units', n.units, 'read', n.read,
                'missing', coalesce(n.missing, '{{}}')) ORDER BY us.position) AS upstream
            FROM run r JOIN reduction_step s ON s.id = r.step_id JOIN unit u ON u.id = r.unit_id
            JOIN step_dependency d ON d.step_id = r.step_id JOIN reduction_step us ON us.id = d.upstream_id
            CROSS JOIN LATERAL (
                SELECT count(*) AS units, count(ur.id) AS read,
                    (array_agg(l.key ORDER BY l.key) FILTER (WHERE ur.id IS NULL))[1:{MISSING_NAMED}] AS missing
                FROM ({UNITS_INSIDE}) l LEFT JOIN (run_input i JOIN run ur ON ur.id = i.upstream_run_id)
                    ON i.run_id = r.id AND (ur.step_id, ur.unit_id) = (us.id, l.id)) n
            WHERE r.id = ANY(:ids) AND s.fan_in = 'any' GROUP BY r.id) z
        WHERE run.id = z.id
        """,
        ids=list(run_ids),
    )


def input_files(tx: Tx, run_ids: Sequence[int]) -> dict[int, list[InputFile]]:
    """By run, the raw data files of steps that depend on no other, as the pinned generation had them.

    Raises:
        InputError: a package was registered with other content since.
    """
    rows = tx.all(
        f"""
        SELECT r.id, p.name AS package, p.item <> m.item AS changed, f.name, f.size, f.checksum, c.places
        FROM run r JOIN unit_member m ON {PINNED}
        JOIN raw_data_package p ON p.id = m.package_id JOIN raw_data_file f ON f.package_id = p.id
        LEFT JOIN LATERAL (
            SELECT jsonb_agg(jsonb_build_array(l.name, l.root, pc.path) ORDER BY l.priority DESC, l.id) AS places
            FROM physical_copy pc JOIN data_location l ON l.id = pc.location_id
            WHERE pc.package_id = p.id AND pc.status IN ('present', 'staged') AND l.storage = 'disk') c ON true
        WHERE r.id = ANY(:ids) AND NOT EXISTS (SELECT 1 FROM step_dependency d WHERE d.step_id = r.step_id)
        ORDER BY r.id, p.name, f.name
        """,
        ids=list(run_ids),
    )
    found: dict[int, list[InputFile]] = defaultdict(list)
    for r in rows:
        if r.changed:
            raise InputError(f"package {r.package} was registered with other content after run {r.id} was made")
        file = InputFile(
            package=r.package,
            name=r.name,
            size=r.size,
            checksum=r.checksum,
            sources=tuple(os.path.join(root, path, r.name) for _, root, path in r.places or ()),
            roots={location: root for location, root, _ in r.places or ()},
        )
        found[r.id].append(file)
    return found


def input_products(tx: Tx, run_ids: Sequence[int]) -> dict[int, list[InputProduct]]:
    """By run, the products of the upstream runs it reads, by their path below what was the step's output directory.

    Of a run that was made when its step was final these lie elsewhere, and are of any type.
    """
    rows = tx.all(
        """
        SELECT i.run_id, ur.id AS upstream_id, i.step_name AS step, u.key AS unit, dp.type, dp.path, dp.size,
            dp.checksum, pc.path AS place
        FROM run_input i JOIN run ur ON ur.id = i.upstream_run_id JOIN reduction_step s ON s.id = ur.step_id
        JOIN unit u ON u.id = ur.unit_id JOIN data_product dp ON dp.run_id = ur.id
            AND dp.attempt = i.upstream_attempt AND dp.type <> 'LOG'
        JOIN physical_copy pc ON pc.product_id = dp.id AND pc.location_id = ur.location_id
        WHERE i.run_id = ANY(:ids) ORDER BY i.run_id, s.position, u.key, dp.path
        """,
        ids=list(run_ids),
    )
    found: dict[int, list[InputProduct]] = defaultdict(list)
    for r in rows:
        found[r.run_id].append(
            InputProduct(
                run_id=r.upstream_id,
                step=r.step,
                unit=r.unit,
                type=r.type,
                name=re.sub(f"^({WORKSPACE}/[^/]+|{OUTPUT})/", "", r.path),
                path=r.place,
                size=r.size,
                checksum=r.checksum,
            )
        )
    return found


# --- submit ---


class Submit(_Base):
    """Hands jobs to the backend; one that is there already by name is adopted, not repeated."""

    name: str = TaskKind.SUBMIT
    batch = 200

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, JobSpec]:
        return {task: run.job for task, run in _runs_of(tx, tasks, RunState.STAGING_DATA).items() if run.job}

    def perform(self, work: Sequence[JobSpec], alive: Callable[[], bool]) -> Sequence[Any]:
        if not alive():
            raise UnavailableError("the lease was lost before the submission")
        submitted = self.backend.submit(work)
        return [submitted[spec.name] for spec in work]

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        return [
            Move(runs[o.task.run_id], "submit", WORKER, sets={"backend": self.backend.name, "handle": o.value.handle})
            for o in outcomes
            if o.task.run_id is not None
        ]

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        moves = []
        for o in outcomes:
            assert o.task.run_id is not None
            run = runs[o.task.run_id]
            if isinstance(o.error, WfmError) and not isinstance(o.error, UnavailableError):
                moves.append(failed(run, FailureClass.REJECTED, f"submit: {o.error}", WORKER, self.retry_in(run)))
            else:
                # The job may be on its way. Who follows jobs asks for it by name, and fences it before another attempt.
                actor = Actor(WORKER.name, f"not known whether it was submitted: {o.error}")
                moves.append(Move(run, "submit", actor, sets={"backend": self.backend.name}))
        return moves


# --- poll ---


class _Look(Struct, frozen=True):
    runs: list[RunRow]


class Poll(_Base):
    """Asks the backend about all jobs of the location in one question; a leased task, so copies of a role share it."""

    name: str = POLL

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, _Look]:
        runs = tx.find_runs(
            "r.location_id = :loc AND r.state IN ('SUBMITTED', 'RUNNING')",
            limit=100_000,
            loc=self.settings.processing_location_id,
        )
        return {t.id: _Look(list(runs.values())) for t in tasks}

    def perform(self, work: Sequence[_Look], alive: Callable[[], bool]) -> Sequence[Any]:
        return [{r.id: (r, report) for r, report in self._look(look.runs)} for look in work]

    def _look(self, runs: Sequence[RunRow]) -> list[tuple[RunRow, Report]]:
        if not runs:
            return []
        reports = dict(self.backend.poll([r.ref for r in runs]))
        lost = [r for r in runs if r.ref.name in reports and self._verdict(r, reports[r.ref.name]).lost]
        if lost:
            # Another attempt may begin only when this one can neither begin nor go on: fence it, then look once more.
            gone = (JobStatus.CANCELLED, JobStatus.ABSENT, JobStatus.VANISHED)
            fenced = self.backend.cancel([r.ref for r in lost])
            reports |= {name: report for name, report in fenced.items() if report.status not in gone}
        return [(r, reports[r.ref.name]) for r in runs if r.ref.name in reports]

    def _verdict(self, run: RunRow, report: Report) -> Verdict:
        return judge(run.state, report, run.seconds_in_state, self.settings.vanish_grace_seconds)

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        seen: dict[int, tuple[RunRow, Report]] = {i: pair for o in outcomes for i, pair in o.value.items()}
        verdicts = {i: self._verdict(run, report) for i, (run, report) in seen.items()}
        acting = [i for i, v in verdicts.items() if v.trigger]
        moves = []
        for i, run in tx.lock_runs(acting).items():
            was, report = seen[i]
            if (run.version, run.attempt) != (was.version, was.attempt):
                continue  # it moved on while the backend was asked
            verdict = verdicts[i]
            sets = _measured(report)
            if verdict.trigger == "fail":
                assert verdict.failure is not None
                moves.append(failed(run, verdict.failure, verdict.message, RESULT_MANAGER, self.retry_in(run), **sets))
            else:
                facts = MoveFacts(exit_record=report.exit_code is not None)
                moves.append(Move(run, str(verdict.trigger), RESULT_MANAGER, facts, sets))
        return moves

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        return []

    def again_in(self, tx: Tx) -> float | None:
        """Soon while jobs are young, seldom when all are old; not before somebody submits when there is none."""
        row = tx.all(
            "SELECT count(*) AS jobs, extract(epoch FROM now() - max(state_since))::float AS youngest FROM run"
            " WHERE location_id = :loc AND state IN ('SUBMITTED', 'RUNNING')",
            loc=self.settings.processing_location_id,
        )[0]
        if not row.jobs:
            return self.settings.reconcile_seconds
        return float(min(max(self.backend.poll_seconds, row.youngest / 10), self.settings.poll_max_seconds))


def _measured(report: Report) -> dict[str, Any]:
    return {
        "exit_code": report.exit_code,
        "wall_seconds": report.wall_seconds,
        "cpu_hours": report.cpu_hours,
        "peak_memory_gb": report.peak_memory_gb,
        "node": report.node,
        "evidence": report.evidence,
    } | ({"handle": report.handle} if report.handle else {})


# --- collect ---


class _Collection(Struct, frozen=True):
    directory: str
    step: str
    final: bool


class Collect(_Base):
    """Registers what a job left behind, with its lineage; older results of the unit are superseded."""

    name: str = TaskKind.COLLECT

    def __init__(self, settings: Settings, backend: Backend, slots: int) -> None:
        super().__init__(settings, backend)
        self.slots = slots

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, _Collection]:
        return {
            task: _Collection(run.job.directory, *built_for(run.job))
            for task, run in _runs_of(tx, tasks, RunState.COLLECTING_RESULTS).items()
            if run.job
        }

    def perform(self, work: Sequence[_Collection], alive: Callable[[], bool]) -> Sequence[Any]:
        return [collect(w.directory, step=w.step, final=w.final, alive=alive) for w in work]

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        mine = [(runs[o.task.run_id], o.value) for o in outcomes if o.task.run_id is not None]
        mine = [(run, value) for run, value in mine if run.state is RunState.COLLECTING_RESULTS]
        # What a part of a unit gave is no result: it lies there as long as the directory does, and counts for nothing.
        _register(tx, [(run, value) for run, value in mine if run.probe_of is None])
        return [
            Move(run, "collect", Actor(WORKER.name, "; ".join(found.warnings)), sets={"message": "", "failure": ""})
            for run, found in mine
        ]

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        classes: dict[type, FailureClass] = {InputError: FailureClass.INPUT, OutputError: FailureClass.OUTPUT}
        return self.give_up(runs, outcomes, WORKER, classes)


def _register(tx: Tx, found: Sequence[tuple[RunRow, Collected]]) -> None:
    rows = [
        {
            "run": run.id,
            "attempt": run.attempt,
            "loc": run.location_id,
            "dir": run.ref.directory,
            "type": p.type,
            "path": p.path,
            "size": p.size,
            "checksum": p.checksum,
            "metrics": p.metrics,
        }
        for run, collected in found
        for p in collected.products
    ]
    tx.run(
        """
        WITH given AS (
            SELECT * FROM jsonb_to_recordset(CAST(:rows AS jsonb)) AS p(run bigint, attempt int, loc bigint, dir text,
                type text, path text, size bigint, checksum text, metrics jsonb)),
        made AS (
            INSERT INTO data_product (run_id, attempt, type, path, size, checksum, metrics)
            SELECT run, attempt, type, path, size, checksum, metrics FROM given
            RETURNING id, run_id, path)
        INSERT INTO physical_copy (location_id, product_id, path)
        SELECT g.loc, m.id, g.dir || '/' || g.path FROM made m JOIN given g ON (g.run, g.path) = (m.run_id, m.path)
        """,
        rows=encode(rows),
    )
    # What counts is the generation of the inputs, not who finished last: ids of one unit's runs grow with it, and
    # within a run the number of the attempt.
    tx.run(
        """
        WITH older AS MATERIALIZED (
            SELECT o.id, n.id AS newer, n.attempt FROM run n
            JOIN run o ON (o.step_id, o.unit_id) = (n.step_id, n.unit_id)
            WHERE n.id = ANY(:ids))
        UPDATE data_product d SET superseded_by = older.newer FROM older
        WHERE d.run_id = older.id AND (d.run_id, d.attempt) < (older.newer, older.attempt)
            AND d.superseded_by IS NULL
        """,
        ids=[run.id for run, _ in found],
    )


# --- cancel ---


class Cancel(_Base):
    """Forbids the job to start, stops it if it runs, and waits until the backend confirms."""

    name: str = TaskKind.CANCEL
    slots = 2

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, JobRef]:
        return {task: run.ref for task, run in _runs_of(tx, tasks, RunState.CANCELLING).items()}

    def perform(self, work: Sequence[JobRef], alive: Callable[[], bool]) -> Sequence[Any]:
        for job in work:
            os.makedirs(job.directory, exist_ok=True)  # a mark can stand where nothing was staged yet
        reports = self.backend.cancel(work)
        return [
            reports[job.name]
            if reports[job.name].status in NOT_RUNNING
            else HeldError(f"the job is still {reports[job.name].status}", retry_in=1.0)
            for job in work
        ]

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        return [
            Move(runs[o.task.run_id], "confirm_cancel", WORKER, sets=_measured(o.value))
            for o in outcomes
            if o.task.run_id is not None
        ]

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        # A job that may still run must not be called cancelled: the owner looks again later.
        return []


# --- purge ---


class Purge(_Base):
    """Removes the attempt directories of results that nobody needs any more."""

    name: str = TaskKind.PURGE

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, list[str]]:
        runs = _runs_of(tx, tasks, RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)
        base = str(self.settings.pipeline_base_dir)
        return {
            task: [
                attempt_directory(base, run.pipeline_name, run.step_name, run.unit, run.id, n)
                for n in range(1, run.attempt + 1)
            ]
            for task, run in runs.items()
        }

    def perform(self, work: Sequence[list[str]], alive: Callable[[], bool]) -> Sequence[Any]:
        for directories in work:
            for directory in directories:
                with suppress(FileNotFoundError):
                    shutil.rmtree(directory)
        return [None] * len(work)

    def succeeded(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        tx.run(
            """
            UPDATE physical_copy c SET status = 'deleted' FROM data_product d
            JOIN unnest(CAST(:runs AS bigint[]), CAST(:attempts AS int[])) AS p(run, attempt)
                ON d.run_id = p.run AND d.attempt <= p.attempt
            WHERE d.id = c.product_id
            """,
            runs=[o.task.run_id for o in outcomes],
            attempts=[o.task.attempt for o in outcomes],
        )
        return []

    def failed(self, tx: Tx, runs: Mapping[int, RunRow], outcomes: Sequence[Outcome]) -> Sequence[Move]:
        return []


def open_purges(tx: Tx, location_id: int, limit: int = 200) -> None:
    """Make purge tasks for ended runs past their step's retention whose results were superseded, or that have none."""
    found = tx.find_runs(
        """
        r.location_id = :loc AND r.finished_at < now() - s.retention_days * interval '1 day' AND r.job IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM data_product d WHERE d.run_id = r.id AND d.superseded_by IS NULL)
        AND NOT EXISTS (SELECT 1 FROM task t WHERE t.run_id = r.id AND t.kind = 'purge' AND t.attempt = r.attempt)
        AND NOT EXISTS (SELECT 1 FROM run_input i JOIN run d ON d.id = i.run_id
            WHERE i.upstream_run_id = r.id AND d.finished_at IS NULL)
        """,
        limit=limit,
        loc=location_id,
    )
    # Locked, and looked at once more: somebody may have begun another attempt on what this one left.
    runs = {i: r for i, r in tx.lock_runs(list(found), coverage=False).items() if r.version == found[i].version}
    tx.open_tasks(dict.fromkeys(runs, TaskKind.PURGE), runs)


def worker_kinds(settings: Settings, backend: Backend, concurrency: int) -> list[Kind]:
    """The kinds a worker performs. Cancel has threads of its own, so that long staging never blocks it."""
    return [
        Cancel(settings, backend),
        Submit(settings, backend),
        Stage(settings, backend, concurrency),
        Collect(settings, backend, concurrency),
        Purge(settings, backend),
    ]
