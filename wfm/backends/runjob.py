"""The job supervisor: runs one command in its attempt directory and leaves a truthful record of it.

Standard library only and nothing of wfm, so that this one file can be carried to another machine::

    python3 -I -S runjob.py DIRECTORY      supervise the job that DIRECTORY/job.json describes
    python3 -I -S runjob.py --launcher     fork a supervisor for every directory read from standard input

In the attempt directory:

===================  ===========================================================================================
``job.json``         name, command, environment, working_directory, resources, grace_seconds; written before
``claim/owner.json`` who owns the attempt: name, pid, start_time, boot_id, host. Whoever makes the directory
                     ``claim`` owns it; everybody else leaves with `REFUSED_EXIT` and touches nothing
``cancelled``        the mark that forbids the job to start, and ends it if it runs. The supervisor looks at it
                     *after* claiming, the canceller looks at the claim *after* marking: one always sees the other
``supervisor.lock``  locked while a supervisor that the launcher forked lives (see `lock`)
``logs/job.log``     standard output and error of the command
``exit.json``        the exit record (see `verdict` and `supervise`): the last act, atomic and durable
===================  ===========================================================================================

The command gets the variables `BASE_ENVIRONMENT` of the supervisor's own environment, over them the job's, and
`ATTEMPT_DIRECTORY`: nothing else, so no password of the service reaches the software. The whole tree of processes
ends with the command: nothing it started outlives it, be it in another session or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import os
import resource
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

JOB = "job.json"
CLAIM = "claim"
OWNER = "claim/owner.json"
CANCELLED = "cancelled"
EXIT_RECORD = "exit.json"
JOB_LOG = "logs/job.log"
LOCK = "supervisor.lock"
REFUSED_EXIT = 86
NOT_FOUND_EXIT = 127
NOT_EXECUTABLE_EXIT = 126

BASE_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR")
ATTEMPT_DIRECTORY = "WORKFLOW_ATTEMPT_DIRECTORY"
"""Variable that tags every process of a job; what survives a killed supervisor is found by it."""

GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, unless ``job.json`` says otherwise."""
LOOK_SECONDS = 2.0
"""How often a running job's supervisor looks for the `CANCELLED` mark.

SIGTERM is quicker, but reaches only supervisors of the same machine and process namespace.
"""

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)
_libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid

