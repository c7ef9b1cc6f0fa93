"""What people read, on a small believable observatory in a real Postgres."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
from sqlalchemy import Connection, Engine, Table, insert, text
from sqlalchemy import event as sa_event

from tests.harness import wait_until
from tests.services import Servers
from wfm import schema, views
from wfm.charts import Chart, parse
from wfm.decide import GUARDS
from wfm.errors import NotFoundError, UsageError
from wfm.events import RUN_EVENTS
from wfm.model import CoverageState, ProductType, RunState, TaskKind, Why
from wfm.store import WITHDRAWN, connect
from wfm.views import LineageKind, LineageNode

CHART_FILE = Path(__file__).parents[2] / "statecharts" / "run-1.yaml"
CHART = parse(CHART_FILE.read_text(), source="run.yaml", guards=GUARDS, events=RUN_EVENTS)
CHARTS = {CHART.version: CHART}

COMPLETED = ("STAGING_DATA", "SUBMITTED", "RUNNING", "COLLECTING_RESULTS", "COMPLETED")
PATHS: dict[RunState, tuple[str, ...]] = {
    RunState.PENDING: (),
    RunState.STAGING_DATA: COMPLETED[:1],
    RunState.SUBMITTED: COMPLETED[:2],
    RunState.RUNNING: COMPLETED[:3],
    RunState.COLLECTING_RESULTS: COMPLETED[:4],
    RunState.COMPLETED: COMPLETED,
    RunState.RETRY_WAIT: (*COMPLETED[:3], "RETRY_WAIT"),
    RunState.FAILED: (*COMPLETED[:3], "FAILED"),
    RunState.CANCELLING: (*COMPLETED[:2], "CANCELLING"),
    RunState.CANCELLED: (*COMPLETED[:2], "CANCELLING", "CANCELLED"),
}
SCAN, SOURCE, LINE, ALL = '["executed_obs_unit"]', '["source"]', '["line"]', "[]"


class Observatory:
    """Rows as the roles would have left them."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        add = self.add
        site = add(schema.site, name="site")
        self.cologne = add(schema.data_location, site_id=site, name="cologne", type="processing", root="/data")
        self.archive = add(schema.data_location, site_id=site, name="archive", type="long_term_archive", root="/arc")
        camera = add(schema.instrument, name="CHAI")
        self.module = add(schema.instrument_module, instrument_id=camera, name="LFA")
        self.obs_units = {
            name: add(schema.obs_unit, name=name, source_id=add(schema.source, name=name)) for name in ("NGC253", "M51")
        }
        software = add(schema.software, name="reduce")
        self.software = software
        self.version = add(schema.software_version, software_id=software, version="2.1.0")
        config = add(schema.config, name="gains")
        self.revision = add(
            schema.config_revision, config_id=config, revision=3, parameters={"gain": 1.5}, hash="c0ffee"
        )
        self.config = config
        ngc253 = add(
            schema.data_grouping,
            name="ngc253",
            rules=[
                {"table": "raw_data_package", "column": "state", "operator": "eq", "value": "archived"},
                {"table": "source", "column": "name", "operator": "eq", "value": "NGC253"},
            ],
        )
        everything = add(schema.data_grouping, name="everything", rules=[])
        self.pipelines = {
            "maps": self.pipeline("maps", ngc253, priority=5),
            "quick": self.pipeline("quick", everything),
        }
        self.steps: dict[str, int] = {}
        self.step("maps", "calibrate", SCAN, config_id=config)
        self.step("maps", "map", SOURCE, after=("calibrate",), final=True)
        self.step("quick", "look", ALL, final=True)
        self.units: dict[str, int] = {}
        for name in ("scan-1", "scan-2", "scan-3"):
            self.unit("maps", SCAN, name)
        self.unit("maps", SOURCE, "ngc253", holds=("scan-1", "scan-2", "scan-3"))
        self.unit("quick", ALL, "all")
        self.packages: dict[str, int] = {}
        for name, scan in (("p1", "scan-1"), ("p2", "scan-1"), ("p3", "scan-2"), ("p4", "scan-3")):
            self.package(name, scan, "ngc253", "all")

    def on(self, conn: Connection) -> Self:
        """The same, to be changed through another connection."""
        other = copy(self)
        other.conn, other.steps, other.units, other.packages = conn, {**self.steps}, {**self.units}, {**self.packages}
        return other

    def add(self, table: Table, **values: Any) -> int:
        return int(self.conn.execute(insert(table).values(**values).returning(table.c.id)).scalar_one())

    def set(self, table: Table, key: int, **values: Any) -> None:
        self.conn.execute(table.update().where(table.c.id == key).values(**values))

    # --- what to do ---

    def pipeline(self, name: str, grouping: int, **more: Any) -> int:
        more = {"location_id": self.cologne, **more}
        return self.add(schema.pipeline, name=name, grouping_id=grouping, **more)

    def step(self, pipeline: str, name: str, dims: str, *, after: Sequence[str] = (), **more: Any) -> int:
        step = self.add(
            schema.reduction_step,
            pipeline_id=self.pipelines[pipeline],
            name=name,
            identity=name,
            position=len(self.steps),
            group_by=msgspec.json.decode(dims),
            dims=dims,
            software_id=self.software,
            version="2.0.0",
            final=more.pop("final", False),
            **more,
        )
        self.steps[name] = step
        for upstream in after:
            values = {"step_id": step, "upstream_id": self.steps[upstream]}
            self.conn.execute(insert(schema.step_dependency).values(**values))
        return step

    # --- what is there ---

    def unit(self, pipeline: str, dims: str, key: str, holds: Sequence[str] = ()) -> int:
        unit = self.add(schema.unit, pipeline_id=self.pipelines[pipeline], dims=dims, key=key)
        self.units[key] = unit
        for lower in holds:
            self.conn.execute(insert(schema.unit_edge).values(upper_id=unit, lower_id=self.units[lower]))
        return unit

    def package(self, name: str, *units: str, source: str = "NGC253", **more: Any) -> int:
        scan = self.add(schema.executed_obs_unit, name=f"scan of {name}", obs_unit_id=self.obs_units[source])
        package = self.add(
            schema.raw_data_package,
            name=name,
            executed_obs_unit_id=scan,
            instrument_module_id=self.module,
            size=1000,
            **more,
        )
        self.packages[name] = package
        self.add(schema.raw_data_file, package_id=package, name="a.fits", size=1000, checksum="sha256:00")
        self.add(schema.physical_copy, location_id=self.archive, package_id=package, path=name)
        for unit in units:
            self.join(name, unit)
        return package

    def join(self, package: str, unit: str) -> None:
        """One more member, in a new generation of the unit."""
        self.conn.execute(
            text("UPDATE unit SET generation = generation + 1, members = members + 1 WHERE id = :id"),
            {"id": self.units[unit]},
        )
        self.conn.execute(
            text(
                "INSERT INTO unit_member (unit_id, package_id, added) SELECT id, :p, generation FROM unit WHERE id = :u"
            ),
            {"p": self.packages[package], "u": self.units[unit]},
        )

    def leave(self, package: str, unit: str) -> None:
        self.conn.execute(
            text("UPDATE unit SET generation = generation + 1, members = members - 1 WHERE id = :id"),
            {"id": self.units[unit]},
        )
        self.conn.execute(
            text(
                "UPDATE unit_member SET removed = generation FROM unit"
                " WHERE unit.id = unit_id AND unit_id = :u AND package_id = :p AND removed IS NULL"
            ),
            {"p": self.packages[package], "u": self.units[unit]},
        )
        self.conn.execute(
            text("DELETE FROM unit_edge e USING unit u WHERE u.id = e.lower_id AND u.id = :u AND u.members = 0"),
            {"u": self.units[unit]},
        )

    # --- what was done ---

    def run(
        self, step: str, unit: str, state: str, *, reads: Sequence[int] = (), accept: bool = False, **more: Any
    ) -> int:
        """A run that came to its state along the chart, with its history, events and tasks."""
        path = ("PENDING", *PATHS[RunState(state)])
        pipeline = "quick" if step == "look" else "maps"
        final = {"finished_at": datetime.now(UTC)} if state in ("COMPLETED", "FAILED", "CANCELLED") else {}
        unit_row = self.conn.execute(schema.unit.select().where(schema.unit.c.id == self.units[unit])).one()
        run = self.add(
            schema.run,
            **{
                "location_id": self.cologne,
                "pipeline_id": self.pipelines[pipeline],
                "pipeline_name": pipeline,
                "step_id": self.steps[step],
                "step_name": step,
                "unit_id": self.units[unit],
                "generation": unit_row.generation,
                "wanted": "w",
                "result": 1,
                "software_version_id": self.version,
                "config_revision_id": self.revision if step == "calibrate" else None,
                "cpu": 2.0,
                "memory_gb": 4.0,
                "state": state,
                "version": len(path),
                "chart_version": CHART.version,
                **final,
                **more,
            },
        )
        source = ""
        for version, dest in enumerate(path, 1):
            moves = [t.trigger for t in CHART.transitions if (t.source, t.dest) == (source, dest)]
            self.conn.execute(
                insert(schema.transition).values(
                    run_id=run,
                    version=version,
                    attempt=more.get("attempt", 1),
                    trigger=moves[0] if moves else "create",
                    source=source,
                    dest=dest,
                    chart_version=CHART.version,
                    actor="worker",
                )
            )
            for emit in CHART.states[dest].emits:
                self.event(emit.event, emit.to or "", run, version, pipeline=pipeline, step=step, unit=unit)
            source = dest
        if len(path) > 1:
            self.add(schema.task, location_id=self.cologne, kind=TaskKind.STAGE, run_id=run, state="done")
        for upstream in reads:
            self.conn.execute(insert(schema.run_input).values(run_id=run, upstream_run_id=upstream, step_name="x"))
        if accept:
            self.cover(step, unit, "covered", "covered", f"run {run}", run_id=run, result=1, wanted="w")
        return run

    def cover(self, step: str, unit: str, state: str, why: str, reason: str = "because", **more: Any) -> None:
        key = {"step_id": self.steps[step], "unit_id": self.units[unit]}
        self.conn.execute(schema.coverage.delete().filter_by(**key))
        values = {"state": state, "why": why, "reason": reason, "wanted": "w", **more}
        self.conn.execute(insert(schema.coverage).values(**key, **values))

    def product(self, run: int, path: str, type: ProductType = ProductType.INTERMEDIATE, **more: Any) -> int:
        product = self.add(
            schema.data_product, run_id=run, attempt=1, type=type, path=path, size=10, checksum="sha256:11", **more
        )
        place = f"/data/runs/r{run}-a1/{path}"
        self.add(schema.physical_copy, location_id=self.cologne, product_id=product, path=place)
        return product

    def event(self, type: str, recipient: str, run: int | None = None, version: int | None = None, **body: Any) -> int:
        return self.add(
            schema.event,
            location_id=self.cologne,
            type=type,
            recipient=recipient,
            run_id=run,
            run_version=version,
            actor="worker",
            body={"type": type, "run": run, **body},
        )


