"""A small world to test wfm in: an archive with packages, pipelines of tiny programs, and the roles at work.

The programs and the roles' tasks write what they do into a ledger outside wfm's reach (`tests.faults.ledger`), clients
note what they asked; `World.check` judges everything by that.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tests.faults.checker import Report, check, restless
from tests.faults.history import Call, History
from tests.faults.ledger import Ledger
from tests.faults.recorded import record
from wfm import acts, catalogue, documents
from wfm.bus import RedisError
from wfm.config import Settings, load
from wfm.model import Actor, Role
from wfm.service import Service, build, open_bus, open_store

ACTOR = Actor("user:test", "a test")

PROGRAM = """
import hashlib, json, os, sys, time
sys.path.insert(0, {repository!r})
from tests.faults.ledger import Ledger

def digest(path):
    with open(path, "rb") as f:
        return "sha256:" + hashlib.sha256(f.read()).hexdigest()

m = json.load(open(os.environ["WORKFLOW_MANIFEST"]))
p = m["config"]["parameters"]
ledger = Ledger({ledger!r})
effect = f"job {{m['run_id']}}.{{m['attempt']}}"
ledger.write(effect, "begin", step=m["step"]["name"], unit=m["unit"]["key"])
time.sleep(p.get("seconds", 0))
if p.get("exit") or m["unit"]["key"] in p.get("exit_for", []):
    print("this software does not like its input", file=sys.stderr)
    sys.exit(p.get("exit", 3))
inputs = [i["path"] for i in m["input_files"] + m["input_products"]]
text = "".join(open(i).read() for i in sorted(inputs))
for word, times in p.get("chokes_on", {{}}).items():
    if text.count(word) >= times:
        print("this software does not like so much", word, file=sys.stderr)
        sys.exit(3)
out = os.environ["WORKFLOW_OUTPUT_DIR"]
if m["step"]["is_final"]:
    out = os.path.join(out, "science")
result = os.path.join(out, m["unit"]["key"] + ".txt")
with open(result, "w") as f:
    f.write(text)
ledger.write(
    effect, "end",
    files={{f"{{i['package']}}/{{i['name']}}": digest(i["path"]) for i in m["input_files"]}},
    upstream=sorted({{i["run_id"] for i in m["input_products"]}}),
    outputs={{os.path.relpath(result, os.environ["WORKFLOW_ATTEMPT_DIRECTORY"]): digest(result)}},
)
"""

REPOSITORY = Path(__file__).parents[1]

STEP_DEFAULTS = {"software": "copy", "version": "1.0.0", "max_retries": 0}


def wait_until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """Wait for a condition, never for a time; fail loudly when it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {what or condition}")
        time.sleep(0.02)
    return value


class Process(Protocol):
    """A role that is a process of its own."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Its exit code; None while it lives."""
        ...

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        ...