_PASSING = {errno.EAGAIN, errno.ENOMEM, errno.ETXTBSY, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
"""What can keep a good command from starting now and not the next time."""

Json = dict[str, Any]


# --- files ----------------------------------------------------------------------------------------------------------


def present(path: str) -> bool:
    """Whether the file exists; unlike `os.path.exists`, a file system that does not answer raises OSError."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def sync_directory(path: str) -> None:
    """Make the directory's entries survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str, content: Json, durable: bool = False) -> None:
    """Write a JSON file atomically: readers see the old file, the new one, or none, never a part.

    Args:
        path: where; replaced if it exists.
        content: what.
        durable: return only when the file survives a power failure.

    Raises:
        OSError: it was not written; no temporary file is left.
    """
    temporary = f"{path}.{os.urandom(6).hex()}"
    try:
        with open(temporary, "xb") as file:
            file.write(json.dumps(content).encode())
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_directory(os.path.dirname(path))


# --- who lives ------------------------------------------------------------------------------------------------------


def _read_proc(path: str) -> bytes:
    with open(f"/proc/{path}", "rb", buffering=0) as file:
        return file.read()


def boot_id() -> str:
    """What tells this boot of the machine from every other."""
    return _read_proc("sys/kernel/random/boot_id").decode().strip()


def process_stat(pid: int) -> list[bytes]:
    """The fields of ``/proc/<pid>/stat`` from the state on: state, parent, group, session, …

    Raises:
        OSError: no such process.
    """
    return _read_proc(f"{pid}/stat").rpartition(b")")[2].split()  # the command's name before it may hold anything


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; with the pid and the boot id, a name never given twice.

    Raises:
        OSError: no such process.
    """
    return int(process_stat(pid)[19])


def lock(directory: str) -> int | None:
    """Take the supervisor's lock; None if somebody has it.

    The lock belongs to the open file, not to a process: it is taken before the fork, lives on in the supervisor, and
    is dropped by the kernel when that dies, however it dies. So at every moment "the lock is held" and "a supervisor
    is on its way or alive" are the same, also between the fork and the claim, also seen from another process
    namespace on the same file system, and no pid that was given again can deceive.

    Returns:
        The file descriptor that holds the lock.

    Raises:
        OSError: the file system cannot be reached, or has no locks.
    """
    path = os.path.join(directory, LOCK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise OSError(error.errno, f"cannot be locked: {error.strerror}", path) from None
    return descriptor


def is_locked(directory: str) -> bool:
    """Whether a supervisor that a launcher forked is on its way or alive; asks without taking the lock.

    Raises:
        OSError: the file system cannot be reached.
    """
    try:
        descriptor = os.open(os.path.join(directory, LOCK), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    finally:
        os.close(descriptor)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


# --- the launcher ---------------------------------------------------------------------------------------------------


def launch(requests: BinaryIO, answers: int) -> None:
    """Fork supervisors until the input ends. They survive the launcher.

    A fork of this small process is an order of magnitude cheaper than the start of an interpreter per job.

    Args:
        requests: lines, each a JSON list of attempt directories.
        answers: descriptor of a pipe; for every line a JSON list with, per directory, ``{"handle": …}`` of the
            supervisor, ``{"adopt": true}`` if the job was started before, or ``{"error": …}``.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the supervisors
    boot = boot_id()
    gc.disable()
    gc.freeze()
    for line in requests:
        answer = [_launch_one(directory, boot) for directory in json.loads(line)]
        try:
            os.write(answers, json.dumps(answer).encode() + b"\n")
        except BrokenPipeError:  # who asked is gone; the jobs go on
            return


def _launch_one(directory: str, boot: str) -> Json:
    try:
        held = lock(directory)
        if held is None:
            return {"adopt": True}
        try:
            if any(present(os.path.join(directory, started)) for started in (CLAIM, EXIT_RECORD)):
                return {"adopt": True}
            pid = os.fork()
            if pid == 0:
                _become_supervisor(directory)
            try:
                return {"handle": f"{pid}:{start_time(pid)}:{boot}"}
            except (FileNotFoundError, ProcessLookupError):  # it is over already; its claim tells the handle
                return {"adopt": True}
        finally:
            os.close(held)  # the supervisor's copy holds it on
    except OSError as error:
        return {"error": str(error)}


def _become_supervisor(directory: str) -> None:
    """What the launcher's child does; never returns, so that nothing of the launcher runs twice."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        status = supervise(directory)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(status)


# --- the supervisor -------------------------------------------------------------------------------------------------


def supervise(directory: str) -> int:
    """Claim the attempt, run its job, record its end.

    The exit record holds exit_code, signal, failure and reason (see `verdict`), name, node, started_at and
    finished_at (seconds since the epoch, UTC), wall_seconds, cpu_seconds (user and system, all processes of the job),
    and peak_memory_bytes (resident memory of the largest process; not below some MB, the supervisor's own size).

    Args:
        directory: absolute path of the attempt directory.

    Returns:
        The exit code of the command, 128 + the signal that ended it, or `REFUSED_EXIT`.

    Raises:
        OSError: the directory is out of reach; without a record, the job counts as vanished.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_STOP_SIGNALS})  # they are waited for, never handled
    with contextlib.suppress(PermissionError):  # is a session's leader already
        os.setsid()
    with open(os.path.join(directory, JOB), "rb") as file:
        job = json.load(file)
    if not _claim(directory, job["name"]):
        return REFUSED_EXIT
    _open_log(os.path.join(directory, JOB_LOG))

    oom_kills = _oom_kills()
    started_at, started = time.time(), time.monotonic()
    stopped, fault, status = "", None, 0
    try:
        leader = _start(job, directory)
    except _NotStarted as error:
        fault = error
    else:
        stopped = _wait(leader, directory, job["resources"].get("time_hours"))
        status = _end(leader, job.get("grace_seconds", GRACE_SECONDS), gently=bool(stopped))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    oom_killed = status != 0 and _oom_kills() > oom_kills
    record = verdict(job, status, stopped, fault, oom_killed)
    record.update(
        name=job["name"],
        node=os.uname().nodename,
        started_at=started_at,
        finished_at=time.time(),
        wall_seconds=time.monotonic() - started,
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_memory_bytes=used.ru_maxrss * 1024,
    )
    write_json(os.path.join(directory, EXIT_RECORD), record, durable=True)
    return int(128 + record["signal"] if record["exit_code"] is None else record["exit_code"])


