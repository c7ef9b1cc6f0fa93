"""What is particular to jobs on this machine: their processes."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import msgspec
import pytest

from wfm import backends
from wfm.backends import local, runjob
from wfm.backends.local import LocalBackend
from wfm.errors import UnavailableError
from wfm.model import FailureClass, JobRef, JobSpec, JobStatus, Report, Resources

T = TypeVar("T")

LIMIT_SECONDS = 60
SUPERVISOR = [sys.executable, "-I", "-S", runjob.__file__]


def eventually(what: Callable[[], T], good: Callable[[T], object] = bool) -> T:
    """The first good value of `what`; fails after a generous time."""
    until = time.monotonic() + LIMIT_SECONDS
    while not good(value := what()):
        assert time.monotonic() < until, f"it did not come about; last seen: {value}"
        time.sleep(0.01)
    return value


def state(pid: int) -> bytes:
    """State of a process as ``/proc`` gives it; empty if there is none."""
    try:
        return runjob.process_stat(pid)[0]
    except OSError:
        return b""


def children(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and int(runjob.process_stat(int(entry))[1]) == pid:
                found.append(int(entry))
        except OSError:
            continue
    return found


def job_spec(directory: Path, *command: str, name: str = "job-1") -> JobSpec:
    attempt = directory / name
    attempt.mkdir(exist_ok=True)
    return JobSpec(name, str(attempt), command, {}, str(attempt), Resources())


def submit(backend: LocalBackend, spec: JobSpec) -> JobRef:
    job = backend.submit([spec])[spec.name]
    assert isinstance(job, JobRef), job
    return job


def pid_of(job: JobRef) -> int:
    return int(job.handle.partition(":")[0])


def until(backend: LocalBackend, job: JobRef, *wanted: JobStatus) -> Report:
    return eventually(lambda: backend.poll([job])[job.name], lambda report: report.status in wanted)


def cancelled(backend: LocalBackend, job: JobRef) -> Report:
    """What is reported of a job once it is cancelled or has ended otherwise."""
    return eventually(lambda: backend.cancel([job])[job.name], lambda report: report.status is not JobStatus.RUNNING)


def launcher(parent: int) -> int:
    """Pid of the launcher below a process."""
    (pid,) = [c for c in children(parent) if b"--launcher" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return pid


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[LocalBackend]:
    backend = LocalBackend(poll_seconds=0.01, grace_seconds=0.5)
    yield backend
    for attempt in (path.parent for path in tmp_path.glob("*/job.json")):
        job = JobRef(attempt.name, str(attempt))
        cancelled(backend, job)
    backend.close()


def test_the_supervisor_keeps_the_names_of_the_port() -> None:
    for name in ("CLAIM", "CANCELLED", "EXIT_RECORD", "JOB_LOG", "REFUSED_EXIT"):
        assert getattr(runjob, name) == getattr(backends, name)


def test_the_supervisor_needs_nothing_of_wfm(tmp_path: Path) -> None:
    spec = job_spec(tmp_path, "true")
    runjob.write_json(f"{spec.directory}/job.json", job_file("true"))
    carried = tmp_path / "carried.py"
    carried.write_bytes(Path(runjob.__file__).read_bytes())
    assert subprocess.run([sys.executable, "-I", "-S", carried, spec.directory], check=False).returncode == 0


# --- who may die ----------------------------------------------------------------------------------------------------


def test_jobs_survive_the_death_of_their_worker(tmp_path: Path, backend: LocalBackend) -> None:
    spec = job_spec(tmp_path, "sh", "-c", "echo executed >> ledger; until [ -e go ]; do sleep 0.01; done; echo done")
    code = (
        "import sys, msgspec\n"
        "from wfm.backends.local import LocalBackend\n"
        "from wfm.model import JobSpec\n"
        "backend = LocalBackend()\n"
        "spec = msgspec.json.decode(sys.argv[1], type=JobSpec)\n"
        "print(backend.submit([spec])[spec.name].handle, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, msgspec.json.encode(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdout
        handle = worker.stdout.readline().strip()
        its_launcher = launcher(worker.pid)
        worker.kill()
    eventually(lambda: state(its_launcher) in (b"", b"Z"))

    nameless = JobRef(spec.name, spec.directory)
    assert until(backend, nameless, JobStatus.RUNNING).handle == handle
    assert submit(backend, spec).handle == handle
    Path(spec.directory, "go").touch()
    assert until(backend, nameless, JobStatus.COMPLETED).handle == handle
    assert Path(spec.directory, "ledger").read_text() == "executed\n"
    assert Path(backend.logs(nameless)).read_text() == "done\n"


def test_a_killed_launcher_is_replaced_and_its_jobs_go_on(tmp_path: Path, backend: LocalBackend) -> None:
    first = submit(backend, job_spec(tmp_path, "sh", "-c", "until [ -e go ]; do sleep 0.01; done", name="first"))
    until(backend, first, JobStatus.RUNNING)
    killed = launcher(os.getpid())
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: state(killed) == b"Z")
    second = submit(backend, job_spec(tmp_path, "true", name="second"))
    assert launcher(os.getpid()) != killed
    until(backend, second, JobStatus.COMPLETED)
    assert backend.poll([first])["first"].status is JobStatus.RUNNING
    Path(first.directory, "go").touch()
    until(backend, first, JobStatus.COMPLETED)


def test_a_launcher_that_cannot_start_is_a_passing_fault(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job_spec(tmp_path, "true")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "no-python"))
        fault = backend.submit([spec])[spec.name]
    assert isinstance(fault, UnavailableError)
    assert "no-python" in str(fault)
    until(backend, submit(backend, spec), JobStatus.COMPLETED)


def test_a_supervisor_told_to_end_without_a_cancellation(tmp_path: Path, backend: LocalBackend) -> None:
    job = submit(backend, job_spec(tmp_path, "sleep", "1000"))
    until(backend, job, JobStatus.RUNNING)
    os.kill(pid_of(job), signal.SIGTERM)
    report = until(backend, job, JobStatus.FAILED)
    assert (report.failure, report.signal) == (FailureClass.SIGNAL, signal.SIGTERM)
    assert "without a cancellation" in report.reason


def test_a_stuck_supervisor_is_killed_when_the_cancellation_is_old(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "CANCEL_WAIT_SECONDS", 0.1)
    spec = job_spec(tmp_path, "sh", "-c", "echo $$ > pid; sleep 1000 & echo $! >> pid; wait")
    job = submit(backend, spec)
    path = Path(spec.directory, "pid")
    pids = eventually(lambda: path.read_text().split() if path.exists() else [], lambda pids: len(pids) == 2)
    os.kill(pid_of(job), signal.SIGSTOP)
    assert backend.cancel([job])[job.name].status is JobStatus.RUNNING
    old = time.time() - 1000
    os.utime(Path(spec.directory, backends.CANCELLED), (old, old))
    assert cancelled(backend, job).status is JobStatus.CANCELLED
    assert all(state(int(pid)) in (b"", b"Z") for pid in pids)


# --- who is alive ---------------------------------------------------------------------------------------------------


@pytest.fixture
def innocent() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("wrong", ["start_time", "boot_id", "host"])
def test_a_pid_given_again_is_never_signalled(
    wrong: str,
    tmp_path: Path,
    backend: LocalBackend,
    innocent: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "CANCEL_WAIT_SECONDS", 0.1)
    spec = job_spec(tmp_path, "true")
    job = JobRef(spec.name, spec.directory)
    right = {
        "name": spec.name,
        "pid": innocent.pid,
        "start_time": runjob.start_time(innocent.pid),
        "boot_id": runjob.boot_id(),
        "host": os.uname().nodename,
    }
    Path(spec.directory, runjob.CLAIM).mkdir()
    runjob.write_json(f"{spec.directory}/{runjob.OWNER}", right | {wrong: 12 if wrong == "start_time" else "other"})
    assert backend.poll([job])[job.name].status is JobStatus.VANISHED

    held = runjob.lock(spec.directory)  # as if the supervisor lived, out of reach of signals
    assert held is not None
    assert backend.poll([job])[job.name].status is JobStatus.RUNNING
    assert backend.cancel([job])[job.name].status is JobStatus.RUNNING
    os.close(held)
    assert backend.cancel([job])[job.name].status is JobStatus.CANCELLED
    assert state(innocent.pid) == b"S"

    runjob.write_json(f"{spec.directory}/{runjob.OWNER}", right)  # the same with nothing wrong would have hit
    held = runjob.lock(spec.directory)
    assert held is not None
    backend.cancel([job])
    os.close(held)
    assert innocent.wait(LIMIT_SECONDS) == -signal.SIGTERM


def test_a_supervisor_on_its_way_is_neither_absent_nor_started_twice(tmp_path: Path, backend: LocalBackend) -> None:
    spec = job_spec(tmp_path, "true")
    held = runjob.lock(spec.directory)
    assert held is not None
    job = submit(backend, spec)
    assert job.handle == ""
    assert backend.find([job])[job.name].status is JobStatus.PENDING
    os.close(held)
    assert backend.find([job])[job.name].status is JobStatus.ABSENT
    until(backend, submit(backend, spec), JobStatus.COMPLETED)


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("event", ["ends", "starts", "starts and is cancelled"])
def test_no_false_verdict_when_the_job_moves_during_a_look(
    event: str, number: int, tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "example").mkdir()
    example = submit(backend, job_spec(tmp_path / "example", "true"))
    until(backend, example, JobStatus.COMPLETED)
    attempt = tmp_path / "job-1"
    attempt.mkdir()
    locks: list[int | None] = []

    def start() -> None:
        locks.append(runjob.lock(str(attempt)))
        (attempt / backends.CLAIM).mkdir()
        shutil.copy(Path(example.directory, runjob.OWNER), attempt / runjob.OWNER)

    def happen() -> None:
        if event == "ends":
            shutil.copy(Path(example.directory, backends.EXIT_RECORD), attempt)
            os.close(locks.pop() or -1)
        else:
            start()
            if event == "starts and is cancelled":
                (attempt / backends.CANCELLED).touch()

    reads = itertools.count()

    def watch(module: ModuleType, name: str) -> None:
        read = getattr(module, name)

        def watched(*arguments: object) -> object:
            if next(reads) == number:
                happen()
            return read(*arguments)

        monkeypatch.setattr(module, name, watched)

    for module, name in ((runjob, "present"), (runjob, "is_locked"), (local, "_read")):
        watch(module, name)
    if event == "ends":
        start()
    status = backend.find([JobRef("job-1", str(attempt))])["job-1"].status
    assert status in (JobStatus.RUNNING, JobStatus.COMPLETED if event == "ends" else JobStatus.ABSENT)
    for descriptor in locks:
        os.close(descriptor or -1)


def test_the_launcher_starts_nothing_where_something_was_started(tmp_path: Path) -> None:
    (tmp_path / backends.CLAIM).mkdir()
    (tmp_path / "file").touch()
    places = [tmp_path, tmp_path / "nowhere", tmp_path / "file"]
    asked = json.dumps([str(place) for place in places]) + "\n"
    run = subprocess.run([*SUPERVISOR, "--launcher"], input=asked, capture_output=True, text=True, check=True)
    adopted, missing, no_directory = json.loads(run.stdout)
    assert adopted == {"adopt": True}
    assert "No such file" in missing["error"]
    assert "Not a directory" in no_directory["error"]


# --- the claim ------------------------------------------------------------------------------------------------------


def job_file(*command: str, directory: str = "/") -> runjob.Json:
    return {"name": "job-1", "command": command, "environment": {}, "working_directory": directory, "resources": {}}


def test_adopting_alters_nothing(tmp_path: Path, backend: LocalBackend) -> None:
    spec = job_spec(tmp_path, "true")
    until(backend, submit(backend, spec), JobStatus.COMPLETED)
    files = {path: path.stat().st_mtime_ns for path in Path(spec.directory).rglob("*")}
    submit(backend, msgspec.structs.replace(spec, command=("false",)))
    assert {path: path.stat().st_mtime_ns for path in Path(spec.directory).rglob("*")} == files


def test_of_fifty_supervisors_one_runs(tmp_path: Path) -> None:
    runjob.write_json(
        str(tmp_path / "job.json"), job_file("sh", "-c", f"echo executed; echo executed >> {tmp_path}/ledger")
    )
    supervisors = [subprocess.Popen([*SUPERVISOR, tmp_path]) for _ in range(50)]
    codes = sorted(supervisor.wait() for supervisor in supervisors)
    assert codes == [0] + [backends.REFUSED_EXIT] * 49
    assert (tmp_path / "ledger").read_text() == "executed\n"
    assert (tmp_path / backends.JOB_LOG).read_text() == "executed\n"


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -TERM $$", 143), ("exit 0", 0)])
def test_a_carried_supervisor_exits_as_its_job_does(tmp_path: Path, command: str, code: int) -> None:
    runjob.write_json(str(tmp_path / "job.json"), job_file("sh", "-c", command))
    assert subprocess.run([*SUPERVISOR, tmp_path], check=False).returncode == code


def test_a_carried_supervisor_ends_its_job_when_it_is_told_to(tmp_path: Path) -> None:
    runjob.write_json(str(tmp_path / "job.json"), job_file("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"))
    with subprocess.Popen([*SUPERVISOR, tmp_path]) as supervisor:
        pid = int(eventually(lambda: (tmp_path / "pid").read_text() if (tmp_path / "pid").exists() else ""))
        (tmp_path / backends.CANCELLED).touch()
        supervisor.terminate()
    assert supervisor.returncode == 143
    assert state(pid) == b""
    assert json.loads((tmp_path / backends.EXIT_RECORD).read_text())["failure"] == "cancelled"


@pytest.mark.parametrize(
    ("code", "failure"), [(-9, "out_of_memory"), (137, "out_of_memory"), (-15, "signal"), (1, "exit")]
)
def test_want_of_memory_explains_only_a_kill(code: int, failure: str) -> None:
    status = -code if code < 0 else code << 8
    assert runjob.verdict(job_file("x"), status, "", None, oom_killed=True)["failure"] == failure
    assert runjob.verdict(job_file("x"), status, "", None, oom_killed=False)["failure"] == (
        "signal" if code < 0 else "exit"
    )


# --- what a job inherits, and what it leaves ------------------------------------------------------------------------


def test_what_a_job_and_its_supervisor_have_open(tmp_path: Path, backend: LocalBackend) -> None:
    job = submit(
        backend,
        job_spec(tmp_path, "sh", "-c", "ls -l /proc/$$/fd > fds; grep Sig /proc/self/status > sig; exec sleep 1000"),
    )
    pid = pid_of(job)
    (child,) = eventually(lambda: children(pid))
    eventually(lambda: Path(f"/proc/{child}/comm").read_text(), lambda name: name == "sleep\n")

    def opened(pid: int) -> dict[str, str]:
        return {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}

    standard = {"0": "/dev/null", "1": backend.logs(job), "2": backend.logs(job)}
    assert opened(child) == standard  # above all not the lock: a job must not look like its supervisor
    assert sorted(opened(pid).values()) == sorted([*standard.values(), f"{job.directory}/{runjob.LOCK}"])
    for leader in (pid, launcher(os.getpid())):  # each in a session of its own: no Ctrl-C of the worker's reaches it
        assert runjob.process_stat(leader)[3] == str(leader).encode()
    assert runjob.process_stat(child)[2] == str(child).encode()  # its own group

    masks = dict(line.split(":\t") for line in Path(job.directory, "sig").read_text().splitlines())
    assert int(masks["SigBlk"], 16) == 0
    for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM, signal.SIGINT):
        assert not int(masks["SigIgn"], 16) >> (number - 1) & 1


def test_no_zombies_and_no_leftovers(tmp_path: Path, backend: LocalBackend) -> None:
    submit(backend, job_spec(tmp_path, "true", name="first"))
    opened = len(os.listdir("/proc/self/fd"))
    specs = [job_spec(tmp_path, "true", name=f"job-{number}") for number in range(20)]
    jobs = [job for job in backend.submit(specs).values() if isinstance(job, JobRef)]
    for job in jobs:
        until(backend, job, JobStatus.COMPLETED)
    assert len(os.listdir("/proc/self/fd")) == opened
    its_launcher = launcher(os.getpid())
    eventually(lambda: children(its_launcher) == [])
    assert not any(state(pid_of(job)) for job in jobs)
    for spec in specs:
        assert sorted(os.listdir(spec.directory)) == ["claim", "exit.json", "job.json", "logs", "supervisor.lock"]
        assert os.listdir(f"{spec.directory}/claim") == ["owner.json"]
    backend.close()
    assert state(its_launcher) == b""


def test_orphans_of_a_long_job_are_reaped(tmp_path: Path, backend: LocalBackend) -> None:
    code = "for i in 1 2 3 4 5; do (sh -c 'echo $$ >> pids' &); done; exec sleep 1000"
    job = submit(backend, job_spec(tmp_path, "sh", "-c", code))
    path = Path(job.directory, "pids")
    pids = eventually(lambda: path.read_text().split() if path.exists() else [], lambda pids: len(pids) == 5)
    eventually(lambda: not any(state(int(pid)) for pid in pids))


def test_a_forgotten_backend_leaves_no_launcher(tmp_path: Path) -> None:
    backend = LocalBackend()
    until(backend, submit(backend, job_spec(tmp_path, "true")), JobStatus.COMPLETED)
    its_launcher = launcher(os.getpid())
    del backend
    gc.collect()
    assert state(its_launcher) == b""
