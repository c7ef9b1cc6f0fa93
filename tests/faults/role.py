"""A role as a process of its own, whose effects are recorded: ``python -m tests.faults.role worker --ledger FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

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
    given = parser.parse_args(arguments)
    build = service.build
    service.build = lambda *args, **kwargs: record(build(*args, **kwargs), given.ledger)
    settings = load()
    start_logging(settings.log_level, given.role)
    service.serve(settings, given.role)


if __name__ == "__main__":
    main(sys.argv[1:])