def _claim(directory: str, name: str) -> bool:
    """Whether this process may run the job."""
    try:
        os.mkdir(os.path.join(directory, CLAIM))
    except FileExistsError:
        return False
    pid = os.getpid()
    owner = {"name": name, "pid": pid, "start_time": start_time(pid), "boot_id": boot_id(), "host": os.uname().nodename}
    write_json(os.path.join(directory, OWNER), owner)
    return not present(os.path.join(directory, CANCELLED))


def _open_log(path: str) -> None:
    """Make the log the standard output and error: of the command, and of a supervisor that breaks."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, standard in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, standard)
    os.close(null)
    os.close(log)


class _NotStarted(Exception):  # noqa: N818
    """The command could not be executed.

    Args:
        exit_code: what a shell would give.
        failure: class of failure.
        reason: one line for people.
    """

    def __init__(self, exit_code: int, failure: str, reason: str) -> None:
        self.exit_code = exit_code
        self.failure = failure
        self.reason = reason
        super().__init__(reason)


def _start(job: Json, directory: str) -> int:
    """Execute the command as the leader of a process group; returns its pid, or raises _NotStarted."""
    environment = {key: os.environ[key] for key in BASE_ENVIRONMENT if key in os.environ}
    environment.update(job["environment"])
    environment[ATTEMPT_DIRECTORY] = directory
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the job come to us, whatever their session
    supervisor = os.getpid()
    reader, writer = os.pipe()  # closed by a successful execution, else it brings the fault
    pid = os.fork()
    if pid == 0:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no job runs unsupervised
            if os.getppid() != supervisor:
                os._exit(1)
            os.setpgid(0, 0)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and executed programs would inherit that
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            _execute(job, environment)
        except _NotStarted as error:
            os.write(writer, json.dumps([error.exit_code, error.failure, error.reason]).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as file:
        fault = file.read()
    if fault:
        os.waitpid(pid, 0)
        raise _NotStarted(*json.loads(fault))
    return pid


def _execute(job: Json, environment: dict[str, str]) -> None:
    try:
        os.chdir(job["working_directory"])
    except (OSError, ValueError) as error:
        raise _NotStarted(NOT_EXECUTABLE_EXIT, "exit", f"working directory: {error}") from None
    command = job["command"]
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606
    except FileNotFoundError:
        reason = f"command {command[0]!r} (or the interpreter that its first line names) is not found"
        raise _NotStarted(NOT_FOUND_EXIT, "command_not_found", reason) from None
    except (OSError, ValueError) as error:
        failure = "exit" if getattr(error, "errno", None) in _PASSING else "command_not_found"
        raise _NotStarted(NOT_EXECUTABLE_EXIT, failure, f"command {command[0]!r}: {error}") from None


def _wait(leader: int, directory: str, time_hours: float | None) -> str:
    """Wait until the command ends or must be ended: because it is ``"cancelled"``, out of time (``"timeout"``), or
    because the supervisor was told to go (``"signal"``); else ``""``."""
    mark = os.path.join(directory, CANCELLED)
    deadline = float("inf") if time_hours is None else time.monotonic() + 3600 * time_hours
    told = False
    while not _ended(leader):
        with contextlib.suppress(OSError):  # a mark out of reach is no mark yet
            if present(mark):
                return "cancelled"
        if told:
            return "signal"
        left = deadline - time.monotonic()
        if left <= 0:
            return "timeout"
        got = signal.sigtimedwait({signal.SIGCHLD, *_STOP_SIGNALS}, min(left, LOOK_SECONDS))
        told = got is not None and got.si_signo in _STOP_SIGNALS
    return ""


def _ended(leader: int) -> bool:
    """Whether the command has ended; it stays a zombie, so that its pid still names its group. Orphans are reaped."""
    while True:
        child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if child is None:
            return False
        if child.si_pid == leader:
            return True
        os.waitpid(child.si_pid, 0)


def _end(leader: int, grace: float, gently: bool) -> int:
    """End every process of the job; returns the command's wait status.

    Args:
        leader: pid of the command: a zombie or alive.
        grace: seconds, see `GRACE_SECONDS`.
        gently: begin with SIGTERM, and let the whole tree have the grace to clean up.
    """
    statuses: dict[int, int] = {}
    steps = ((signal.SIGTERM, grace), (signal.SIGKILL, float("inf")))
    for number, seconds in steps if gently else steps[1:]:
        until = time.monotonic() + seconds
        if leader not in statuses:
            with contextlib.suppress(PermissionError):
                os.killpg(leader, number)
        signalled = False
        while _reap(statuses) and time.monotonic() < until:
            if number == signal.SIGKILL or not signalled:  # who forks while we look is found by the next look
                _signal_descendants(number, but_group=leader if leader not in statuses else 0)
                signalled = True
            signal.sigtimedwait({signal.SIGCHLD}, max(0.0, min(until - time.monotonic(), 0.5)))
    return statuses[leader]


def _reap(statuses: dict[int, int]) -> bool:
    """Collect who has ended; whether somebody is left."""
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return True
            statuses[pid] = status
    except ChildProcessError:
        return False


def _signal_descendants(number: int, but_group: int) -> None:
    """Signal all processes below this one, but those of one group (which had it already)."""
    stats = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stats[int(entry)] = process_stat(int(entry))
    family = {os.getpid()}
    generation = family
    while generation:
        generation = {pid for pid, stat in stats.items() if int(stat[1]) in generation} - family
        family |= generation
    for pid in family - {os.getpid()}:
        if int(stats[pid][2]) != but_group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _oom_kills() -> int:
    """How often this machine's kernel has killed for want of memory."""
    with contextlib.suppress(OSError, ValueError):
        return int(_read_proc("vmstat").partition(b"\noom_kill ")[2].split(b"\n")[0])
    return 0


