"""Jobs on this machine: each under a supervisor of its own that outlives the worker.

What is known of a job lies in its attempt directory, so any process that sees the directory can ask for it; see
`wfm.backends.runjob` for the files and for the rules that the supervisor keeps.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from wfm.backends import runjob
from wfm.errors import UnavailableError, UsageError, WfmError
from wfm.model import FailureClass, JobRef, JobSpec, JobStatus, Report

T = TypeVar("T")

CANCEL_WAIT_SECONDS = 2.0
"""How long `LocalBackend.cancel` waits for the jobs to end before it reports what it sees."""
OVERDUE_SECONDS = 10.0
"""How long after the grace a supervisor must have obeyed a cancellation; then it is taken for stuck, and killed."""


class LocalBackend:
    """Executes jobs directly on this machine. Safe to use from several threads.

    Jobs are not limited in memory or cores: the machine is the user's.

    Args:
        poll_seconds: shortest useful time between two polls.
        grace_seconds: what a job that must end has between SIGTERM and SIGKILL.
    """

    name = "local"

    def __init__(self, poll_seconds: float = 0.05, grace_seconds: float = runjob.GRACE_SECONDS) -> None:
        self.poll_seconds = poll_seconds
        self._grace_seconds = grace_seconds
        self._launcher = _Launcher()

    def submit(self, specs: Sequence[JobSpec]) -> Mapping[str, JobRef | Exception]:
        """Start or adopt jobs; see `wfm.backends.Backend.submit`.

        A job with a `CANCELLED` mark is accepted and refuses itself.
        """
        answers: dict[str, JobRef | Exception] = {}
        ready: list[JobSpec] = []
        for spec in specs:
            try:
                if self._prepare(spec):
                    ready.append(spec)
                else:
                    answers[spec.name] = _adopt(spec)
            except WfmError as error:
                answers[spec.name] = error
        try:
            launched = self._launcher.launch([spec.directory for spec in ready]) if ready else []
        except UnavailableError as error:
            return {**answers, **dict.fromkeys((spec.name for spec in ready), error)}
        for spec, answer in zip(ready, launched, strict=True):
            if "handle" in answer:
                answers[spec.name] = JobRef(spec.name, spec.directory, answer["handle"])
            elif "adopt" in answer:
                answers[spec.name] = _adopt(spec)
            else:
                answers[spec.name] = UnavailableError(f"job {spec.name}: {answer['error']}")
        return answers

    def poll(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        """What became of these jobs; by name."""
        return {job.name: _look(job)[0] for job in jobs}

    find = poll  # the attempt directory is all that either needs

    def cancel(self, jobs: Sequence[JobRef]) -> Mapping[str, Report]:
        """Mark the jobs as cancelled, stop what runs, wait up to `CANCEL_WAIT_SECONDS`, and report what is seen then.

        A job that needs longer is reported RUNNING: ask again. A supervisor that has not obeyed
        `OVERDUE_SECONDS` after the grace is killed, and so is whatever a dead supervisor left behind.
        """
        reports: dict[str, Report] = {}
        open_jobs: dict[str, JobRef] = {}
        for job in jobs:
            try:
                _mark(job.directory)
                open_jobs[job.name] = job
            except OSError as error:
                reports[job.name] = _unreachable(job, error)
        signalled: set[str] = set()
        until = time.monotonic() + CANCEL_WAIT_SECONDS
        while open_jobs:
            for job in list(open_jobs.values()):
                report, seen = _look(job)
                if report.status is JobStatus.RUNNING:
                    if job.name not in signalled and seen.owner and self._signal(job, seen.owner):
                        signalled.add(job.name)
                elif _kill_strays(job, seen):
                    report = msgspec.structs.replace(report, status=JobStatus.RUNNING, reason="its last processes die")
                elif report.status is not JobStatus.PENDING:  # a starting supervisor will see the mark
                    del open_jobs[job.name]
                reports[job.name] = report
            if time.monotonic() >= until:
                break
            time.sleep(min(self.poll_seconds, 0.05))
        return reports

    def logs(self, job: JobRef) -> str:
        """Absolute path of the job's log file."""
        return os.path.join(job.directory, runjob.JOB_LOG)

    def close(self) -> None:
        """End the launcher, as the end of this process would; the jobs go on."""
        self._launcher.stop()

    def _prepare(self, spec: JobSpec) -> bool:
        """Write ``job.json``; False if the job was started before.

        Raises:
            UsageError: no such job can exist.
            UnavailableError: the directory is out of reach.
        """
        faults = [
            f"{what} {value!r} is not an absolute path"
            for what, value in (("directory", spec.directory), ("working directory", spec.working_directory))
            if not os.path.isabs(value)
        ]
        if not spec.command:
            faults.append("the command is empty")
        if faults:
            raise UsageError(f"job {spec.name}: {'; '.join(faults)}")
        directory = spec.directory
        try:
            if any(runjob.present(os.path.join(directory, name)) for name in (runjob.CLAIM, runjob.EXIT_RECORD)):
                return False
            content = msgspec.to_builtins(spec)
            del content["directory"]
            runjob.write_json(os.path.join(directory, runjob.JOB), {**content, "grace_seconds": self._grace_seconds})
        except OSError as error:
            raise UnavailableError(f"job {spec.name}: {error}") from error
        return True

    def _signal(self, job: JobRef, owner: _Owner) -> bool:
        """Tell a supervisor to end its job; False if it cannot be reached from here (it sees the mark soon)."""
        with _process(owner) as process, contextlib.suppress(OSError):
            if process is not None:
                marked = os.stat(os.path.join(job.directory, runjob.CANCELLED)).st_mtime
                overdue = time.time() - marked > self._grace_seconds + OVERDUE_SECONDS
                signal.pidfd_send_signal(process, signal.SIGKILL if overdue else signal.SIGTERM)
                return True
        return False