class World:
    def __init__(self, directory: Path, database_url: str, redis_url: str, **environ: str) -> None:
        self.directory = directory
        self.archive = directory / "archive"
        self.archive.mkdir()
        self.ledger = Ledger(directory / "ledger.jsonl")
        self.history = History()
        self.program = directory / "step_program.py"
        self.program.write_text(PROGRAM.format(repository=str(REPOSITORY), ledger=str(self.ledger.path)))
        self._services: list[Service] = []
        self._processes: list[Process] = []
        self.environ = {
            "WFM_DATABASE_URL": database_url,
            "WFM_REDIS_URL": redis_url,
            "WFM_HOME": str(directory / "home"),
            "WFM_PIPELINE_BASE_DIR": str(directory / "pipelines"),
            "WFM_LOCAL_CPU": "4",
            "WFM_LOCAL_MEMORY_GB": "8",
            "WFM_STAGING_RESERVE_GB": "0",
            "WFM_SWEEP_SECONDS": "0.2",
            "WFM_RETRY_BACKOFF_SECONDS": "0.2",
            **environ,
        }
        self.store = open_store(self.settings)
        self.apply(
            f"""
            kind: site
            name: here
            ---
            kind: location
            name: archive
            site: here
            type: long_term_archive
            root: {self.archive}
            ---
            kind: location
            id: 1
            name: processing
            site: here
            type: processing
            root: {directory / "pipelines"}
            ---
            kind: software
            name: copy
            versions:
              - version: 1.0.0
                command: [python, {self.program}]
            ---
            kind: grouping
            name: everything
            rules: []
            """
        )

    @property
    def settings(self) -> Settings:
        return load(self.environ)

    def close(self) -> None:
        """Leave nothing behind, also when the test failed in the middle."""
        for process in self._processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
        self.store.close()

    # --- what people do ---

    def apply(self, text: str) -> Any:
        lines = text.splitlines()
        indent = min((len(x) - len(x.lstrip()) for x in lines if x.strip()), default=0)
        loaded = documents.load([("test.yaml", "\n".join(x[indent:] for x in lines))])
        return self.act(
            lambda tx: documents.apply(tx.conn, loaded, location_id=1, actor=ACTOR.name, reason=ACTOR.reason)
        )

    def act(self, work: Callable[[Any], Any]) -> Any:
        """A transaction, and its events published, at best, as the command line does."""
        with self.store.begin() as tx:
            value = work(tx)
            tx.load_events(list(getattr(value, "event_ids", ())))
        with suppress(RedisError):
            open_bus(self.settings).send(tx.outbox)
        return value

    def pipeline(self, name: str, steps: Sequence[dict[str, Any]], **more: Any) -> None:
        body = {"kind": "pipeline", "name": name, "grouping": "everything", **more}
        body["steps"] = [{**STEP_DEFAULTS, **s} for s in steps]
        self.apply(json.dumps(body))

    def config(self, name: str, **parameters: Any) -> None:
        self.apply(json.dumps({"kind": "config", "name": name, "parameters": parameters}))

    def package(
        self,
        name: str,
        content: str = "",
        *,
        checksum: str | None = None,
        metadata: Any = None,
        obs_unit: str = "unit",
    ) -> Any:
        """A package with one file on disk, not registered yet."""
        folder = self.archive / name
        folder.mkdir(exist_ok=True)
        data = (content or f"data of {name}\n").encode()
        (folder / "raw.txt").write_bytes(data)
        return catalogue.PackageIn(
            name=name,
            executed_obs_unit=catalogue.ExecutedObsUnitIn(name=name, obs_unit=obs_unit, source="NGC253"),
            instrument="cam",
            module="mod1",
            metadata=metadata or {},
            files=(
                catalogue.FileIn(
                    name="raw.txt",
                    size=len(data),
                    checksum=checksum or "sha256:" + hashlib.sha256(data).hexdigest(),
                ),
            ),
            location="archive",
            path=name,
        )

    def register(self, *packages: Any) -> Any:
        calls = [Call("register", p.name, {f.name: f.checksum for f in p.files}) for p in packages]
        return self.history.call(
            calls,
            lambda: self.act(lambda tx: catalogue.register(tx.conn, packages, location_ids=[1], actor=ACTOR.name)),
        )

    def cancel(self, *runs: int) -> Any:
        return self._ask("cancel", acts.cancel_runs, runs)

    def retry(self, *runs: int) -> Any:
        return self._ask("retry", acts.retry_runs, runs)

    def _ask(self, operation: str, act: Callable[..., acts.Moved], runs: Sequence[int]) -> acts.Moved | None:
        calls = [Call(operation, i) for i in runs]
        moved = self.history.call(calls, lambda: self.act(lambda tx: act(tx, runs, ACTOR)))
        for call in calls:
            if moved is not None and call.target in moved.refused:
                call.outcome = "failed"
        return moved

    # --- what is seen ---

    def query(self, sql: str, **params: Any) -> list[Any]:
        with self.store.begin() as tx:
            return list(tx.all(sql, **params))

    def runs(self) -> list[Any]:
        return self.query(
            "SELECT r.*, s.name AS step, u.key AS unit FROM run r JOIN reduction_step s ON s.id = r.step_id"
            " JOIN unit u ON u.id = r.unit_id ORDER BY r.id"
        )

    def states(self) -> Counter[tuple[str, str]]:
        return Counter((r.step, r.state) for r in self.runs())

    def coverage(self) -> dict[tuple[str, str], Any]:
        rows = self.query(
            "SELECT c.*, s.name AS step, u.key AS unit FROM coverage c JOIN reduction_step s ON s.id = c.step_id"
            " JOIN unit u ON u.id = c.unit_id"
        )
        return {(r.step, r.unit): r for r in rows}

    def all_covered(self, n: int) -> bool:
        states = [c.state for c in self.coverage().values()]
        return len(states) == n and all(s == "covered" for s in states)

    def executions(self) -> Counter[tuple[str, ...]]:
        """(step, unit, run, attempt) → how often a job did its work, as the jobs themselves wrote it."""
        return Counter(
            (x.more["step"], x.more["unit"], str(x.run), str(x.attempt))
            for x in self.ledger.lines()
            if x.kind == "job" and x.phase == "begin"
        )

    def rest(self) -> None:
        """Wait until nothing moves any more; `check` asks for much more."""
        wait_until(lambda: not restless(self), what="nothing moves any more")

    def check(self, **expected: Any) -> Report:
        """Everything that must hold once nothing moves any more; see `tests.faults.checker.check`."""
        return check(self, **expected)

    def lives(self, consumer: str) -> bool:
        """Whether who reads under this name is at work, or came to no good end: then the name may stand for an hour."""
        pid = int(consumer.split(":")[1])
        if pid == os.getpid():
            return consumer in {s.bus.consumer for s in self._services}
        return any(p.pid == pid and p.poll() != 0 for p in self._processes)

    # --- the roles ---

    @contextmanager
    def roles(self, *which: Role, copies: int = 1) -> Iterator[list[Service]]:
        """Roles as threads of this process."""
        services = [
            record(build(self.settings, r, slots=4), self.ledger) for r in (which or tuple(Role)) for _ in range(copies)
        ]
        threads = [threading.Thread(target=s.run, name=str(s.work.role)) for s in services]
        self._services += services
        for t in threads:
            t.start()
        try:
            yield services
        finally:
            for s in services:
                s.stop()
            for t in threads:
                t.join(timeout=30)
            assert not any(t.is_alive() for t in threads), "a role did not stop"
            self._services = [s for s in self._services if s not in services]

    def spawn(self, role: Role, *arguments: str, **environ: str) -> subprocess.Popen[bytes]:
        """A role as a process of its own; see `tests.faults.role`."""
        with open(self.directory / f"{role}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.role", role, "--ledger", str(self.ledger.path), *arguments],
                env={**os.environ, **self.environ, **environ},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=REPOSITORY,
            )
        self.watch(process)
        return process

    def watch(self, process: Process) -> None:
        """Know a role that somebody else started."""
        self._processes.append(process)
