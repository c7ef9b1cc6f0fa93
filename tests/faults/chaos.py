"""Random faults against the whole system, while it works, for as long as asked; then the checker's verdict::

    python -m tests.faults.chaos --minutes 10 [--seed N] [--report FILE]       faults of all kinds, intervals shortened
    python -m tests.faults.chaos --recovery [--runs 1000] [--report FILE]      each kind once, at the default intervals

Two copies of each role, as processes; one of each lives behind a network that can be made bad. Data arrive all the
time, late data too, and people cancel and retry. Whoever dies is started again, as a service manager would.

The recovery time of a fault is the time from its beginning until every run that was admitted then has moved on. Where
faults follow each other, it holds what the next ones cost, too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from msgspec import Struct
from sqlalchemy.exc import DBAPIError

from tests.faults import proxy
from tests.faults.bench import Bench, Victim
from tests.faults.checker import EFFECTS, examine, restless
from tests.harness import World, wait_until
from wfm import documents, migrations
from wfm.config import load
from wfm.embedded import Embedded
from wfm.model import Role
from wfm.store import connect

SHORT = {
    "WFM_LEASE_SECONDS": "2",
    "WFM_CLAIM_IDLE_SECONDS": "1",
    "WFM_REPUBLISH_SECONDS": "2",
    "WFM_RECONCILE_SECONDS": "10",
    "WFM_VANISH_GRACE_SECONDS": "2",
    "WFM_BLOCK_SECONDS": "1",
}
"""The intervals of the loop during chaos. `wfm/settings.toml` has those of production."""

DEFAULT = {"WFM_SWEEP_SECONDS": "1", "WFM_RETRY_BACKOFF_SECONDS": "10"}
"""What tests have quicker than production."""

AT_WORK = "('STAGING_DATA', 'SUBMITTED', 'RUNNING', 'COLLECTING_RESULTS')"

STEPS = [
    {"name": "scan", "software": "lean", "group_by": ["executed_obs_unit"], "max_retries": 5},
    {"name": "field", "software": "lean", "depends_on": ["scan"], "group_by": ["obs_unit"], "max_retries": 5},
]
SCANS_PER_FIELD = 8
GARBAGE = b"chaos \xff"


# --- the system ---


class Copy:
    """One copy of a role, in its present and its former lives."""

    def __init__(self, bench: Bench, role: Role, environ: dict[str, str]) -> None:
        self.role = role
        self._bench = bench
        self._environ = environ
        self.victim: Victim = self._start()

    def _start(self) -> Victim:
        return self._bench.victim(self.role, **self._environ)

    def revive(self) -> None:
        """What a service manager does."""
        if self.victim.poll() is not None:
            self.victim = self._start()

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.victim.send(number)


class Recovery(Struct):
    """A fault from which not every run that was at work has recovered yet.

    Attributes:
        versions: of these runs, when it began.
    """

    kind: str
    began: float
    versions: dict[int, int]


class System:
    """Servers, roles, clients; and what was done to them."""

    def __init__(self, directory: Path, seed: int, environ: dict[str, str]) -> None:
        self.directory = directory
        self.chance = random.Random(seed)
        self.servers = Embedded(directory / "servers")
        self.servers.start()
        engine = connect(self.servers.database_url, "wfm")
        migrations.upgrade(engine, "wfm")
        engine.dispose()
        self.world = World(directory, self.servers.database_url, self.servers.redis_url, **environ)
        self.redis = redis.Redis.from_url(self.servers.redis_url)
        self.bench = Bench(self.world)
        self._open = ExitStack()
        self.postgres_proxy = self._open.enter_context(proxy.PostgresProxy(self.servers.database_url))
        self.redis_proxy = self._open.enter_context(proxy.RedisProxy(self.servers.redis_url))
        self.packages: list[str] = []
        self.unsure: dict[str, str] = {}
        """Packages whose files changed on disk, and whose registration nobody has confirmed yet."""
        self.names = 0
        self.faults: Counter[str] = Counter()
        self.recovering: list[Recovery] = []
        self.recovered: dict[str, list[float]] = defaultdict(list)
        program = [sys.executable, "-I", "-S", str(self.world.program)]
        self.world.apply(
            json.dumps({"kind": "software", "name": "lean", "versions": [{"version": "1.0.0", "command": program}]})
        )
        resources = {"cpu": 0.1, "memory_gb": 0.01}
        self.world.pipeline("chaos", [{**step, "resources": resources} for step in STEPS])
        far = {"WFM_DATABASE_URL": self.postgres_proxy.url, "WFM_REDIS_URL": self.redis_proxy.url}
        self.copies = [Copy(self.bench, role, dict(near)) for role in Role for near in ({}, far)]

    def close(self) -> None:
        self.bench.close()
        self._open.close()
        self.redis.close()
        self.servers.stop()

    # --- clients ---

    def register(self, count: int) -> None:
        """New packages, in one transaction."""
        first = len(self.packages)
        names = [f"p{i:06}" for i in range(first, first + count)]
        self.packages += names
        self._register(names, {})

    def change(self) -> None:
        """Other content of a package: its file changes on disk, then in the catalogue."""
        if self.packages:
            name = self.chance.choice(self.packages)
            self.unsure[name] = f"{name} {self.chance.random()}\n"

    def _register(self, names: Sequence[str], contents: dict[str, str]) -> bool:
        packages = [
            self.world.package(n, contents.get(n, ""), obs_unit=f"f{int(n[1:]) // SCANS_PER_FIELD:05}") for n in names
        ]
        return self.world.register(*packages) is not None

    def confirm(self) -> None:
        """Register what is on disk until somebody says that it is accepted."""
        if self.unsure and self._register(sorted(self.unsure), self.unsure):
            self.unsure.clear()

    def meddle(self) -> None:
        """People cancel runs, and have others tried again."""
        for states, act in ((AT_WORK, self.world.cancel), ("('CANCELLED', 'FAILED')", self.world.retry)):
            for r in self.ask(f"SELECT id FROM run WHERE state IN {states} ORDER BY random() LIMIT 2"):
                act(r.id)

    def rename(self) -> None:
        """People give each step the name of the next one, and the last one a new name."""
        self.names += 1
        with self.world.store.begin() as tx:
            (document,) = documents.get(tx.conn, "pipeline", "chaos")
        old = [s["name"] for s in document["steps"]]
        new = dict(zip(old, [*old[1:], f"step{self.names}"], strict=True))
        for s in document["steps"]:
            depends_on = [new[n] for n in s["depends_on"]]
            s |= {"name": new[s["name"]], "renamed_from": s["name"], "depends_on": depends_on}
        self.world.apply(json.dumps(document))

    def ask(self, sql: str, **params: Any) -> list[Any]:
        """Rows; none while Postgres is away."""
        try:
            return self.world.query(sql, **params)
        except DBAPIError:
            return []

    def open_runs(self) -> int:
        """How many runs have not ended; -1 while Postgres is away."""
        rows = self.ask("SELECT count(*) AS n FROM run WHERE finished_at IS NULL")
        return int(rows[0].n) if rows else -1

    # --- time goes by ---

    def look(self) -> None:
        """Revive the dead, and see which faults are overcome."""
        for copy in self.copies:
            copy.revive()
        ids = {i for r in self.recovering for i in r.versions}
        if not ids:
            return
        rows = self.ask("SELECT id, version FROM run WHERE id = ANY(:ids)", ids=sorted(ids))
        now = {r.id: r.version for r in rows}
        for fault in list(self.recovering) if rows else ():
            fault.versions = {i: v for i, v in fault.versions.items() if now[i] == v}
            if not fault.versions:
                self.recovering.remove(fault)
                self.recovered[fault.kind].append(time.monotonic() - fault.began)

    def wait(self, seconds: float) -> None:
        """Let time go by, looking."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(0.1, left))
            self.look()

    def harm(self, kind: str) -> None:
        """One fault; when it returns, nothing stands in the way of recovery any more."""
        at_work = {r.id: r.version for r in self.ask(f"SELECT id, version FROM run WHERE state IN {AT_WORK}")}
        began = time.monotonic()
        FAULTS[kind](self)
        self.faults[kind] += 1
        if at_work:
            self.recovering.append(Recovery(kind, began, at_work))

    def heal(self) -> None:
        """No proxy in the way, nobody frozen, everybody and everything up."""
        self.postgres_proxy.heal()
        self.redis_proxy.heal()
        self.servers.start()
        self.world.store.engine.dispose()
        for copy in self.copies:
            copy.send(signal.SIGCONT)
            copy.revive()

    def kill_server(self, name: str, number: signal.Signals, forget: str = "") -> None:
        """Kill a server and start it again; `forget`: what it must not find again."""
        pid = self.servers.status()[name].pid
        assert pid is not None
        self.world.store.engine.dispose()
        os.kill(pid, number)
        wait_until(lambda: not self.servers.status()[name].running, what=f"{name} is gone")
        if forget:
            for file in sorted((self.directory / "servers" / forget).rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
        self.servers.start()
        self.world.store.engine.dispose()

    def streams(self) -> list[bytes]:
        """The command streams that there are."""
        return [
            key
            for key in sorted(self.redis.scan_iter("wfm:*"))
            if not key.endswith((b":events", b":life")) and self.redis.type(key) == b"stream"
        ]


# --- the faults ---

FAULTS: dict[str, Callable[[System], None]] = {}


def fault(act: Callable[[System], None]) -> Callable[[System], None]:
    FAULTS[act.__name__] = act
    return act


@fault
def role_killed(system: System) -> None:
    system.chance.choice(system.copies).send(signal.SIGKILL)


@fault
def all_roles_killed(system: System) -> None:
    for copy in system.copies:
        copy.send(signal.SIGKILL)


@fault
def role_frozen_beyond_its_lease(system: System) -> None:
    frozen = system.chance.choice(system.copies)
    frozen.send(signal.SIGSTOP)
    system.wait(1.5 * float(system.world.settings.lease_seconds))
    frozen.send(signal.SIGCONT)


@fault
def role_told_to_stop(system: System) -> None:
    system.chance.choice(system.copies).send(signal.SIGTERM)


@fault
def supervisor_of_a_job_killed(system: System) -> None:
    for r in system.ask("SELECT handle FROM run WHERE state IN ('SUBMITTED', 'RUNNING') AND handle <> '' LIMIT 1"):
        with suppress(ProcessLookupError):
            os.kill(int(r.handle.split(":")[0]), signal.SIGKILL)


@fault
def valkey_killed_and_empty(system: System) -> None:
    system.kill_server("valkey", signal.SIGKILL, forget="valkey")


@fault
def valkey_flushed(system: System) -> None:
    system.redis.flushall()


@fault
def stream_deleted(system: System) -> None:
    if streams := system.streams():
        system.redis.delete(system.chance.choice(streams))


@fault
def groups_destroyed(system: System) -> None:
    for key in system.streams():
        for group in system.redis.xinfo_groups(key):
            system.redis.xgroup_destroy(key, group["name"])


@fault
def messages_doubled_and_shuffled(system: System) -> None:
    for key in system.streams():
        entries = system.redis.xrange(key, count=200) * 2
        system.chance.shuffle(entries)
        for _, fields in entries:
            system.redis.xadd(key, fields)


@fault
def old_messages_again(system: System) -> None:
    for _, fields in system.redis.xrevrange("wfm:{1}:events", count=50):
        kind = json.loads(fields[b"event"])["type"]
        if (key := f"wfm:{{1}}:{kind}".encode()) in system.streams():
            system.redis.xadd(key, fields)


@fault
def garbage(system: System) -> None:
    for key in system.streams():
        system.redis.xadd(key, {"event": GARBAGE + b"%d" % system.chance.randrange(2**32)})


@fault
def postgres_stopped_immediately(system: System) -> None:
    system.kill_server("postgres", signal.SIGQUIT)


@fault
def postgres_sessions_terminated(system: System) -> None:
    system.ask(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    system.world.store.engine.dispose()


@contextmanager
def _proxied(system: System, seconds: float = 1.0) -> Iterator[None]:
    """For a while, something is wrong with the network of half of the roles."""
    yield
    system.wait(seconds)
    system.postgres_proxy.heal()
    system.redis_proxy.heal()


@fault
def replies_of_commits_lost(system: System) -> None:
    with _proxied(system):
        system.postgres_proxy.lose_replies("COMMIT", p=0.3, seed=system.chance.random())


@fault
def replies_of_redis_lost(system: System) -> None:
    with _proxied(system):
        system.redis_proxy.lose_replies("XADD", "XACK", "XREADGROUP", p=0.3, seed=system.chance.random())


@fault
def redis_answers_with_errors(system: System) -> None:
    error = system.chance.choice([proxy.READONLY, proxy.MISCONF, proxy.OOM, proxy.NOPERM, proxy.LOADING])
    with _proxied(system):
        system.redis_proxy.answer(error, *proxy.WRITES)


@fault
def cut_off_from_postgres(system: System) -> None:
    with _proxied(system, 1.5 * float(system.world.settings.lease_seconds)):
        system.postgres_proxy.refuse()


@fault
def cut_off_from_redis(system: System) -> None:
    with _proxied(system):
        system.redis_proxy.refuse()


@fault
def network_stalled(system: System) -> None:
    with _proxied(system):
        system.postgres_proxy.stall()
        system.redis_proxy.stall()


# --- the two ways to run it ---


def rounds(chance: random.Random) -> Iterator[str]:
    """Kinds of faults for ever: all of them, in a new order each round."""
    while True:
        yield from chance.sample(list(FAULTS), len(FAULTS))


def chaos(system: System, seconds: float, runs: int) -> None:
    """Random faults for so long, and until so many runs have been accepted."""
    kinds = rounds(system.chance)
    began = said = time.monotonic()
    while (now := time.monotonic()) < began + seconds or _accepted(system) < runs:
        if now > began + 3 * seconds + 60:
            raise SystemExit(f"in three times the time, only {_accepted(system)} runs came about: no verdict")
        if 0 <= system.open_runs() < 150:
            system.register(system.chance.randrange(1, 80))
        if system.chance.random() < 0.3:
            system.change()
        system.confirm()
        if system.chance.random() < 0.2:
            with suppress(DBAPIError):
                system.meddle()
        if system.chance.random() < 0.2:
            with suppress(DBAPIError):
                system.rename()
        with suppress(redis.RedisError):
            system.harm(next(kinds))
        system.wait(system.chance.uniform(0.1, 1.0))
        if now > said + 15:
            said = now
            done = min(1.0, (now - began) / seconds)
            print(f"{done:4.0%}  {sum(system.faults.values())} faults, {_accepted(system)} runs", flush=True)


def _accepted(system: System) -> int:
    rows = system.ask("SELECT count(*) AS n FROM run")
    return int(rows[0].n) if rows else 0


def recovery(system: System, runs: int) -> None:
    """Each kind once, with so many runs in flight, and time to recover."""
    for kind in FAULTS:
        while (left := system.open_runs()) < runs:
            if left >= 0:
                system.register(runs + 50 - left)
            system.wait(1.0)
        wait_until(
            lambda: system.ask(f"SELECT 1 FROM run WHERE state IN {AT_WORK} HAVING count(*) > 5"), 120, "at work"
        )
        with suppress(redis.RedisError):
            system.harm(kind)
        wait_until(lambda: system.look() or not system.recovering, 300, f"recovered from {kind}")
        print(f"{kind}: {', '.join(f'{s:.1f} s' for s in system.recovered[kind])}", flush=True)


def verdict(system: System) -> dict[str, Any]:
    """Heal, wait until nothing moves any more, and have the checker look."""
    system.heal()
    system.confirm()
    deadline = time.monotonic() + 600
    while (stirring := restless(system.world)) and time.monotonic() < deadline:
        system.wait(0.5)
    ours = system.world.query("SELECT count(*) AS n FROM dead_letter WHERE position(:body IN body) = 1", body=GARBAGE)
    report = examine(system.world, repeats=EFFECTS, dead_letters=int(ours[0].n), stirring=stirring)
    doubled = [v for v in report.violations if any(w in v for w in (" computed ", " was accepted ", " was done "))]
    settings = system.world.settings
    return {
        "runs": report.runs,
        "completed": report.completed,
        "jobs": report.jobs,
        "packages": report.packages,
        "unknown_outcomes": report.unknown,
        "renames": system.names,
        "faults": dict(sorted(system.faults.items())),
        "lost": len(report.violations) - len(doubled),
        "doubled": len(doubled),
        "violations": report.violations,
        "recovery_s": {
            kind: {"n": len(s), "median": round(statistics.median(s), 2), "worst": round(max(s), 2)}
            for kind, s in sorted(system.recovered.items())
            if s
        },
        "intervals_s": {
            name: {"here": getattr(settings, name), "default": getattr(load({}), name)}
            for name in sorted(k.removeprefix("WFM_").lower() for k in SHORT)
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of everything that is drawn by lot; a new one if left out")
    parser.add_argument("--runs", type=int, help="how many runs there must be; in flight, with --recovery")
    parser.add_argument("--recovery", action="store_true", help="each kind of fault once, at the default intervals")
    parser.add_argument("--report", type=Path, help="where to write the report as JSON")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    runs = given.runs if given.runs is not None else 1000 if given.recovery else int(500 * given.minutes)
    again = "--recovery" if given.recovery else f"--minutes {given.minutes:g}"
    print(f"seed {seed}; once more: python -m tests.faults.chaos {again} --runs {runs} --seed {seed}", flush=True)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="wfm-chaos-", dir=memory if memory.is_dir() else None) as directory:
        system = System(Path(directory), seed, DEFAULT if given.recovery else SHORT)
        try:
            recovery(system, runs) if given.recovery else chaos(system, 60 * given.minutes, runs)
            report = {"seed": seed, **verdict(system)}
        finally:
            system.close()
    if given.report:
        given.report.write_text(json.dumps(report, indent=2) + "\n")
    _say(report)
    return 1 if report["violations"] else 0


def _say(report: dict[str, Any]) -> None:
    print(f"\n{'fault':34} times   recovery: median    worst")
    for kind, n in report["faults"].items():
        s = report["recovery_s"].get(kind)
        print(f"{kind:34} {n:5}" + (f"{s['median']:17.1f} s {s['worst']:6.1f} s" if s else ""))
    intervals = (f"{name} {s['here']:g} s ({s['default']:g})" for name, s in report["intervals_s"].items())
    print(f"intervals (defaults): {', '.join(intervals)}")
    print(f"{report['runs']} runs of {report['packages']} packages, {report['completed']} completed")
    print(f"{sum(report['faults'].values())} faults of {len(report['faults'])} kinds, seed {report['seed']}")
    print("\n".join(report["violations"]))
    print(f"lost: {report['lost']}, doubled: {report['doubled']}")


if __name__ == "__main__":
    sys.exit(main())