def _adopt(spec: JobSpec) -> JobRef | WfmError:
    """The job that was started before."""
    job = JobRef(spec.name, spec.directory)
    try:
        seen = _observe(spec.directory)
    except OSError as error:
        return UnavailableError(f"job {spec.name}: {error}")
    if strangers := _strangers(job, seen):
        return UsageError(f"job {spec.name}: {spec.directory} belongs to another job, {strangers}")
    return JobRef(spec.name, spec.directory, seen.owner.handle if seen.owner else "")


# --- what is seen of a job, and what follows ------------------------------------------------------------------------


class _Owner(Struct, frozen=True):
    """Content of ``claim/owner.json``."""

    name: str
    pid: int
    start_time: int
    boot_id: str
    host: str

    @property
    def handle(self) -> str:
        return f"{self.pid}:{self.start_time}:{self.boot_id}"


class _Record(Struct, frozen=True):
    """Content of ``exit.json``."""

    name: str
    node: str
    exit_code: int | None
    signal: int | None
    failure: Literal["", "exit", "command_not_found", "timeout", "out_of_memory", "signal", "cancelled"]
    reason: str
    started_at: float
    finished_at: float
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


class _Seen(Struct, frozen=True):
    """One look at an attempt directory.

    Attributes:
        cancelled: the mark lies there.
        claimed: somebody owns the attempt.
        alive: a supervisor is on its way or alive.
        owner: None also for the moment between the claim and its owner's name.
        record: None also if what lies there is no exit record.
    """

    cancelled: bool = False
    claimed: bool = False
    alive: bool = False
    owner: _Owner | None = None
    record: _Record | None = None


def _look(job: JobRef) -> tuple[Report, _Seen]:
    try:
        seen = _observe(job.directory)
    except OSError as error:
        return _unreachable(job, error), _Seen()
    return _report(job, seen), seen


def _unreachable(job: JobRef, error: OSError) -> Report:
    return Report(JobStatus.UNKNOWN, job.handle, reason=f"cannot be asked: {error}", evidence={"error": str(error)})


def _observe(directory: str) -> _Seen:
    """Look at an attempt directory, in the order that makes the conclusions certain while others act.

    A supervisor holds its lock from before the fork until its death; it claims, then writes its record, in between.
    So: mark, then no lock: it will never start. Claim, then no lock, then no record: it died without one. No lock,
    then no claim: nothing had been started. A claim that appears between the two looks decides nothing: look again.

    Raises:
        OSError: the directory cannot be read. A missing one whose parent is there was never made, and that is certain;
            without the parent, it may as well be that the file system is not mounted.
    """
    try:
        os.stat(directory)
    except FileNotFoundError:
        os.stat(os.path.dirname(directory))
        return _Seen()
    cancelled = runjob.present(os.path.join(directory, runjob.CANCELLED))
    while True:
        claimed_before = runjob.present(os.path.join(directory, runjob.CLAIM))
        alive = runjob.is_locked(directory)
        record = _read(os.path.join(directory, runjob.EXIT_RECORD), _Record)
        claimed = runjob.present(os.path.join(directory, runjob.CLAIM))
        if alive or record or claimed == claimed_before:
            owner = _read(os.path.join(directory, runjob.OWNER), _Owner)
            return _Seen(cancelled, claimed, alive, owner, record)


