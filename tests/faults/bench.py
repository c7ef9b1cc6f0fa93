"""A world whose roles can be stopped, killed, frozen and started one by one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.faults import role as role_program
from tests.harness import World
from tests.services import Servers
from wfm.model import Role

QUICK = {
    "WFM_LEASE_SECONDS": "1",
    "WFM_CLAIM_IDLE_SECONDS": "0.5",
    "WFM_REPUBLISH_SECONDS": "1",
    "WFM_RECONCILE_SECONDS": "5",
    "WFM_SWEEP_SECONDS": "0.4",
    "WFM_BLOCK_SECONDS": "0.3",
    "WFM_LOG_LEVEL": "INFO",
}
"""Seconds of the loop with which a test need not wait long."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.faults.role"])
_starting = threading.Lock()
"""Starting a process asks for the ends of all others, and each end can be read only once."""


class Victim:
    """A role as a process that something is done to."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """As `subprocess` counts: minus the signal that ended it; None while it lives."""
        with _starting:
            return self.process.exitcode

    @property
    def is_frozen(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 30.0) -> int:
        """Its exit code, when it has ended."""
        deadline = time.monotonic() + seconds
        while (code := self.exit_code) is None:
            assert time.monotonic() < deadline, f"{self.pid} did not end within {seconds} s:\n{self.tail()}"
            time.sleep(0.01)
        return code

    def tail(self) -> str:
        return "\n".join(self.log.read_text().splitlines()[-20:])


class Bench:
    """A world, its roles as threads that can be stopped and started one by one, and victims."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._roles = {role: ExitStack() for role in Role}
        self._victims: list[Victim] = []

    def start(self, *roles: Role) -> None:
        for role in roles or Role:
            self._roles[role].enter_context(self.world.roles(role))

    def stop(self, *roles: Role) -> None:
        for role in roles or Role:
            self._roles[role].close()

    def victim(self, role: Role, *arguments: str) -> Victim:
        """Start a role as a process; for the arguments see `tests.faults.role`."""
        log = self.world.directory / f"victim-{len(self._victims)}-{role}.log"
        log.touch()
        given = [role, "--ledger", str(self.world.ledger.path), *arguments]
        process = _processes.Process(target=role_program.forked, args=(given, self.world.environ, log))
        with _starting:
            process.start()
        victim = Victim(process, log)
        self._victims.append(victim)
        self.world.killed.add(victim.pid)
        return victim

    def close(self) -> None:
        """End everything, gently where that works."""
        self.stop()
        for victim in self._victims:
            if victim.exit_code is None:
                victim.send(signal.SIGKILL)
                victim.wait()
        self.world.close()


@contextmanager
def bench(servers: Servers, template: str, directory: Path) -> Iterator[Bench]:
    """A bench in a new database, with an empty Redis."""
    with servers.database(template=template) as database, servers.redis() as redis_url:
        made = Bench(World(directory, database, redis_url, **QUICK))
        try:
            yield made
        finally:
            made.close()