class Night(Observatory):
    """An observatory in the middle of its work."""

    def __init__(self, conn: Connection) -> None:
        super().__init__(conn)
        self.first = self.run("calibrate", "scan-1", "COMPLETED", wanted="older")
        self.again = self.run("calibrate", "scan-1", "COMPLETED", accept=True)
        self.failed = self.run(
            "calibrate", "scan-2", "FAILED", failure="exit", exit_code=3, message="the software left with code 3"
        )
        self.cover("calibrate", "scan-2", "blocked", "failed", f"run {self.failed}: the software left with code 3")
        self.cancelled = self.run("calibrate", "scan-3", "CANCELLED", wanted="older", message="by ada")
        self.running = self.run("calibrate", "scan-3", "RUNNING", wall_seconds=12.5)
        self.cover("calibrate", "scan-3", "active", "run", f"run {self.running}")
        self.map = self.run("map", "ngc253", "COMPLETED", reads=[self.first], wanted="older")
        self.cover("map", "ngc253", "blocked", "upstream_failed", "1 of 3 units of calibrate are blocked")
        self.waiting = self.run("look", "all", "PENDING", waiting_for="a free slot: 4 of 4 runs are in flight")
        self.cover("look", "all", "active", "run", f"run {self.waiting}")
        self.old_file = self.product(self.first, "workspace/calibrate/scan-1.fits", superseded_by=self.again)
        self.new_file = self.product(self.again, "workspace/calibrate/scan-1.fits")
        self.map_file = self.product(self.map, "output/science/map.fits", ProductType.SCIENCE, metrics={"rms": 0.2})
        self.log_file = self.product(self.first, "workspace/calibrate/logs/job.log", ProductType.LOG)


@pytest.fixture(scope="module")
def shared(servers: Servers, migrated: str) -> Iterator[tuple[Engine, Night]]:
    with servers.database(template=migrated) as url:
        engine = connect(url, "wfm")
        with engine.begin() as conn:
            night = Night(conn)
        with engine.connect() as conn:
            settle(conn)
        yield engine, night
        engine.dispose()


@pytest.fixture
def conn(shared: tuple[Engine, Night]) -> Iterator[Connection]:
    """A transaction that is rolled back."""
    with shared[0].connect() as conn:
        yield conn


@pytest.fixture
def night(shared: tuple[Engine, Night], conn: Connection) -> Night:
    return shared[1].on(conn)


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    """For tests that commit."""
    engine = connect(database, "wfm")
    yield engine
    engine.dispose()


@pytest.fixture
def empty(engine: Engine) -> Iterator[Observatory]:
    with engine.connect() as conn:
        observatory = Observatory(conn)
        conn.commit()
        yield observatory


@contextmanager
def statements(conn: Connection) -> Iterator[list[Any]]:
    """The cursors of all statements on a connection meanwhile."""
    seen: list[Any] = []

    def note(_conn: Any, cursor: Any, *_: Any) -> None:
        seen.append(cursor)

    sa_event.listen(conn, "before_cursor_execute", note)
    yield seen
    sa_event.remove(conn, "before_cursor_execute", note)


# --- runs ---


def test_runs_lists_the_newest_first(conn: Connection, night: Night) -> None:
    lines = views.runs(conn, location_id=night.cologne)
    assert [r.id for r in lines] == [
        night.waiting,
        night.map,
        night.running,
        night.cancelled,
        night.failed,
        night.again,
        night.first,
    ]
    waiting = lines[0]
    assert (waiting.pipeline, waiting.step, waiting.unit, waiting.state) == ("quick", "look", "all", "PENDING")
    assert (waiting.attempt, waiting.version) == (1, 1)
    assert waiting.waiting_for == "a free slot: 4 of 4 runs are in flight"
    failed = lines[4]
    assert (failed.failure, failed.message) == ("exit", "the software left with code 3")
    assert failed.finished_at is not None
    assert lines[2].wall_seconds == 12.5
    assert [r.id for r in lines if r.superseded] == [night.first]


def test_runs_filters(conn: Connection, night: Night) -> None:
    def ids(**filters: Any) -> list[int]:
        return [r.id for r in views.runs(conn, location_id=night.cologne, **filters)]

    assert ids(pipeline="quick") == [night.waiting]
    assert ids(pipeline="maps", step="map") == [night.map]
    assert ids(unit="scan-3") == [night.running, night.cancelled]
    assert ids(states=[RunState.FAILED, RunState.CANCELLED]) == [night.cancelled, night.failed]
    assert ids(limit=2) == [night.waiting, night.map]
    day = timedelta(days=1)
    night.set(schema.run, night.map, state_since=datetime.now(UTC) - day)
    assert night.map not in ids(since=datetime.now(UTC) - day / 2)
    assert ids(since=datetime.now(UTC) + day) == []
    assert views.runs(conn, location_id=night.archive) == []


def test_runs_can_be_in_every_state(empty: Observatory) -> None:
    conn = empty.conn
    for state in RunState:
        empty.unit("maps", SCAN, f"in-{state}")
        empty.run("calibrate", f"in-{state}", state)
    for state in RunState:
        (line,) = views.runs(conn, location_id=empty.cologne, states=[state])
        assert (line.state, line.unit) == (state, f"in-{state}")
        assert views.run_detail(conn, line.id).history[-1].dest == state


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"location_id": 99}, "unknown location 99; known: 1 (cologne), 2 (archive)"),
        ({"pipeline": "mpas"}, "unknown pipeline 'mpas', did you mean 'maps'?"),
        ({"step": "calibrat"}, "unknown step 'calibrat', did you mean 'calibrate'?"),
        ({"pipeline": "quick", "step": "map"}, "unknown step 'map'; allowed: look"),
        ({"unit": "scan-4"}, "unknown unit 'scan-4', did you mean 'scan-"),
    ],
)
def test_runs_names_what_is_near(conn: Connection, night: Night, names: dict[str, Any], message: str) -> None:
    with pytest.raises(NotFoundError, match=re.escape(message)):
        views.runs(conn, **{"location_id": night.cologne, **names})