def verdict(job: Json, status: int, stopped: str, fault: _NotStarted | None, oom_killed: bool) -> Json:
    """How the job ended, and why.

    Args:
        job: content of ``job.json``.
        status: wait status of the command.
        stopped: what `_wait` said.
        fault: why the command was not executed at all.
        oom_killed: the kernel killed some process for want of memory while the job ran.

    Returns:
        ``exit_code`` or else ``signal``; ``failure``: one of exit, command_not_found, timeout, out_of_memory, signal,
        cancelled, or empty; ``reason``: one line.
    """
    if fault is not None:
        return {"exit_code": fault.exit_code, "signal": None, "failure": fault.failure, "reason": fault.reason}
    code = os.waitstatus_to_exitcode(status)
    ended = {"exit_code": code, "signal": None} if code >= 0 else {"exit_code": None, "signal": -code}
    if stopped == "timeout":
        failure, reason = stopped, f"time limit of {job['resources']['time_hours']:g} h reached"
    elif stopped == "cancelled":
        failure, reason = stopped, "cancelled while it ran"
    elif stopped:
        failure, reason = (
            stopped,
            "the supervisor was told to end, without a cancellation (a service stop, a shutdown?)",
        )
    elif oom_killed and code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        failure, reason = "out_of_memory", "killed while the machine (or its memory limit) was out of memory"
    elif code < 0:
        failure, reason = "signal", f"killed by {_signal_name(-code)}"
    else:
        failure, reason = ("exit", f"exit code {code}") if code else ("", "")
    return {**ended, "failure": failure, "reason": reason}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main(arguments: list[str]) -> int:
    """The command line; see the top of this file."""
    if arguments == ["--launcher"]:
        launch(sys.stdin.buffer, sys.stdout.fileno())
        return 0
    if len(arguments) == 1 and not arguments[0].startswith("-"):
        return supervise(os.path.abspath(arguments[0]))
    print("usage: runjob.py DIRECTORY | --launcher", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
