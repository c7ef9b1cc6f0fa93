"""`wfm try`: one step on real inputs in a scratch directory, for authors of reduction software."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from msgspec import Struct

from wfm.cli import context, output
from wfm.cli.runs import print_from
from wfm.errors import InputError, NotFoundError, OutputError, UsageError
from wfm.model import JobStatus, Report, RunState, VersionPolicy, Why

if TYPE_CHECKING:
    from wfm.collect import Collected
    from wfm.config import Settings
    from wfm.jobs import InputFile, InputProduct, JobFacts, StagePlan
    from wfm.model import JobSpec
    from wfm.store import Tx

POLL_SECONDS = 0.1


class Trial(Struct, frozen=True, kw_only=True):
    """What came of a trial.

    Attributes:
        directory: the attempt directory. version: of the software. report: how the job ended.
        collected: what would be registered; None if `fault` says why nothing would.
    """

    directory: str
    software: str
    version: str
    report: Report
    collected: Collected | None
    fault: str


@click.command("try")
@click.argument("target", metavar="PIPELINE/STEP")
@click.argument("unit")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Work below it; else in a new one.")
@click.option("--command", metavar="TEXT", help="Run this instead of the command of the software's version.")
@output.as_json
def try_(target: str, unit: str, directory: Path | None, command: str | None, as_json: bool) -> None:
    """Run one step on real inputs in a scratch directory, on this machine. Registers nothing.

    For authors of reduction software: stages the unit's present inputs, runs the newest version that the step's policy
    allows, and says what would be registered. Ends with 1 if the software failed or broke the contract.

    \b
    Example:  wfm try ngc253-co/calibrate 0142
              wfm try ngc253-co/map ngc253-co43 --command "python work/map.py --quick"
    """
    pipeline, step = context.split(target)
    if step is None:
        raise UsageError(f"name a step: {pipeline}/STEP; `wfm get pipeline {pipeline}` shows them")
    with context.deployment() as d:
        with d.read() as tx:
            found = _inputs(tx, d, pipeline, step, unit)
            tx.conn.rollback()
        plan = _plan(found, directory or Path(tempfile.mkdtemp(prefix="wfm-try-")), shlex.split(command or ""))
        _stage(plan, d.settings)
    report = _execute(plan.spec, log_to_stderr=as_json)
    trial = _judged(plan, report)
    if as_json:
        output.document(trial)
    else:
        _show(trial)
    if trial.fault:
        click.get_current_context().exit(1)


class _Found(Struct, frozen=True):
    """What a run would work on."""

    facts: JobFacts
    files: tuple[InputFile, ...]
    products: tuple[InputProduct, ...]


def _inputs(tx: Tx, d: context.Deployment, pipeline: str, step: str, unit: str) -> _Found:
    """What a run of this unit would work on now.

    The run is written, and the caller takes it back: so the same statements read it as read every run.
    """
    from wfm import views
    from wfm.decide import SoftwareVersion, choose_version
    from wfm.kinds import input_files, input_products, job_facts, link_upstream

    unit = str(context.full_key(tx, pipeline, unit))
    (why,) = views.why(tx.conn, pipeline=pipeline, step=step, unit=unit, location_id=d.location)
    if why.why in (Why.UPSTREAM, Why.UPSTREAM_FAILED):
        output.warn(f"not all inputs are there: {why.reason}")
    (s,) = tx.all(
        """
        SELECT s.id, s.software_id, s.version_policy, s.version FROM reduction_step s
        JOIN pipeline p ON p.id = s.pipeline_id WHERE p.name = :pipeline AND s.name = :step
        """,
        pipeline=pipeline,
        step=step,
    )
    known = tx.all("SELECT id, version, state FROM software_version WHERE software_id = :id", id=s.software_id)
    versions = [SoftwareVersion(v.id, v.version, v.state) for v in known]
    version, fault = choose_version(VersionPolicy(s.version_policy), s.version, versions)
    if version is None:
        raise NotFoundError(f"{pipeline}/{step}: {fault}")
    ((run,),) = tx.all(
        """
        INSERT INTO run (location_id, pipeline_id, pipeline_name, step_id, step_name, unit_id, generation, wanted,
            result, software_version_id, config_revision_id, cpu, memory_gb, state, chart_version, finished_at)
        SELECT p.location_id, p.id, p.name, s.id, s.name, u.id, u.generation, '', 0, :version,
            (SELECT c.id FROM config_revision c WHERE c.config_id = s.config_id ORDER BY c.revision DESC LIMIT 1),
            0, 0, :state, :chart, now()
        FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id
        JOIN unit u ON u.pipeline_id = p.id AND u.dims = s.dims WHERE s.id = :step AND u.key = :unit RETURNING id
        """,
        version=version.id,
        state=RunState.CANCELLED,
        chart=tx.chart.version,
        step=s.id,
        unit=unit,
    )
    link_upstream(tx, [run])
    files, products = input_files(tx, [run])[run], input_products(tx, [run])[run]
    if not files and not products:
        raise InputError(f"{pipeline}/{step} has no input for {unit} now: {why.reason}")
    return _Found(job_facts(tx, [run], "")[run], tuple(files), tuple(products))


def _plan(found: _Found, base: Path, command: list[str]) -> StagePlan:
    """The trial as a job. Its run has the id 0, which no run has."""
    from wfm.jobs import StagePlan, build_spec

    facts = msgspec.structs.replace(
        found.facts, run_id=0, base_directory=str(base.absolute()), command=tuple(command) or found.facts.command
    )
    return StagePlan(build_spec(facts), facts, found.files, found.products)


def _stage(plan: StagePlan, settings: Settings) -> None:
    from wfm.staging import StagingPolicy, stage

    shutil.rmtree(plan.spec.directory, ignore_errors=True)  # of the trial before
    policy = StagingPolicy(settings.staging_mode, int(settings.staging_reserve_gb * 1e9))
    total = sum(f.size for f in plan.files) + sum(p.size for p in plan.products)
    with output.progress("staging", total, in_bytes=True) as advance:
        stage(plan, policy, progress=advance)


def _execute(spec: JobSpec, *, log_to_stderr: bool) -> Report:
    """Run the job to its end, and show what it says meanwhile."""
    from wfm.backends.local import LocalBackend

    backend = LocalBackend()
    job = backend.submit([spec])[spec.name]
    if isinstance(job, Exception):
        raise job
    log, end = Path(backend.logs(job)), 0
    try:
        while True:
            report = backend.poll([job])[job.name]
            end = print_from(log, end, err=log_to_stderr)
            if report.status not in (JobStatus.PENDING, JobStatus.RUNNING, JobStatus.UNKNOWN):
                return report
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        backend.cancel([job])
        raise
    finally:
        backend.close()


def _judged(plan: StagePlan, report: Report) -> Trial:
    from wfm.collect import collect

    collected, fault = None, ""
    if report.status is JobStatus.COMPLETED:
        try:
            collected = collect(plan.spec.directory, step=plan.facts.step, final=plan.facts.final)
        except (InputError, OutputError) as e:
            fault = str(e)
    else:
        fault = report.reason or f"the job is {report.status}"
    return Trial(
        directory=plan.spec.directory,
        software=plan.facts.software,
        version=plan.facts.version,
        report=report,
        collected=collected,
        fault=fault,
    )


def _show(t: Trial) -> None:
    click.echo()
    output.facts(
        [
            ("software", f"{t.software} {t.version}"),
            ("directory", t.directory),
            ("exit code", t.report.exit_code),
            ("took", output.span(t.report.wall_seconds)),
            ("fault", t.fault),
        ]
    )
    if t.collected is not None:
        for warning in t.collected.warnings:
            output.warn(warning)
        click.echo()
        products = [(p.type, output.size(p.size), p.path) for p in t.collected.products]
        output.table(("TYPE", "SIZE", "WOULD BE REGISTERED"), products, empty="nothing would be registered")