def _read(path: str, kind: type[T]) -> T | None:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _report(job: JobRef, seen: _Seen) -> Report:
    """What follows from a look."""
    owner, record = seen.owner, seen.record
    evidence: dict[str, Any] = {
        "claim": msgspec.to_builtins(owner) if owner else seen.claimed,
        "supervisor": "alive" if seen.alive else "gone",
        "cancelled": seen.cancelled,
        "exit.json": msgspec.to_builtins(record),
    }
    handle, node = (owner.handle, owner.host) if owner else ("", "")

    def report(status: JobStatus, reason: str) -> Report:
        return Report(status, handle, node=node, reason=reason, evidence=evidence)

    if strangers := _strangers(job, seen):
        return report(JobStatus.UNKNOWN, f"the directory belongs to another job, {strangers}")
    if record:
        return _ended(record, handle, evidence)
    if seen.alive:
        if owner:
            return report(JobStatus.RUNNING, "")
        return report(JobStatus.PENDING, "its supervisor is starting")
    if seen.cancelled:
        return report(JobStatus.CANCELLED, "cancelled; nothing runs" if seen.claimed else "cancelled before it started")
    if seen.claimed:
        return report(JobStatus.VANISHED, "its supervisor is gone and left no exit record")
    return report(JobStatus.ABSENT, "never started")


def _strangers(job: JobRef, seen: _Seen) -> str:
    return ", ".join({found.name for found in (seen.owner, seen.record) if found} - {job.name})


def _ended(record: _Record, handle: str, evidence: dict[str, Any]) -> Report:
    failure = None
    if record.failure == "cancelled":
        status = JobStatus.CANCELLED
    elif record.failure == "" and record.exit_code == 0:
        status = JobStatus.COMPLETED
    else:
        status, failure = JobStatus.FAILED, FailureClass(record.failure or "exit")
    return Report(
        status,
        handle,
        exit_code=record.exit_code,
        signal=record.signal,
        failure=failure,
        wall_seconds=record.wall_seconds,
        cpu_hours=record.cpu_seconds / 3600,
        peak_memory_gb=record.peak_memory_bytes / 1e9,
        node=record.node,
        reason=record.reason,
        evidence=evidence,
    )


# --- stopping -------------------------------------------------------------------------------------------------------


def _mark(directory: str) -> None:
    """Lay down the `CANCELLED` mark so that it survives a power failure.

    Makes a missing attempt directory (not its parents: they tell that the file system is mounted), so that the mark
    also meets a job that is still to come.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory)
        runjob.sync_directory(os.path.dirname(directory))
    mark = os.open(os.path.join(directory, runjob.CANCELLED), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.fsync(mark)
    finally:
        os.close(mark)
    runjob.sync_directory(directory)


@contextlib.contextmanager
def _process(owner: _Owner) -> Iterator[int | None]:
    """A descriptor of exactly the owner's process, for signals; None if it is gone or not of this machine.

    The descriptor is taken first and the start time compared then, so a pid that was given again is never signalled.
    """
    try:
        process = os.pidfd_open(owner.pid)
    except OSError:
        yield None
        return
    try:
        yield process if _is_running(owner) else None
    finally:
        os.close(process)


def _is_running(owner: _Owner) -> bool:
    try:
        return (owner.host, owner.boot_id, owner.start_time) == (
            os.uname().nodename,
            runjob.boot_id(),
            runjob.start_time(owner.pid),
        )
    except OSError:
        return False


def _kill_strays(job: JobRef, seen: _Seen) -> bool:
    """Kill what a supervisor that died without a record left behind; whether something was there."""
    if seen.record or not seen.claimed:
        return False
    tag = f"{runjob.ATTEMPT_DIRECTORY}={job.directory}".encode()
    found = False
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):  # others' processes, and those that end meanwhile
            process = os.pidfd_open(int(entry))
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if tag in file.read().split(b"\0"):
                        signal.pidfd_send_signal(process, signal.SIGKILL)
                        found = True
            finally:
                os.close(process)
    return found


# --- the launcher ---------------------------------------------------------------------------------------------------


class _Launcher:
    """The small process that forks supervisors: started when needed, restarted when it died, ended with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], _Launcher] | None = None

    def launch(self, directories: list[str]) -> list[dict[str, Any]]:
        """Have supervisors forked; see `wfm.backends.runjob.launch` for the answers.

        A launcher that dies in the middle is asked again in a new one: what it had started is adopted.

        Raises:
            UnavailableError: it does not start, or died twice.
        """
        with self._lock:
            for _ in range(2):
                try:
                    return self._ask(directories)
                except OSError as error:
                    fault = error
                    self._discard()
        raise UnavailableError(f"the launcher of local jobs does not work: {fault}")

    def stop(self) -> None:
        with self._lock:
            self._discard()

    def _ask(self, directories: list[str]) -> list[dict[str, Any]]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", runjob.__file__, "--launcher"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                start_new_session=True,  # a Ctrl-C is not for it
            )
            self._end = weakref.finalize(self, _end_process, self._process)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(msgspec.json.encode(directories) + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer.endswith(b"\n"):
            raise ConnectionResetError("it ended")
        return msgspec.json.decode(answer, type=list[dict[str, Any]])

    def _discard(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # it holds nothing that could be lost
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