def test_answers_are_json_and_times_are_utc(conn: Connection, night: Night) -> None:
    conn.execute(text("SET timezone TO 'Asia/Tokyo'"))
    answers: list[Any] = [
        views.runs(conn, location_id=night.cologne),
        views.run_detail(conn, night.failed),
        views.why(conn, pipeline="maps", location_id=night.cologne),
        views.why_package(conn, "p1", location_id=night.cologne),
        views.coverage_summary(conn, night.cologne),
        views.events(conn),
        views.packages(conn),
        views.counts(conn, night.cologne),
        views.verify(conn, CHARTS),
        views.lineage(conn, LineageKind.RUN, night.map),
    ]
    for answer in answers:
        plain = msgspec.to_builtins(answer)
        assert msgspec.json.decode(msgspec.json.encode(plain)) == plain
        assert "+09:00" not in str(plain)
    assert views.runs(conn, location_id=night.cologne)[0].created_at.utcoffset() == timedelta(0)


def test_run_detail_tells_all(conn: Connection, night: Night) -> None:
    job = {
        "name": "wfm-1-1-1",
        "directory": "/data/runs/1",
        "command": ["reduce", "--fast"],
        "environment": {},
        "working_directory": "/data/runs/1",
        "resources": {"cpu": 2.0, "memory_gb": 4.0},
    }
    night.set(schema.run, night.again, job=job, handle="4711", cpu_hours=0.5, evidence={"exit.json": {"code": 0}})
    night.add(schema.task, location_id=night.cologne, kind="collect", run_id=night.again, error="disk full", tries=2)
    run = views.run_detail(conn, night.again)
    assert (run.id, run.pipeline, run.unit, run.location) == (night.again, "maps", "scan-1", "cologne")
    assert (run.software, run.software_version) == ("reduce", "2.1.0")
    assert (run.config, run.config_revision, run.parameters) == ("gains", 3, {"gain": 1.5})
    assert (run.generation, run.wanted, run.accepted) == (2, "w", True)
    assert (run.packages, run.packages_total) == (["p1", "p2"], 2)
    assert run.job is not None
    assert (run.job.name, run.job.command, run.job.directory) == ("wfm-1-1-1", ("reduce", "--fast"), "/data/runs/1")
    assert (run.handle, run.cpu_hours, run.evidence) == ("4711", 0.5, {"exit.json": {"code": 0}})
    assert [(p.id, p.type, p.superseded_by) for p in run.products] == [(night.new_file, "INTERMEDIATE", None)]
    assert [h.dest for h in run.history] == ["PENDING", *COMPLETED]
    assert [h.version for h in run.history] == [1, 2, 3, 4, 5, 6]
    assert [(t.kind, t.state, t.tries, t.error) for t in run.tasks] == [
        ("stage", "done", 0, ""),
        ("collect", "ready", 2, "disk full"),
    ]
    assert [e.type for e in run.events][:2] == ["gap.detected", "job.built"]
    assert run.upstream == []
    assert not views.run_detail(conn, night.first).accepted


def test_run_detail_lists_what_the_run_pinned(conn: Connection, night: Night) -> None:
    night.package("late", "scan-1")
    night.leave("p2", "scan-1")
    assert views.run_detail(conn, night.again).packages == ["p1", "p2"]
    newer = night.run("calibrate", "scan-1", "PENDING")
    assert views.run_detail(conn, newer).packages == ["late", "p1"]


