"""A role that its input kills: ``python -m tests.faults.deadly KIND ROLE --ledger FILE``.

KIND is a type of event, or a kind of task. The process is gone at once when it is given one of run 2.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from tests.faults import role
from wfm import service
from wfm.service import Service

DEADLY = 2
"""The run."""


def deadly(made: Service, kind: str) -> Service:
    """Make a role mortal, before it runs."""
    handle = made.work.handle

    def mortal_handle(tx: Any, events: Sequence[Any]) -> Any:
        if any(getattr(e, "run", None) == DEADLY and e.__struct_config__.tag == kind for e in events):
            os.kill(os.getpid(), signal.SIGKILL)
        return handle(tx, events)

    made.work.handle = mortal_handle  # type: ignore[method-assign]
    if (task := getattr(getattr(made.work, "runner", None), "kinds", {}).get(kind)) is not None:
        prepare, perform, fatal = task.prepare, task.perform, set()

        def mortal_prepare(tx: Any, tasks: Sequence[Any]) -> Any:
            works = prepare(tx, tasks)
            fatal.update(id(works[t.id]) for t in tasks if t.run_id == DEADLY and t.id in works)
            return works

        def mortal_perform(work: Sequence[Any], alive: Any) -> Any:
            if any(id(w) in fatal for w in work):
                os.kill(os.getpid(), signal.SIGKILL)
            return perform(work, alive)

        task.prepare, task.perform = mortal_prepare, mortal_perform
    return made


if __name__ == "__main__":
    kind, *others = sys.argv[1:]
    build = service.build
    service.build = lambda *args, **kwargs: deadly(build(*args, **kwargs), kind)
    role.main(others)
