"""A role as a process of its own, whose effects are recorded::

    python -m tests.faults.role worker --ledger FILE [--kill POINT | --freeze POINT | --hold POINT ...] [--nth N]

Points are those of `tests.faults.points`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults import points
from tests.faults.ledger import Ledger
from tests.faults.recorded import record
from wfm import service
from wfm.cli.context import start_logging
from wfm.config import load
from wfm.model import Role


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", type=Role)
    parser.add_argument("--ledger", type=Ledger, required=True)
    for action in ("kill", "freeze", "hold"):
        parser.add_argument(f"--{action}", choices=points.POINTS, action="append", default=[])
    parser.add_argument("--nth", type=int, default=1)
    given = parser.parse_args(arguments)
    for action in ("kill", "freeze", "hold"):
        for name in getattr(given, action):
            points.arm(name, action, given.nth)
    build = service.build
    service.build = lambda *args, **kwargs: record(build(*args, **kwargs), given.ledger)
    settings = load()
    start_logging(settings.log_level, given.role)
    service.serve(settings, given.role)


def forked(arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
    """`main` in a child that a fork server made: it starts without importing anything again."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    os.environ.update(environ)
    main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