def test_run_detail_names_some_inputs_and_counts_all(
    conn: Connection, night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wfm.views.run_lines.SHOWN", 1)
    combined = night.run("map", "ngc253", "PENDING", reads=[night.running, night.again])
    run = views.run_detail(conn, combined)
    assert (run.packages, run.packages_total) == (["p1"], 4)
    assert ([(u.id, u.unit, u.state) for u in run.upstream], run.upstream_total) == (
        [(night.again, "scan-1", "COMPLETED")],
        2,
    )


def test_a_run_that_does_not_exist(empty: Observatory) -> None:
    conn = empty.conn
    with pytest.raises(NotFoundError, match="unknown run 7; there are no runs yet"):
        views.run_detail(conn, 7)
    run = empty.run("look", "all", "PENDING")
    with pytest.raises(NotFoundError, match=f"unknown run 99; the newest run is {run}"):
        views.run_detail(conn, 99)


# --- why ---


def why(conn: Connection, unit: str | None = None, **more: Any) -> list[views.WhyLine]:
    return views.why(conn, pipeline="maps", unit=unit, location_id=1, **more)


def test_every_reason_says_what_would_change_it() -> None:
    assert set(views.CHANGE) == set(Why)


@pytest.mark.parametrize("reason", Why)
def test_every_reason_becomes_a_sentence(conn: Connection, night: Night, reason: Why) -> None:
    night.cover("calibrate", "scan-3", "waiting", reason)
    night.cover("map", "ngc253", "waiting", reason)
    for line in why(conn):
        assert line.change
        assert "{" not in line.change


def test_why_begins_with_what_needs_somebody(conn: Connection, night: Night) -> None:
    lines = why(conn)
    assert [(w.step, w.unit, w.state, w.why) for w in lines] == [
        ("calibrate", "scan-2", "blocked", "failed"),
        ("map", "ngc253", "blocked", "upstream_failed"),
        ("calibrate", "scan-3", "active", "run"),
        ("calibrate", "scan-1", "covered", "covered"),
    ]
    assert why(conn, limit=2) == lines[:2]
    assert [w.unit for w in why(conn, step="map")] == ["ngc253"]
    assert [w.step for w in why(conn, unit="scan-1")] == ["calibrate"]


def test_why_of_a_failure(conn: Connection, night: Night) -> None:
    (line,) = why(conn, "scan-2")
    assert line.failed is not None
    assert (line.failed.id, line.failed.failure, line.failed.exit_code) == (night.failed, "exit", 3)
    assert line.failed.message == "the software left with code 3"
    logs = f" (`wfm runs logs {night.failed}` shows what it said)"
    assert line.change == f"fix the cause, then `wfm runs retry {night.failed}`{logs}; or new input, version or config"
    night.set(schema.run, night.failed, exit_code=None)  # nothing ran
    (line,) = why(conn, "scan-2")
    assert line.change == f"fix the cause, then `wfm runs retry {night.failed}`; or new input, version or config"


def test_why_of_an_active_run(conn: Connection, night: Night) -> None:
    (line,) = views.why(conn, pipeline="quick", location_id=night.cologne)
    assert line.active is not None
    assert (line.active.id, line.active.state) == (night.waiting, "PENDING")
    assert line.active.waiting_for == "a free slot: 4 of 4 runs are in flight"
    assert f"run {night.waiting} goes on by itself; it waits: a free slot" in line.change


def test_why_tells_the_failure_that_counts(conn: Connection, night: Night) -> None:
    # Cancelled before what is accepted now, with another digest: nobody's business any more.
    night.cover("calibrate", "scan-3", "covered", "covered", run_id=night.running, result=1)
    (line,) = why(conn, "scan-3")
    assert (line.accepted, line.failed) == (night.running, None)
    # Withdrawn for newer input is no failure; a failure after the accepted result is one.
    night.run("calibrate", "scan-1", "CANCELLED", failure=WITHDRAWN)
    (line,) = why(conn, "scan-1")
    assert (line.accepted, line.failed) == (night.again, None)
    newer = night.run("calibrate", "scan-1", "FAILED", wanted="newest", message="broke")
    (line,) = why(conn, "scan-1")
    assert line.failed is not None
    assert (line.failed.id, line.failed.message) == (newer, "broke")
    # The wanted digest failed before something else was accepted: it is what must be retried.
    older = night.run("calibrate", "scan-2", "COMPLETED", wanted="other")
    night.run("calibrate", "scan-2", "FAILED", wanted="third")
    night.cover("calibrate", "scan-2", "blocked", "failed", run_id=older)
    (line,) = why(conn, "scan-2")
    assert line.failed is not None
    assert line.failed.id == night.failed


def test_why_names_the_upstream_run_that_failed(conn: Connection, night: Night) -> None:
    (line,) = why(conn, "ngc253")
    assert (line.upstream_total, line.upstream_open) == (3, 2)
    assert [(u.step, u.unit, u.why, u.run) for u in line.upstream] == [("calibrate", "scan-2", "failed", night.failed)]
    assert line.change == f"mend what stopped upstream: run {night.failed} (calibrate scan-2), ..."


def test_why_goes_up_to_where_it_began(conn: Connection, night: Night) -> None:
    night.step("maps", "publish", SOURCE, after=("map",), final=True)
    night.cover("publish", "ngc253", "blocked", "upstream_failed")
    (line,) = why(conn, "ngc253", step="publish")
    assert (line.upstream_total, line.upstream_open) == (1, 1)
    assert [u.run for u in line.upstream] == [night.failed]
    night.cover("calibrate", "scan-2", "blocked", "no_usable_software_version")
    (line,) = why(conn, "ngc253", step="publish")
    assert [(u.unit, u.why) for u in line.upstream] == [("scan-2", "no_usable_software_version")]
    # What failed by itself is where it began, whatever is blocked above it.
    night.cover("map", "ngc253", "blocked", "failed")
    (line,) = why(conn, "ngc253", step="publish")
    assert [(u.step, u.why) for u in line.upstream] == [("map", "failed")]


def test_why_names_the_upstream_units_it_waits_for(conn: Connection, night: Night) -> None:
    for n in range(4, 9):
        night.unit("maps", SCAN, f"scan-{n}")
        night.package(f"p-{n}", f"scan-{n}")
        night.conn.execute(
            insert(schema.unit_edge).values(upper_id=night.units["ngc253"], lower_id=night.units[f"scan-{n}"])
        )
    # Another step that the map depends on, with units of its own.
    night.step("maps", "weather", LINE)
    night.conn.execute(
        insert(schema.step_dependency).values(step_id=night.steps["map"], upstream_id=night.steps["weather"])
    )
    night.unit("maps", LINE, "co43")
    night.package("p-co43", "co43")
    night.conn.execute(insert(schema.unit_edge).values(upper_id=night.units["ngc253"], lower_id=night.units["co43"]))
    night.cover("calibrate", "scan-8", "blocked", "no_usable_software_version")
    night.cover("map", "ngc253", "waiting", "waiting_for_upstream")
    (line,) = why(conn, "ngc253")
    assert (line.upstream_total, line.upstream_open) == (9, 8)
    assert [(u.unit, u.state, u.run) for u in line.upstream] == [
        ("scan-2", "blocked", night.failed),
        ("scan-8", "blocked", None),
        ("scan-3", "active", None),
    ]
    assert line.change == (
        f"all upstream units must be covered, 8 of 9 are not: run {night.failed} (calibrate scan-2), "
        "calibrate scan-8 (no_usable_software_version), calibrate scan-3 (run), ..."
    )


def test_why_shows_units_that_nobody_looked_at(conn: Connection, night: Night) -> None:
    night.unit("maps", SCAN, "new")
    assert why(conn, "new") == []
    night.package("p5", "new")
    (line,) = why(conn, "new")
    assert (line.state, line.why) == ("waiting", "arrivals_not_sorted_yet")


def test_why_of_what_is_held(conn: Connection, night: Night) -> None:
    night.cover("calibrate", "scan-1", "held", "paused", "pipeline paused by ada")
    night.set(schema.pipeline, night.pipelines["maps"], paused_by="ada")
    assert why(conn, "scan-1")[0].change == "`wfm resume maps`"
    night.set(schema.reduction_step, night.steps["calibrate"], paused_by="ada")
    assert why(conn, "scan-1")[0].change == "`wfm resume maps` and `wfm resume maps/calibrate`"
    night.cover("calibrate", "scan-1", "held", "disabled")
    assert why(conn, "scan-1")[0].change == "`wfm enable maps`"
    night.cover("calibrate", "scan-1", "held", "manual_only")
    assert why(conn, "scan-1")[0].change == "ask for it: `wfm trigger maps/calibrate scan-1`"
    due = datetime(2031, 5, 1, 12, tzinfo=UTC)
    night.cover("calibrate", "scan-1", "waiting", "cooling_down", due_at=due)
    assert why(conn, "scan-1")[0].change == "a new run may start at 2031-05-01 12:00:00 UTC"
    # A step that left its pipeline is shown only when it is named.
    night.set(schema.reduction_step, night.steps["calibrate"], active=False)
    night.cover("calibrate", "scan-1", "held", "disabled")
    assert why(conn, "scan-1") == []
    assert why(conn, "scan-1", step="calibrate")[0].change == "apply maps with the step calibrate in it"


def test_why_looks_only_at_its_location(conn: Connection, night: Night) -> None:
    with pytest.raises(NotFoundError, match="unknown pipeline 'maps'"):
        views.why(conn, pipeline="maps", location_id=night.archive)
    night.set(schema.pipeline, night.pipelines["maps"], deleted_at=datetime.now(UTC))
    with pytest.raises(NotFoundError, match="unknown pipeline 'maps'; allowed: quick"):
        why(conn)


def test_why_asks_as_often_for_many_units_as_for_few(conn: Connection, night: Night) -> None:
    with statements(conn) as few:
        assert len(why(conn)) == 4
    for n in range(4, 60):
        night.unit("maps", SCAN, f"scan-{n}")
        night.package(f"p-{n}", f"scan-{n}")
        night.cover("calibrate", f"scan-{n}", "blocked", "upstream_failed")
    with statements(conn) as many:
        assert len(why(conn)) == 60
    assert len(few) == len(many)


def test_why_of_a_package(conn: Connection, night: Night) -> None:
    told = views.why_package(conn, "p3", location_id=night.cologne)
    assert [(u.pipeline, u.step, u.unit, u.why) for u in told.units] == [
        ("maps", "calibrate", "scan-2", "failed"),
        ("maps", "map", "ngc253", "upstream_failed"),
        ("quick", "look", "all", "run"),
    ]
    assert told.not_selected == []
    assert told.summary == "3 (step, unit) pairs of maps, quick contain it"
    night.set(schema.reduction_step, night.steps["look"], active=False)
    told = views.why_package(conn, "p3", location_id=night.cologne)
    assert [u.step for u in told.units] == ["calibrate", "map"]


def test_why_a_package_is_not_selected(conn: Connection, night: Night) -> None:
    night.package("other", source="M51")
    told = views.why_package(conn, "other", location_id=night.cologne)
    assert told.units == []
    assert [(n.pipeline, n.reason) for n in told.not_selected] == [
        ("maps", 'grouping ngc253 rejects it: rule 2, source.name eq "NGC253"'),
        ("quick", "grouping everything selects it, but its arrival is not sorted yet"),
    ]
    assert told.summary == "its arrival is not sorted yet"
    night.set(schema.pipeline, night.pipelines["quick"], enabled=False)
    told = views.why_package(conn, "other", location_id=night.cologne)
    assert told.not_selected[1].reason.endswith("; the pipeline is disabled")
    assert told.summary == "no enabled pipeline of this location selects it"
    with pytest.raises(NotFoundError, match="unknown raw data package 'othr', did you mean 'other'"):
        views.why_package(conn, "othr", location_id=night.cologne)


def test_why_a_package_left(conn: Connection, night: Night) -> None:
    for unit in ("scan-2", "ngc253"):
        night.leave("p3", unit)
    night.set(schema.raw_data_package, night.packages["p3"], state="failed")
    told = views.why_package(conn, "p3", location_id=night.cologne)
    assert [u.step for u in told.units] == ["look"]
    assert [n.reason for n in told.not_selected] == [
        'grouping ngc253 rejects it: rule 1, raw_data_package.state eq "archived"'
    ]


def test_coverage_summary_counts_every_unit(conn: Connection, night: Night) -> None:
    def told(pipeline: str | None = None) -> dict[str, tuple[int, dict[str, int]]]:
        lines = views.coverage_summary(conn, night.cologne, pipeline)
        return {f"{c.pipeline}/{c.step}": (c.units, {k: v for k, v in c.states.items() if v}) for c in lines}

    assert told() == {
        "maps/calibrate": (3, {"covered": 1, "blocked": 1, "active": 1}),
        "maps/map": (1, {"blocked": 1}),
        "quick/look": (1, {"active": 1}),
    }
    assert list(told("quick")) == ["quick/look"]
    night.unit("maps", SCAN, "new")
    night.package("p5", "new")
    assert told()["maps/calibrate"] == (4, {"covered": 1, "blocked": 1, "active": 1, "waiting": 1})
    night.step("quick", "not begun", SOURCE)
    assert told()["quick/not begun"] == (0, {})
    night.set(schema.reduction_step, night.steps["map"], active=False)
    night.set(schema.pipeline, night.pipelines["quick"], deleted_at=datetime.now(UTC))
    assert list(told()) == ["maps/calibrate"]
    assert set(views.coverage_summary(conn, night.cologne)[0].states) == set(CoverageState)
    with pytest.raises(NotFoundError, match="did you mean 'maps'"):
        views.coverage_summary(conn, night.cologne, "map")


def test_coverage_is_complete_when_nothing_is_left(conn: Connection, night: Night) -> None:
    def complete() -> bool:
        (line,) = views.coverage_summary(conn, night.cologne, "quick")
        return line.complete

    assert not complete()
    night.cover("look", "all", "covered", "covered", run_id=night.waiting, result=1)
    assert complete()
    night.cover("look", "all", "empty", "empty")
    assert complete()


# --- cost ---


def test_cost_is_the_median_of_the_results_that_count(conn: Connection, night: Night) -> None:
    calibrate, step_map, look = (night.steps[name] for name in ("calibrate", "map", "look"))
    for n, (seconds, cores) in enumerate([(3600.0, 2.0), (7200.0, 4.0), (36_000.0, 1.0), (None, 8.0)]):
        night.unit("maps", SCAN, f"timed-{n}")
        night.run("calibrate", f"timed-{n}", "COMPLETED", accept=True, wall_seconds=seconds, cpu=cores)
    night.unit("maps", SOURCE, "timed-map")
    night.run("map", "timed-map", "FAILED", wall_seconds=5.0)
    costs = views.step_costs(conn, [calibrate, step_map, look])
    assert costs[calibrate] == views.StepCost(runs=3, wall_seconds=7200.0, core_hours=8.0)
    assert costs[step_map] == costs[look] == views.StepCost()
    assert views.estimate(costs, {calibrate: 3}) == views.Estimate(runs=3, unknown=0, core_hours=24.0)
    assert str(views.estimate(costs, {calibrate: 3, look: 2})) == "about 24 core-hours, and 2 of unknown cost"
    assert str(views.Estimate(runs=2, unknown=0, core_hours=4.7e-5)) == "less than 0.01 core-hours"
    assert str(views.estimate(costs, {look: 2})) == "unknown: no run of these steps has completed yet"
    assert str(views.estimate(costs, {})) == "nothing"


def test_cost_looks_at_the_newest_units(conn: Connection, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wfm.views.cost.RECENT", 2)
    for n, seconds in enumerate([1.0, 100.0, 200.0]):
        night.unit("maps", SCAN, f"timed-{n}")
        night.run("calibrate", f"timed-{n}", "COMPLETED", accept=True, wall_seconds=seconds)
    calibrate = night.steps["calibrate"]
    assert views.step_costs(conn, [calibrate])[calibrate].wall_seconds == 150.0


# --- events ---


def settle(conn: Connection) -> None:
    """Wait for transactions of others (the server's own analysis, say) that were open when the events were written."""
    wait_until(
        lambda: conn.execute(
            text("SELECT coalesce(max(txid) < pg_snapshot_xmin(pg_current_snapshot()), true) FROM event")
        ).scalar_one()
    )


def all_pages(conn: Connection, limit: int, **filters: Any) -> tuple[list[int], str]:
    ids: list[int] = []
    cursor = None
    while True:
        page = views.events(conn, after=cursor, limit=limit, **filters)
        ids += [e.id for e in page.events]
        if not page.events:
            return ids, page.cursor
        cursor = page.cursor


def test_events_come_once_each_page_by_page(conn: Connection, night: Night) -> None:
    everything = list(conn.execute(text("SELECT id FROM event ORDER BY txid, id")).scalars())
    for limit in (1, 3, len(everything), 1000):
        ids, cursor = all_pages(conn, limit)
        assert ids == everything
        assert views.events(conn, after=cursor).events == []


def test_the_newest_events(conn: Connection, night: Night) -> None:
    everything, _ = all_pages(conn, 1000)
    page = views.events(conn, newest=True, limit=3)
    assert [e.id for e in page.events] == everything[-3:]
    assert views.events(conn, after=page.cursor).events == []


def test_a_cursor_goes_on_although_the_filter_let_nothing_through(conn: Connection, night: Night) -> None:
    page = views.events(conn, types=["slot.freed"])
    assert page.events == []
    assert views.events(conn, after=page.cursor).events == []


def test_events_filters(conn: Connection, night: Night) -> None:
    def types(**filters: Any) -> list[str]:
        return [e.type for e in views.events(conn, **filters).events]

    assert types(run=night.running) == ["gap.detected", "job.built", "job.submitted", "job.running"]
    assert types(pipeline="quick") == ["gap.detected"]
    assert set(types(unit="scan-2")) == {"gap.detected", "job.built", "job.submitted", "job.running", "run.failed"}
    assert types(types=["run.failed"]) == ["run.failed"]
    assert types(location_id=night.archive) == []
    hour = timedelta(hours=1)
    now = datetime.now(UTC)
    assert types(since=now + hour) == types(until=now - hour) == []
    assert types(since=now - hour, until=now + hour) == types()
    with pytest.raises(NotFoundError, match=r"unknown event type 'run\.faild', did you mean 'run\.failed'"):
        views.events(conn, types=["run.faild"])
    with pytest.raises(NotFoundError, match="unknown run 999999"):
        views.events(conn, run=999_999)
    with pytest.raises(NotFoundError, match="did you mean 'maps'"):
        views.events(conn, pipeline="map")
    assert set(types(types=["run.failed", "job.running"])) == {"job.running", "run.failed"}
    with pytest.raises(NotFoundError) as caught:
        views.events(conn, pipeline="map", types=["run.faild", "run.failed", "nothing"])
    assert [re.split("[,;]", line)[0] for line in str(caught.value).splitlines()] == [
        "unknown pipeline 'map'",
        "unknown event type 'run.faild'",
        "unknown event type 'nothing'",
    ]
    with pytest.raises(NotFoundError, match="unknown unit 'scan'"):
        views.events(conn, unit="scan")


@pytest.mark.parametrize("cursor", ["", "5", "a-b", "1-2-3", "-1-2", "1-", "٣-١", "1-2\n", "1" * 30 + "-1"])
def test_what_is_no_cursor(conn: Connection, night: Night, cursor: str) -> None:
    if cursor == "":
        assert views.events(conn, after=cursor).events
        return
    with pytest.raises(UsageError, match="is not a cursor: expected two numbers such as 1234-56"):
        views.events(conn, after=cursor)


def test_a_cursor_never_skips_what_is_committed_late(engine: Engine, empty: Observatory) -> None:
    with engine.connect() as slow, engine.connect() as fast:
        early = empty.on(slow).event("slot.freed", "")
        late = empty.on(fast).event("slot.freed", "")
        fast.commit()
        page = views.events(empty.conn)
        # The fast one is there, but its predecessor may still come.
        assert page.events == []
        assert empty.conn.execute(text("SELECT id FROM event")).scalars().all() == [late]
        slow.commit()
        settle(empty.conn)
        page = views.events(empty.conn, after=page.cursor)
        assert [e.id for e in page.events] == [early, late]
        early = empty.on(slow).event("slot.freed", "")
        slow.commit()
        settle(empty.conn)
        assert [e.id for e in views.events(empty.conn, after=page.cursor).events] == [early]


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_that_pages_while_others_commit_in_any_order_misses_nothing(
    engine: Engine, empty: Observatory, seed: int
) -> None:
    chance = random.Random(seed)
    written: list[int] = []
    read: list[int] = []
    cursor = views.START
    with ExitStack() as stack:
        writers = [empty.on(stack.enter_context(engine.connect())) for _ in range(8)]
        for _ in range(60):
            writer = chance.choice(writers)
            if chance.random() < 0.6:
                written.append(writer.event("slot.freed", ""))
            else:
                writer.conn.commit()
            page = views.events(empty.conn, after=cursor, limit=chance.choice((1, 2, 100)))
            read += [e.id for e in page.events]
            cursor = page.cursor
        for writer in writers:
            writer.conn.commit()
    settle(empty.conn)
    while page := views.events(empty.conn, after=cursor, limit=3):
        read += [e.id for e in page.events]
        cursor = page.cursor
        if not page.events:
            break
    assert sorted(read) == sorted(written)


def test_events_are_ordered_by_transaction_then_by_id(engine: Engine, empty: Observatory) -> None:
    with engine.connect() as first, engine.connect() as second:
        written = [empty.on(c).event("slot.freed", "") for c in (first, second, first, second)]
        second.commit()
        first.commit()
    settle(empty.conn)
    in_order = [written[0], written[2], written[1], written[3]]
    for limit in (1, 3, 10):
        assert all_pages(empty.conn, limit)[0] == in_order
    assert [e.id for e in views.events(empty.conn, newest=True, limit=3).events] == in_order[1:]


def test_event_detail(conn: Connection, night: Night) -> None:
    (line,) = views.events(conn, types=["run.failed"]).events
    letter = night.add(
        schema.dead_letter,
        location_id=night.cologne,
        stream="s",
        entry_id="1-1",
        body=b"\xff{}",
        reason="not JSON",
        event_id=line.id,
    )
    detail = views.event_detail(conn, line.id)
    assert (detail.type, detail.recipient, detail.run, detail.run_version) == (
        "run.failed",
        "trigger-manager",
        night.failed,
        5,
    )
    assert (detail.location, detail.publishes, detail.failures, detail.dead_letters) == ("cologne", 0, 0, [letter])
    assert (detail.cursor, detail.body) == (line.cursor, line.body)
    with pytest.raises(NotFoundError, match="unknown event 999999"):
        views.event_detail(conn, 999999)


def test_dead_letters(empty: Observatory) -> None:
    conn = empty.conn
    common = {"location_id": empty.cologne, "stream": "wfm:{1}:data.arrived", "reason": "not JSON"}
    first = empty.add(schema.dead_letter, **common, entry_id="1-1", body=b'{"a": 1\xff')
    second = empty.add(schema.dead_letter, **common, entry_id="2-1", body=b"{}", state="dropped", actor="user:ada")
    (line,) = views.dead_letters(conn)
    assert (line.id, line.reason, line.size, line.location) == (first, "not JSON", 8, "cologne")
    assert [d.id for d in views.dead_letters(conn, "dropped")] == [second]
    assert [d.id for d in views.dead_letters(conn, None)] == [second, first]
    letter = views.dead_letter(conn, first)
    assert (letter.body, letter.text) == (b'{"a": 1\xff', '{"a": 1\\xff')
    assert msgspec.to_builtins(letter)["body"]
    with pytest.raises(NotFoundError, match="unknown dead letter 99"):
        views.dead_letter(conn, 99)


# --- verify ---


def test_history_that_replays(conn: Connection, night: Night) -> None:
    for n in range(3):
        night.unit("maps", SCAN, f"more-{n}")
        night.run("calibrate", f"more-{n}", "RETRY_WAIT", attempt=n + 1)
    report = views.verify(conn, CHARTS)
    transitions = conn.execute(text("SELECT count(*) FROM transition")).scalar()
    assert report == views.VerifyReport(10, transitions or 0, [], 0)
    assert views.verify(conn, CHARTS, batch=1) == report


def transition(run: int, version: int, **values: Any) -> str:
    sets = ", ".join(f"{k} = '{v}'" for k, v in values.items())
    return f"UPDATE transition SET {sets} WHERE run_id = {run} AND version = {version}"


# The run is COMPLETED: PENDING, STAGING_DATA, SUBMITTED, RUNNING, COLLECTING_RESULTS, COMPLETED.
FAULTS = {
    "a gap": ("DELETE FROM transition WHERE run_id = {run} AND version = 3", ["version 4 follows version 2"]),
    "no first": ("DELETE FROM transition WHERE run_id = {run} AND version = 1", ["version 2 follows version 0"]),
    "no last": (
        "DELETE FROM transition WHERE run_id = {run} AND version = 6",
        [
            "is at version 6, but its history ends with version 5",
            "is COMPLETED, but its history ends in COLLECTING_RESULTS",
        ],
    ),
    "no history": ("DELETE FROM transition WHERE run_id = {run}", ["has no history, but is COMPLETED at version 6"]),
    "wrong end": (
        transition(0, 3, dest="RUNNING"),
        [
            "version 3: chart 1 has no move STAGING_DATA --submit--> RUNNING",
            "version 4 leaves SUBMITTED, but version 3 entered RUNNING",
        ],
    ),
    "impossible move": (
        transition(0, 6, trigger="start"),
        ["version 6: chart 1 has no move COLLECTING_RESULTS --start--> COMPLETED"],
    ),
    "wrong beginning": (
        transition(0, 1, dest="SUBMITTED"),
        [
            "version 1 enters SUBMITTED, but the chart begins with PENDING",
            "version 2 leaves PENDING, but version 1 entered SUBMITTED",
        ],
    ),
    "from somewhere": (
        transition(0, 1, source="FAILED"),
        ["version 1 leaves FAILED, but version 0 entered nothing"],
    ),
    "another state": (
        "UPDATE run SET state = 'FAILED' WHERE id = {run}",
        [
            "is FAILED, but its history ends in COMPLETED",
            "coverage of maps/calibrate scan-1 rests on run {run}, which is FAILED",
        ],
    ),
    "another version": (
        "UPDATE run SET version = 7 WHERE id = {run}",
        ["is at version 7, but its history ends with version 6"],
    ),
    "another attempt": (
        "UPDATE run SET attempt = 2 WHERE id = {run}",
        ["is in attempt 2, but its history ends in attempt 1"],
    ),
    "attempts go back": (transition(0, 3, attempt=2), ["version 4 is of attempt 1, after attempt 2"]),
    "unknown chart": (
        transition(0, 2, chart_version=9),
        ["version 2 names chart version 9, which is not known"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(conn: Connection, night: Night, name: str) -> None:
    sql, faults = FAULTS[name]
    run = night.again
    sql = sql.replace("run_id = 0", f"run_id = {run}").replace("{run}", str(run))
    assert conn.execute(text(sql)).rowcount == 1 or name == "no history"
    report = views.verify(conn, CHARTS)
    faults = [fault.replace("{run}", str(run)) for fault in faults]
    assert report.faults == [f if f.startswith("coverage") else f"run {run}: {f}" for f in faults]
    assert report.runs == 7
    assert views.verify(conn, CHARTS, [run]).faults == report.faults
    assert views.verify(conn, CHARTS, [night.first]).faults == []


def test_history_without_its_run_is_found(conn: Connection, night: Night) -> None:
    conn.execute(text("ALTER TABLE transition DROP CONSTRAINT fk_transition_run_id"))
    conn.execute(text("UPDATE transition SET run_id = 777 WHERE run_id = :run"), {"run": night.waiting})
    report = views.verify(conn, CHARTS)
    assert report.faults == [
        f"run {night.waiting}: has no history, but is PENDING at version 1",
        "run 777: has 1 transitions, but does not exist",
    ]
    assert views.verify(conn, CHARTS, [777]).runs == 0


def test_moves_are_judged_by_the_chart_of_their_time(conn: Connection, night: Night) -> None:
    older = CHART_FILE.read_text().replace("trigger: collect,", "trigger: gather,").replace("version: 1", "version: 2")
    charts: Mapping[int, Chart] = {
        **CHARTS,
        2: parse(older, source="older", guards=GUARDS, events=RUN_EVENTS),
    }
    conn.execute(text(transition(night.again, 6, trigger="gather")))
    assert len(views.verify(conn, charts).faults) == 1
    conn.execute(text(transition(night.again, 6, chart_version=2)))
    assert views.verify(conn, charts).faults == []


def only_event(conn: Connection, **filters: Any) -> views.EventLine:
    (event,) = views.events(conn, **filters).events
    return event


def test_events_without_their_run_are_found(conn: Connection, night: Night) -> None:
    event = only_event(conn, types=["run.failed"])
    conn.execute(text("UPDATE event SET run_id = 4711 WHERE id = :id"), {"id": event.id})
    assert views.verify(conn, CHARTS).faults == [f"event {event.id} run.failed: run 4711 does not exist"]
    conn.execute(
        text("UPDATE event SET run_id = :run, run_version = 9 WHERE id = :id"), {"run": night.failed, "id": event.id}
    )
    assert (
        views.verify(conn, CHARTS, [night.failed])
        .faults[0]
        .endswith(f"is of version 9 of run {night.failed}, which is at version 5")
    )
    assert views.verify(conn, CHARTS, [night.first]).faults == []


def test_events_that_are_left_pending_are_found(conn: Connection, night: Night) -> None:
    early = next(e for e in views.events(conn, run=night.again).events if e.type == "job.built")
    last = next(e for e in views.events(conn, run=night.again).events if e.type == "run.collected")
    conn.execute(text("UPDATE event SET done_at = NULL WHERE id = ANY(:ids)"), {"ids": [early.id, last.id]})
    assert views.verify(conn, CHARTS).faults == [], "they may be on their way"
    conn.execute(
        text("UPDATE event SET created_at = '2026-01-02T03:04:05Z' WHERE id = ANY(:ids)"), {"ids": [early.id, last.id]}
    )
    assert views.verify(conn, CHARTS).faults == [], "the run has just ended"
    conn.execute(text("UPDATE run SET finished_at = now() - interval '1 h' WHERE id = :run"), {"run": night.again})
    assert views.verify(conn, CHARTS).faults == [
        f"event {early.id} job.built: is pending for worker since 2026-01-02T03:04:05Z, but run {night.again} went on"
        " and is COMPLETED"
    ]


@pytest.mark.parametrize(
    ("sql", "fault"),
    [
        ("UPDATE coverage SET run_id = {other} WHERE run_id = {run}", "rests on run {other}, which is of another step"),
        ("UPDATE coverage SET wanted = 'v' WHERE run_id = {run}", "which has digest w, but v is wanted"),
        ("UPDATE coverage SET result = 9 WHERE run_id = {run}", "which has another result"),
    ],
)
def test_coverage_that_rests_on_nothing_is_found(conn: Connection, night: Night, sql: str, fault: str) -> None:
    other = next(r.id for r in views.runs(conn, location_id=night.cologne, states=[RunState.COMPLETED], step="map"))
    names = {"run": night.again, "other": other}
    conn.execute(text(sql.format(**names)))
    (said,) = views.verify(conn, CHARTS).faults
    assert said.startswith("coverage of maps/calibrate scan-1 rests on run")
    assert fault.format(**names) in said


def test_events_that_no_reader_would_see_are_found_and_mended_as_the_page_says(conn: Connection, night: Night) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "replay-and-repair.md").read_text()
    statement = re.search(r"UPDATE wfm\.event[^;`]*", page)
    assert statement
    everything, _ = all_pages(conn, 1000)
    conn.execute(text("UPDATE event SET txid = (18446744073709551615 - id)::text::xid8"))
    assert views.events(conn).events == []
    (fault,) = views.verify(conn, CHARTS).faults
    assert fault.startswith(f"event {min(everything)} and {len(everything) - 1} more: their transactions have numbers")
    conn.execute(text(statement[0]))
    assert views.verify(conn, CHARTS).faults == []
    assert all_pages(conn, 3)[0] == sorted(everything)


def test_verify_names_runs_that_do_not_exist(conn: Connection, night: Night) -> None:
    with pytest.raises(NotFoundError, match="unknown run 4711"):
        views.verify(conn, CHARTS, [night.first, 4711])
    assert views.verify(conn, CHARTS, []).runs == 0


def test_verify_holds_one_batch_in_memory(conn: Connection, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    with statements(conn) as cursors:
        views.verify(conn, CHARTS, batch=7)
    assert [c.name is not None for c in cursors] == [True] * 5
    monkeypatch.setattr("wfm.views.verification.MOST_FAULTS", 2)
    conn.execute(text("DELETE FROM transition"))
    report = views.verify(conn, CHARTS)
    assert (len(report.faults), report.faults_total, report.runs, report.transitions) == (2, 7, 7, 0)


# --- lineage ---


def names(nodes: Sequence[LineageNode], side: str) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for node in nodes:
        found |= {(node.kind, node.label)} | names(getattr(node, side), side)
    return found


def size(nodes: Sequence[LineageNode], side: str) -> int:
    return sum(1 + size(getattr(node, side), side) for node in nodes)


def test_lineage_of_a_final_map(conn: Connection, night: Night) -> None:
    root = views.lineage(conn, LineageKind.PRODUCT, night.map_file)
    assert (root.kind, root.label, root.details["type"]) == ("product", "output/science/map.fits", "SCIENCE")
    (run,) = root.upstream
    assert (run.id, run.label, run.note) == (night.map, "maps/map ngc253", "COMPLETED, reduce 2.1.0")
    (file,) = run.upstream
    assert file.note == f"INTERMEDIATE, 10 bytes, superseded by run {night.again}"
    (calibration,) = file.upstream
    assert calibration.note == "COMPLETED, reduce 2.1.0, config gains revision 3"
    assert calibration.details["parameters"] == {"gain": 1.5}
    assert [p.label for p in calibration.upstream] == ["p1", "p2"]
    assert root.downstream == []


def test_lineage_of_a_package(conn: Connection, night: Night) -> None:
    root = views.lineage(conn, LineageKind.PACKAGE, "p1")
    assert root.note == "archived, 1000 bytes"
    assert root.upstream == []
    assert [(r.id, r.label) for r in root.downstream] == [
        (night.first, "maps/calibrate scan-1"),
        (night.again, "maps/calibrate scan-1"),
        (night.waiting, "quick/look all"),
    ]
    log, old = root.downstream[0].downstream
    assert (log.id, log.downstream) == (night.log_file, [])
    assert [r.id for r in old.downstream] == [night.map]
    assert [p.id for p in old.downstream[0].downstream] == [night.map_file]
    # A package that came after a run was built, or left before, is not its input.
    night.package("late", "scan-1")
    assert views.lineage(conn, LineageKind.PACKAGE, "late").downstream == []
    night.leave("p1", "scan-1")
    newer = night.run("calibrate", "scan-1", "COMPLETED")
    assert newer not in [r.id for r in views.lineage(conn, LineageKind.PACKAGE, "p1").downstream]
    with pytest.raises(NotFoundError, match="unknown raw data package 'lat', did you mean 'late'"):
        views.lineage(conn, LineageKind.PACKAGE, "lat")


def test_lineage_of_a_run(conn: Connection, night: Night) -> None:
    root = views.lineage(conn, LineageKind.RUN, str(night.first))
    assert [n.label for n in root.upstream] == ["p1", "p2"]
    assert [n.id for n in root.downstream] == [night.log_file, night.old_file]
    # Without registered intermediate products the runs themselves are linked.
    conn.execute(text("DELETE FROM physical_copy WHERE product_id = :id"), {"id": night.old_file})
    conn.execute(text("DELETE FROM data_product WHERE id = :id"), {"id": night.old_file})
    root = views.lineage(conn, LineageKind.RUN, night.first)
    assert [(n.kind, n.id) for n in root.downstream] == [("product", night.log_file), ("run", night.map)]
    assert [(n.kind, n.id) for n in views.lineage(conn, LineageKind.RUN, night.map).upstream] == [("run", night.first)]
    for key in (4711, "seven"):
        with pytest.raises(NotFoundError, match=f"unknown run {key!r}; the newest run is {night.waiting}"):
            views.lineage(conn, LineageKind.RUN, key)


def test_a_product_by_its_path(conn: Connection, night: Night) -> None:
    def find(key: str) -> int:
        return views.lineage(conn, LineageKind.PRODUCT, key).id

    assert find(str(night.map_file)) == find("output/science/map.fits") == find("map.fits") == night.map_file
    # Of several, the one that is not superseded; the older one by its place on disk or its id.
    assert find("scan-1.fits") == night.new_file
    assert find(f"/data/runs/r{night.first}-a1/workspace/calibrate/scan-1.fits") == night.old_file
    relative = night.product(night.running, "output/qa/noise.json", ProductType.QA_METRIC)
    conn.execute(text("UPDATE physical_copy SET path = 'runs/noise.json' WHERE product_id = :id"), {"id": relative})
    assert find("/data/runs/noise.json") == relative
    with pytest.raises(NotFoundError, match=r"unknown product 'mop\.fits'"):
        find("mop.fits")
    with pytest.raises(NotFoundError, match=r"unknown product '_ap\.fits'"):
        find("_ap.fits")
    other = night.product(night.waiting, "output/plots/map.fits", ProductType.PLOT)
    with pytest.raises(
        UsageError, match=rf"2 products are named 'map.fits'; .* {other} \(output/plots/map.fits of run"
    ):
        find("map.fits")


def test_lineage_of_a_large_diamond_is_complete(empty: Observatory) -> None:
    """1000 scans, each calibrated, all of them read by two steps that the map reads both."""
    conn = empty.conn
    for name, after in (("flag", "calibrate"), ("flux", "calibrate")):
        empty.step("maps", name, SOURCE, after=(after,))
    rows = {"n": 1000, "step": empty.steps["calibrate"], "pipeline": empty.pipelines["maps"]}
    rows |= {"version": empty.version, "obs": empty.obs_units["NGC253"], "module": empty.module, "loc": empty.cologne}
    for sql in (
        "INSERT INTO executed_obs_unit (name, obs_unit_id) SELECT 'e' || i, :obs FROM generate_series(1, :n) i",
        """INSERT INTO raw_data_package (name, executed_obs_unit_id, instrument_module_id, size)
           SELECT 'raw-' || e.name, e.id, :module, 1 FROM executed_obs_unit e WHERE e.name LIKE 'e%'""",
        "INSERT INTO unit (pipeline_id, dims, key, generation, members)"
        " SELECT :pipeline, '[\"executed_obs_unit\"]', 'e' || i, 1, 1 FROM generate_series(1, :n) i",
        """INSERT INTO unit_member (unit_id, package_id, added)
           SELECT u.id, k.id, 1 FROM unit u JOIN raw_data_package k ON k.name = 'raw-' || u.key""",
        """INSERT INTO run (location_id, pipeline_id, pipeline_name, step_id, step_name, unit_id, generation, wanted,
               software_version_id, cpu, memory_gb, state, chart_version, finished_at)
           SELECT :loc, :pipeline, 'maps', :step, 'calibrate', u.id, 1, 'w', :version, 1, 1, 'COMPLETED', 1, now()
           FROM unit u WHERE u.key ~ '^e[0-9]+$'""",
        """INSERT INTO data_product (run_id, attempt, type, path, size, checksum)
           SELECT r.id, 1, t, 'workspace/calibrate/' || t, 1, 'sha256:00'
           FROM run r, unnest(ARRAY['INTERMEDIATE', 'LOG']) t""",
    ):
        conn.execute(text(sql), rows)
    calibrated = list(conn.execute(text("SELECT id FROM run ORDER BY id")).scalars())
    middle = [empty.run(step, "ngc253", "COMPLETED", reads=calibrated) for step in ("flag", "flux")]
    final = empty.run("map", "ngc253", "COMPLETED", reads=middle)
    product = empty.product(final, "output/science/map.fits", ProductType.SCIENCE)
    with statements(conn) as asked:
        root = views.lineage(conn, LineageKind.PRODUCT, product)
    assert len(asked) <= 8
    assert {label for kind, label in names(root.upstream, "upstream") if kind == "package"} == {
        f"raw-e{i}" for i in range(1, 1001)
    }
    # The map and two runs; a file, a run and a package for each scan, and each file once more.
    assert size(root.upstream, "upstream") == 3 + 3 * 1000 + 1000
    package = views.lineage(conn, LineageKind.PACKAGE, "raw-e500")
    assert ("product", "output/science/map.fits") in names(package.downstream, "downstream")
    assert len(views.tree(root).splitlines()) == 5 + 3 * 1000 + 1000
    arrows = re.findall(r"^ +\w+ --> \w+$", views.mermaid(root), re.MULTILINE)
    assert len(arrows) == len(set(arrows)) == 1000 + 1000 + 2000 + 2 + 1


def test_lineage_of_a_ladder_of_diamonds_does_not_explode(empty: Observatory) -> None:
    """Forty times two runs that read both of the two before: 2^40 ways from top to bottom."""
    conn = empty.conn
    level: list[int] = []
    bottom = 0
    # A query that goes every way would not end, and a test that hangs in the server cannot be stopped from here.
    conn.execute(text("SET statement_timeout TO '60s'"))
    for depth in range(40):
        lower, level = level, []
        for side in "ab":
            unit = f"{depth}{side}"
            empty.unit("maps", SCAN, unit)
            level.append(empty.run("calibrate", unit, "COMPLETED", reads=lower))
        bottom = bottom or level[0]
    up = views.lineage(conn, LineageKind.RUN, level[0])
    assert size(up.upstream, "upstream") == 2 + 38 * 4
    down = views.lineage(conn, LineageKind.RUN, bottom)
    assert size(down.downstream, "downstream") == size(up.upstream, "upstream")
    assert views.mermaid(up).count("-->") == 2 + 38 * 4


def test_lineage_as_text(conn: Connection, night: Night) -> None:
    root = views.lineage(conn, LineageKind.RUN, night.first)
    assert views.tree(root) == (
        f"run {night.first} maps/calibrate scan-1 (COMPLETED, reduce 2.1.0, config gains revision 3)\n"
        "made from\n"
        "├─ package p1 (archived, 1000 bytes)\n"
        "└─ package p2 (archived, 1000 bytes)\n"
        "used for\n"
        "├─ product workspace/calibrate/logs/job.log (LOG, 10 bytes)\n"
        f"└─ product workspace/calibrate/scan-1.fits (INTERMEDIATE, 10 bytes, superseded by run {night.again})\n"
        f"   └─ run {night.map} maps/map ngc253 (COMPLETED, reduce 2.1.0)\n"
        "      └─ product output/science/map.fits (SCIENCE, 10 bytes)\n"
    )
    shared = LineageNode(kind=LineageKind.PACKAGE, id=1, label="p", note="n")
    again = LineageNode(kind=LineageKind.PACKAGE, id=1, label="p", repeated=True)
    assert views.tree(LineageNode(kind=LineageKind.RUN, id=2, label="a/b c", upstream=[shared, again])) == (
        "run 2 a/b c\nmade from\n├─ package p (n)\n└─ package p (see above)\n"
    )


def test_lineage_as_a_flowchart(conn: Connection, night: Night) -> None:
    assert views.mermaid(views.lineage(conn, LineageKind.PRODUCT, night.old_file)).splitlines() == [
        "flowchart LR",
        f'    product{night.old_file}(["product workspace/calibrate/scan-1.fits"])',
        f'    run{night.first}["run {night.first} maps/calibrate scan-1"]',
        f'    package{night.packages["p1"]}[("package p1")]',
        f'    package{night.packages["p2"]}[("package p2")]',
        f'    run{night.map}["run {night.map} maps/map ngc253"]',
        f'    product{night.map_file}(["product output/science/map.fits"])',
        f"    package{night.packages['p1']} --> run{night.first}",
        f"    package{night.packages['p2']} --> run{night.first}",
        f"    run{night.first} --> product{night.old_file}",
        f"    run{night.map} --> product{night.map_file}",
        f"    product{night.old_file} --> run{night.map}",
        f"    style product{night.old_file} stroke-width:3px",
    ]
    awkward = LineageNode(kind=LineageKind.PACKAGE, id=1, label='a"]; b#<i>`')
    assert '[("package a#34;#93;#59; b#35;#60;i#62;#96;")]' in views.mermaid(awkward)


# --- what lies in a unit ---


def test_units_of_an_upstream_step_that_lie_in_a_unit(conn: Connection, night: Night) -> None:
    """The one rule for what a unit waits for, what its run reads, and what its digest is made of."""
    night.unit("maps", SCAN, "elsewhere")
    night.package("p5", "elsewhere", source="M51")
    night.unit("maps", LINE, "co")
    night.package("p6", "co")
    night.conn.execute(insert(schema.unit_edge).values(upper_id=night.units["ngc253"], lower_id=night.units["co"]))
    night.step("maps", "flag", SCAN, after=("calibrate",))

    def inside(step: str, unit: str) -> list[str]:
        found = conn.execute(
            text(
                f"""
                SELECT l.key FROM reduction_step s JOIN step_dependency d ON d.step_id = s.id
                JOIN reduction_step us ON us.id = d.upstream_id JOIN unit u ON u.id = :unit
                JOIN LATERAL ({schema.UNITS_INSIDE}) l ON true WHERE s.id = :step ORDER BY l.key
                """
            ),
            {"step": night.steps[step], "unit": night.units[unit]},
        )
        return list(found.scalars())

    assert inside("map", "ngc253") == ["scan-1", "scan-2", "scan-3"]  # not of other dimensions, not of other sources
    assert inside("flag", "scan-2") == ["scan-2"]  # of the same dimensions: the unit itself
    night.leave("p4", "scan-3")
    assert inside("map", "ngc253") == ["scan-1", "scan-2"]  # not what has lost all its members


# --- lists ---


def test_packages(conn: Connection, night: Night) -> None:
    night.package("100%_sure", state="transferring")
    night.add(schema.physical_copy, location_id=night.cologne, package_id=night.packages["p4"], status="staged")
    night.add(schema.physical_copy, location_id=night.cologne, package_id=night.packages["p3"], status="deleted")
    lines = views.packages(conn)
    assert [p.name for p in lines] == ["100%_sure", "p4", "p3", "p2", "p1"]
    assert (lines[1].size, lines[1].files, lines[1].executed_obs_unit) == (1000, 1, "scan of p4")
    assert lines[1].instrument_module == "LFA"
    assert lines[1].copies == {"archive": "present", "cologne": "staged"}
    assert lines[2].copies == {"archive": "present"}

    def found(pattern: str) -> list[str]:
        return [p.name for p in views.packages(conn, pattern=pattern)]

    assert found("p?") == ["p4", "p3", "p2", "p1"]
    assert found("*_*") == found("1*%*") == found("100%_sure") == ["100%_sure"]
    assert found("%?") == []
    assert [p.name for p in views.packages(conn, limit=1)] == ["100%_sure"]
    assert [p.name for p in views.packages(conn, state="archived", limit=1)] == ["p4"]
    with pytest.raises(NotFoundError, match="unknown raw data package 'p9'; allowed: 100%_sure, p1, p2"):
        views.packages(conn, pattern="p9")


def test_counts(conn: Connection, night: Night) -> None:
    conn.execute(text("UPDATE event SET done_at = now() WHERE recipient IN ('', 'worker')"))
    conn.execute(text("UPDATE event SET created_at = now() - interval '1 hour' WHERE type = 'run.failed'"))
    night.add(schema.dead_letter, location_id=night.cologne, stream="s", entry_id="1", body=b"", reason="r")
    night.add(
        schema.dead_letter, location_id=night.cologne, stream="s", entry_id="2", body=b"", reason="r", state="dropped"
    )
    counts = views.counts(conn, night.cologne)
    assert set(counts.runs) == set(RunState)
    assert {s: n for s, n in counts.runs.items() if n} == {
        "COMPLETED": 3,
        "FAILED": 1,
        "CANCELLED": 1,
        "RUNNING": 1,
        "PENDING": 1,
    }
    assert counts.tasks == {"stage": {"done": 6}}
    pending = {p.recipient: p for p in counts.pending}
    assert set(pending) == {"result-manager", "trigger-manager", "workflow-manager"}
    assert (pending["workflow-manager"].events, pending["trigger-manager"].events) == (7, 5)
    assert 3600 <= pending["trigger-manager"].oldest_seconds < 7200
    assert 0 <= pending["workflow-manager"].oldest_seconds < 3600
    assert counts.dead_letters == 1
    nothing = views.counts(conn, night.archive)
    assert (sum(nothing.runs.values()), nothing.tasks, nothing.pending, nothing.dead_letters) == (0, {}, [], 0)
