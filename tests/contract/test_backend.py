"""What every backend promises; one suite for all of them."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest

from wfm import backends
from wfm.backends import Backend, runjob
from wfm.backends.local import LocalBackend
from wfm.errors import UnavailableError, WfmError
from wfm.model import FailureClass, JobRef, JobSpec, JobStatus, Report, Resources

T = TypeVar("T")

LIMIT_SECONDS = 60
ENDED = {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.VANISHED}


def eventually(what: Callable[[], T], good: Callable[[T], object] = bool) -> T:
    """The first good value of `what`; fails after a generous time."""
    until = time.monotonic() + LIMIT_SECONDS
    while not good(value := what()):
        assert time.monotonic() < until, f"it did not come about; last seen: {value}"
        time.sleep(0.01)
    return value


def lives(pid: int) -> bool:
    """Whether a process executes (a zombie does not)."""
    try:
        return runjob.process_stat(pid)[0] not in (b"Z", b"X")
    except OSError:
        return False


class LocalHarness:
    """Local jobs. Other backends bring the same methods."""

    def __init__(self) -> None:
        self._opened: list[LocalBackend] = []

    def open(self) -> Backend:
        """A backend as another process would open it."""
        self._opened.append(LocalBackend(poll_seconds=0.01, grace_seconds=0.5))
        return self._opened[-1]

    def kill_supervisor(self, handle: str) -> None:
        """Make a job vanish: kill what runs it, without a chance to write a record."""
        os.kill(int(handle.partition(":")[0]), signal.SIGKILL)

    def close(self) -> None:
        for backend in self._opened:
            backend.close()


HARNESSES = {"local": LocalHarness}


class Bench:
    """A backend, and short ways to use it."""

    def __init__(self, harness: LocalHarness, directory: Path) -> None:
        self.harness = harness
        self.backend = harness.open()
        self.directory = directory
        self.jobs: list[JobRef] = []

    def spec(
        self,
        *command: str,
        name: str = "job-1",
        environment: Mapping[str, str] | None = None,
        time_hours: float | None = None,
        cwd: Path | None = None,
    ) -> JobSpec:
        attempt = self.directory / name
        (attempt / "logs").mkdir(parents=True, exist_ok=True)
        self.jobs.append(JobRef(name, str(attempt)))
        resources = Resources(time_hours=time_hours)
        return JobSpec(name, str(attempt), command, dict(environment or {}), str(cwd or attempt), resources)

    def submit(self, spec: JobSpec) -> JobRef:
        job = self.backend.submit([spec])[spec.name]
        assert isinstance(job, JobRef), job
        assert (job.name, job.directory) == (spec.name, spec.directory)
        return job

    def report(self, job: JobRef) -> Report:
        return self.backend.poll([job])[job.name]

    def end(self, job: JobRef) -> Report:
        """The report of a job once it has ended."""
        return eventually(lambda: self.report(job), lambda report: report.status in ENDED)

    def running(self, job: JobRef) -> Report:
        """The report of a job once it executes."""
        return eventually(lambda: self.report(job), lambda report: report.status is JobStatus.RUNNING)

    def cancel(self, job: JobRef) -> Report:
        """Cancel, and ask again until it is done, as a worker does."""
        return eventually(lambda: self.backend.cancel([job])[job.name], lambda report: report.status in ENDED)

    def run(self, spec: JobSpec) -> Report:
        return self.end(self.submit(spec))

    def written(self, path: Path) -> str:
        """Content of a file that a job writes and ends with a newline."""
        return eventually(lambda: path.read_text() if path.exists() else "", lambda text: text.endswith("\n"))

    def log(self, job: JobRef) -> str:
        return Path(self.backend.logs(job)).read_text()


@pytest.fixture(params=sorted(HARNESSES))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    harness = HARNESSES[request.param]()
    bench = Bench(harness, tmp_path)
    yield bench
    for job in bench.jobs:
        bench.cancel(job)
    harness.close()


# --- how jobs end ---------------------------------------------------------------------------------------------------


def test_success(bench: Bench) -> None:
    before = time.time()
    report = bench.run(bench.spec("true"))
    assert report.status is JobStatus.COMPLETED
    assert (report.exit_code, report.signal, report.failure) == (0, None, None)
    assert report.node
    record = report.evidence["exit.json"]
    assert before <= record["started_at"] <= record["finished_at"] <= time.time()
    assert report.wall_seconds is not None
    assert 0 < report.wall_seconds <= time.time() - before


def test_exit_code(bench: Bench) -> None:
    report = bench.run(bench.spec("sh", "-c", "exit 3"))
    assert report.status is JobStatus.FAILED
    assert (report.exit_code, report.signal, report.failure) == (3, None, FailureClass.EXIT)
    assert "exit code 3" in report.reason


def test_ended_by_signal(bench: Bench) -> None:
    report = bench.run(bench.spec("sh", "-c", "kill -SEGV $$"))
    assert report.status is JobStatus.FAILED
    assert (report.exit_code, report.signal, report.failure) == (None, signal.SIGSEGV, FailureClass.SIGNAL)
    assert "SIGSEGV" in report.reason


def test_command_is_missing(bench: Bench) -> None:
    report = bench.run(bench.spec("no-such-command"))
    assert report.status is JobStatus.FAILED
    assert (report.exit_code, report.failure) == (127, FailureClass.NOT_FOUND)
    assert "'no-such-command'" in report.reason


def test_command_is_not_executable(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program\n")
    report = bench.run(bench.spec(str(tmp_path / "text")))
    assert report.status is JobStatus.FAILED
    assert (report.exit_code, report.failure) == (126, FailureClass.NOT_FOUND)
    assert f"'{tmp_path}/text'" in report.reason


def test_working_directory_is_missing(bench: Bench, tmp_path: Path) -> None:
    report = bench.run(bench.spec("true", cwd=tmp_path / "nowhere"))
    assert report.status is JobStatus.FAILED
    assert (report.exit_code, report.failure) == (126, FailureClass.EXIT)
    assert f"{tmp_path}/nowhere" in report.reason


def test_time_limit(bench: Bench) -> None:
    report = bench.run(bench.spec("sleep", "1000", time_hours=0.05 / 3600))
    assert report.status is JobStatus.FAILED
    assert (report.signal, report.failure) == (signal.SIGTERM, FailureClass.TIMEOUT)
    assert "time limit" in report.reason


def test_time_limit_of_a_job_that_ignores_the_request_to_end(bench: Bench) -> None:
    report = bench.run(bench.spec("sh", "-c", "trap '' TERM; sleep 1000; sleep 1000", time_hours=0.5 / 3600))
    assert (report.status, report.failure) == (JobStatus.FAILED, FailureClass.TIMEOUT)
    assert report.signal == signal.SIGKILL


def test_a_job_may_clean_up_at_its_time_limit(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", "trap 'echo cleaned > up; exit 0' TERM; sleep 1000 & wait", time_hours=0.5 / 3600)
    report = bench.run(spec)
    assert (report.status, report.failure) == (JobStatus.FAILED, FailureClass.TIMEOUT)
    assert Path(spec.directory, "up").read_text() == "cleaned\n"


# --- what a job gets, and what it costs -----------------------------------------------------------------------------


def test_output_goes_to_the_log(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", "echo to out; echo to err >&2; cat")
    shutil.rmtree(Path(spec.directory, "logs"))
    job = bench.submit(spec)
    assert bench.end(job).status is JobStatus.COMPLETED  # so there is nothing to read on standard input
    assert bench.log(job) == "to out\nto err\n"


def test_environment_and_working_directory(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SERVICE", "hunter2")
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    environment = {"COLOUR": "grün", "TWO_LINES": "a\nb=c", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    spec = bench.spec("sh", "-c", 'pwd; echo "$COLOUR"; env -0 > env', environment=environment, cwd=cwd)
    job = bench.submit(spec)
    assert bench.end(job).status is JobStatus.COMPLETED
    assert bench.log(job) == f"{cwd}\ngrün\n"
    seen = dict(line.split("=", 1) for line in (cwd / "env").read_text().split("\0") if line)
    assert environment.items() <= seen.items()
    assert "HOME" in seen
    assert "SECRET_OF_THE_SERVICE" not in seen


def test_resource_figures(bench: Bench) -> None:
    code = (
        "import os, time\n"
        "b = bytearray(200_000_000)\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "else:\n"
        "    while time.process_time() < 0.3: pass\n"
    )
    report = bench.run(bench.spec(sys.executable, "-S", "-c", code))
    assert report.status is JobStatus.COMPLETED
    assert report.peak_memory_gb is not None
    assert report.cpu_hours is not None
    assert report.wall_seconds is not None
    assert 0.2 <= report.peak_memory_gb < 0.3
    assert 0.3 <= report.cpu_hours * 3600 < 5
    assert report.wall_seconds >= 0.3


# --- one attempt, one execution -------------------------------------------------------------------------------------


def ledger_job(bench: Bench, name: str = "job-1") -> tuple[JobSpec, Path]:
    """A job that writes a line for every execution of it."""
    ledger = bench.directory / f"{name}.ledger"
    return bench.spec("sh", "-c", f"echo executed >> {ledger}; sleep 0.1", name=name), ledger


def test_second_submit_adopts(bench: Bench) -> None:
    spec, ledger = ledger_job(bench)
    first = bench.submit(spec)
    second = bench.submit(spec)
    assert bench.end(first).status is JobStatus.COMPLETED
    third = bench.submit(spec)
    assert bench.report(third).status is JobStatus.COMPLETED
    assert second.handle in ("", first.handle)  # it may have been asked before the claim
    assert third.handle == first.handle
    assert ledger.read_text() == "executed\n"


def test_concurrent_submits_execute_once(bench: Bench) -> None:
    spec, ledger = ledger_job(bench)
    several = [bench.backend, *(bench.harness.open() for _ in range(3))]
    start = threading.Barrier(20)
    answers: list[JobRef | Exception] = []

    def submit(backend: Backend) -> None:
        start.wait()
        answers.append(backend.submit([spec])[spec.name])

    threads = [threading.Thread(target=submit, args=[several[number % 4]]) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(answer, JobRef) for answer in answers)
    assert len(answers) == 20
    report = bench.end(JobRef(spec.name, spec.directory))
    assert report.status is JobStatus.COMPLETED
    assert {answer.handle for answer in answers if isinstance(answer, JobRef)} <= {"", report.handle}
    assert ledger.read_text() == "executed\n"


def test_many_jobs_in_one_batch(bench: Bench) -> None:
    specs = [bench.spec("sh", "-c", f"exit {number % 2}", name=f"job-{number}") for number in range(50)]
    answers = bench.backend.submit(specs)
    jobs = [job for job in answers.values() if isinstance(job, JobRef)]
    assert [job.name for job in jobs] == [spec.name for spec in specs]
    reports = [bench.end(job) for job in jobs]
    assert [report.exit_code for report in reports] == [0, 1] * 25


def test_bad_jobs_do_not_harm_the_batch(bench: Bench, tmp_path: Path) -> None:
    good = bench.spec("true", name="good")
    empty = bench.spec(name="empty")
    nowhere = JobSpec("nowhere", str(tmp_path / "not" / "there"), ("true",), {}, str(tmp_path), Resources())
    relative = JobSpec("relative", "here", ("true",), {}, str(tmp_path), Resources())
    answers = bench.backend.submit([empty, nowhere, relative, good])
    assert isinstance(answers["nowhere"], UnavailableError)
    for name, text in {"empty": "command is empty", "relative": "'here' is not an absolute path"}.items():
        refusal = answers[name]
        assert isinstance(refusal, WfmError)
        assert not isinstance(refusal, UnavailableError)
        assert text in str(refusal)
    assert isinstance(answers["good"], JobRef)
    assert bench.end(answers["good"]).status is JobStatus.COMPLETED


def test_the_directory_of_another_job_is_refused(bench: Bench) -> None:
    spec, ledger = ledger_job(bench)
    bench.run(spec)
    other = JobSpec("job-2", spec.directory, ("true",), {}, spec.directory, Resources())
    refusal = bench.backend.submit([other])["job-2"]
    assert isinstance(refusal, WfmError)
    assert "job-1" in str(refusal)
    assert bench.report(JobRef("job-2", spec.directory)).status is JobStatus.UNKNOWN
    assert ledger.read_text() == "executed\n"


# --- looking jobs up ------------------------------------------------------------------------------------------------


def test_a_running_job_is_running(bench: Bench) -> None:
    spec = bench.spec("sleep", "1000")
    job = bench.submit(spec)
    assert bench.running(job).handle == job.handle


def test_find_needs_no_handle(bench: Bench) -> None:
    spec = bench.spec("sleep", "1000")
    handle = bench.submit(spec).handle
    nameless = JobRef(spec.name, spec.directory)
    other = bench.harness.open()
    found = eventually(lambda: other.find([nameless])[spec.name], lambda report: report.status is JobStatus.RUNNING)
    assert found.handle == handle


def test_a_submitted_job_is_never_absent(bench: Bench) -> None:
    for number in range(20):
        spec = bench.spec("true", name=f"job-{number}")
        job = bench.submit(spec)
        while (status := bench.backend.find([job])[job.name].status) is not JobStatus.COMPLETED:
            assert status in (JobStatus.PENDING, JobStatus.RUNNING)


def test_absence(bench: Bench) -> None:
    spec = bench.spec("true")
    job = JobRef(spec.name, spec.directory)
    assert bench.backend.find([job])[job.name].status is JobStatus.ABSENT
    assert bench.report(job).status is JobStatus.ABSENT


def test_absence_of_the_attempt_directory_in_a_reachable_place(bench: Bench, tmp_path: Path) -> None:
    job = JobRef("job-1", str(tmp_path / "never-made"))
    assert bench.backend.find([job])[job.name].status is JobStatus.ABSENT


def test_unreachable_directories_are_unknown(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    jobs = [
        JobRef("gone", str(tmp_path / "not-mounted" / "attempt"), "1:2:3"),
        JobRef("broken", str(tmp_path / "loop")),
        JobRef("beneath", str(tmp_path / "file" / "attempt")),
    ]
    for reports in (bench.backend.find(jobs), bench.backend.poll(jobs), bench.backend.cancel(jobs)):
        assert {name: report.status for name, report in reports.items()} == dict.fromkeys(
            ("gone", "broken", "beneath"), JobStatus.UNKNOWN
        )
        assert "No such file" in reports["gone"].reason
        assert reports["gone"].handle == "1:2:3"
    assert not (tmp_path / "not-mounted").exists()


def test_a_vanished_job(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", "echo $$ > pid; exec sleep 1000")
    job = bench.submit(spec)
    pid = int(bench.written(Path(spec.directory, "pid")))
    bench.harness.kill_supervisor(job.handle)
    assert bench.end(job).status is JobStatus.VANISHED
    eventually(lambda: not lives(pid))
    assert bench.backend.find([job])[job.name].status is JobStatus.VANISHED
    again = bench.submit(spec)
    assert bench.report(again).status is JobStatus.VANISHED


def test_a_broken_exit_record_is_no_record(bench: Bench) -> None:
    spec = bench.spec("true")
    Path(spec.directory, backends.CLAIM).mkdir()
    record = Path(spec.directory, backends.EXIT_RECORD)
    for content in (b"", b'{"exit_code": 0}', b"\xff"):
        record.write_bytes(content)
        assert bench.report(JobRef(spec.name, spec.directory)).status is JobStatus.VANISHED


# --- cancelling -----------------------------------------------------------------------------------------------------


def test_cancelled_before_it_is_submitted(bench: Bench) -> None:
    spec, ledger = ledger_job(bench)
    job = JobRef(spec.name, spec.directory)
    assert bench.backend.cancel([job])[job.name].status is JobStatus.CANCELLED
    assert Path(spec.directory, backends.CANCELLED).exists()
    bench.submit(spec)
    assert bench.end(job).status is JobStatus.CANCELLED
    assert not ledger.exists()
    assert not Path(spec.directory, backends.EXIT_RECORD).exists()
    assert not Path(spec.directory, backends.JOB_LOG).exists()


def test_cancelled_before_its_directory_is_made(bench: Bench, tmp_path: Path) -> None:
    job = JobRef("job-1", str(tmp_path / "job-1"))
    assert bench.backend.cancel([job])[job.name].status is JobStatus.CANCELLED
    spec, ledger = ledger_job(bench)
    bench.submit(spec)
    assert bench.end(job).status is JobStatus.CANCELLED
    assert not ledger.exists()


def test_cancel_at_any_moment_either_prevents_the_job_or_stops_it(bench: Bench) -> None:
    for number in range(20):
        spec = bench.spec("sleep", "1000", name=f"job-{number}")
        job = bench.submit(spec)
        time.sleep(number * 0.0005)  # lands before the claim, before the start and after it
        assert bench.cancel(job).status is JobStatus.CANCELLED
        assert bench.report(job).status is JobStatus.CANCELLED


FAMILY = (  # a child in the group, a grandchild, one that ignores SIGTERM, and one in a session of its own
    "sleep 1000 & echo $! >> pids\n"
    "sh -c 'sleep 1000 & echo $! >> pids; wait' &\n"
    "sh -c 'trap \"\" TERM; echo $$ >> pids; sleep 1000; sleep 1000' &\n"
    "setsid sh -c 'echo $$ >> pids; exec sleep 1000' &\n"
)


def family(spec: JobSpec) -> list[int]:
    path = Path(spec.directory, "pids")
    return eventually(lambda: list(map(int, path.read_text().split())) if path.exists() else [], lambda p: len(p) == 4)


def test_cancel_ends_all_processes_of_a_running_job(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", FAMILY + "wait")
    job = bench.submit(spec)
    pids = family(spec)
    assert all(lives(pid) for pid in pids)
    report = bench.cancel(job)
    assert report.status is JobStatus.CANCELLED
    assert not any(lives(pid) for pid in pids)
    assert report.wall_seconds is not None  # what it cost until then is known


def test_nothing_outlives_a_job_that_ends(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", FAMILY + "while [ $(wc -l < pids) -lt 4 ]; do sleep 0.01; done")
    assert bench.run(spec).status is JobStatus.COMPLETED
    assert not any(lives(pid) for pid in family(spec))


def test_the_mark_alone_ends_a_running_job(bench: Bench) -> None:
    """Also where no signal of the canceller reaches, from another machine for example."""
    job = bench.submit(bench.spec("sleep", "1000"))
    bench.running(job)
    Path(job.directory, backends.CANCELLED).touch()
    assert bench.end(job).status is JobStatus.CANCELLED


@pytest.mark.parametrize(("code", "status"), [(0, JobStatus.COMPLETED), (3, JobStatus.FAILED)])
def test_cancel_of_an_ended_job_tells_the_truth(bench: Bench, code: int, status: JobStatus) -> None:
    job = bench.submit(bench.spec("sh", "-c", f"exit {code}"))
    bench.end(job)
    report = bench.backend.cancel([job])[job.name]
    assert (report.status, report.exit_code) == (status, code)


def test_cancel_ends_what_a_vanished_job_left_behind(bench: Bench) -> None:
    spec = bench.spec("sh", "-c", FAMILY + "wait")
    job = bench.submit(spec)
    pids = family(spec)
    bench.harness.kill_supervisor(job.handle)
    assert bench.end(job).status is JobStatus.VANISHED
    assert bench.cancel(job).status is JobStatus.CANCELLED
    assert not any(lives(pid) for pid in pids)
