"""What really happened outside wfm, written down where wfm cannot touch it.

One JSON line for each beginning and each end of an effect, appended and synced. Jobs write theirs themselves, so this
imports the standard library only; the effects of roles are written by `tests.faults.recorded`.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One line.

    Attributes:
        effect: what and for which attempt: ``job 17.2`` is the job of run 17, attempt 2.
        phase: begin, end, or failed (it ended with an error).
        epoch: of the task that did it; None for jobs.
        pid: of the process that wrote. at: seconds since the epoch, by its clock.
        more: what else the writer had to say.
    """

    effect: str
    phase: str
    epoch: int | None
    pid: int
    at: float
    more: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.effect.split()[0]

    @property
    def run(self) -> int:
        return int(self.effect.split()[1].split(".")[0])

    @property
    def attempt(self) -> int:
        return int(self.effect.split()[1].split(".")[1])


class Ledger:
    """An append-only file that any number of processes write to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, effect: str, phase: str, epoch: int | None = None, **more: Any) -> None:
        """Append one line, in one write, and sync it: what follows in the program happened later."""
        line = json.dumps([effect, phase, epoch, os.getpid(), time.time(), more]) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def lines(self) -> list[Line]:
        """All lines so far, in the order of writing."""
        try:
            content = self.path.read_text()
        except FileNotFoundError:
            return []
        return [Line(*json.loads(line)) for line in content.splitlines()]
