"""Writes the effects of a role's tasks into the ledger, around the kinds' `perform`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.faults.ledger import Ledger
from wfm.service import Service
from wfm.store import TaskRow, Tx
from wfm.tasks import Kind


class Recorded:
    """A kind of task that writes down each of its effects before and after it happens."""

    def __init__(self, kind: Kind, ledger: Ledger) -> None:
        self._kind = kind
        self._ledger = ledger
        self._tasks: dict[int, tuple[TaskRow, Any]] = {}  # by the identity of the work, which is kept alive here

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kind, name)

    def prepare(self, tx: Tx, tasks: Sequence[TaskRow]) -> Mapping[int, Any]:
        works = self._kind.prepare(tx, tasks)
        self._tasks |= {id(works[t.id]): (t, works[t.id]) for t in tasks if t.id in works}
        return works

    def perform(self, work: Sequence[Any], alive: Callable[[], bool]) -> Sequence[Any]:
        tasks = [self._tasks.pop(id(w))[0] for w in work]
        for task in tasks:
            self._write(task, "begin")
        try:
            values = self._kind.perform(work, alive)
        except Exception as e:
            for task in tasks:
                self._write(task, "failed", error=str(e))
            raise
        for task, value in zip(tasks, values, strict=True):
            if isinstance(value, Exception):
                self._write(task, "failed", error=str(value))
            else:
                self._write(task, "end")
        return values

    def _write(self, task: TaskRow, phase: str, **more: Any) -> None:
        if task.run_id is not None:  # the poll belongs to no run; looking is no effect
            self._ledger.write(f"{task.kind} {task.run_id}.{task.attempt}", phase, task.epoch, **more)


def record(service: Service, ledger: Ledger) -> Service:
    """Have a role's tasks recorded; before it runs."""
    runner = getattr(service.work, "runner", None)
    if runner is not None:
        runner.kinds = {name: Recorded(kind, ledger) for name, kind in runner.kinds.items()}
    return service
