"""Named points in the code of the roles at which a test kills, freezes or holds a process.

Nothing of this is in the product: a point is a function of wfm, before or after its call, and `arm` puts a wrapper
there in the process that is to suffer.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Literal

from msgspec import Struct

from wfm.model import Role

log = logging.getLogger(__name__)

Action = Literal["kill", "freeze", "hold", "dawdle"]
"""SIGKILL or SIGSTOP to the process itself; or the thread waits for ever, or until the role is told to stop."""

EVERY = tuple(Role)
TASKED = (Role.WORKER, Role.RESULT_MANAGER)
WORKER = (Role.WORKER,)
RESULTS = (Role.RESULT_MANAGER,)


class Point(Struct, frozen=True):
    """A place in the code.

    Attributes:
        function: ``module:name`` or ``module:Class.name``. when: before or after its call.
        roles: that come by.
        given: whether a call counts; takes its arguments (self first) and, after it, its result.
        since: count only what comes after this point was passed.
    """

    function: str
    when: Literal["before", "after"]
    roles: tuple[Role, ...] = EVERY
    given: Callable[[tuple[Any, ...], Any], object] = lambda arguments, result: True
    since: Point | None = None


def _entries(arguments: tuple[Any, ...], result: Any) -> object:
    return result


def _own_messages(arguments: tuple[Any, ...], result: Any) -> object:
    """`Bus.send` of events with a row in the ledger."""
    return any(m.id is not None for m in arguments[1])


def _outbox(arguments: tuple[Any, ...], result: Any) -> object:
    """`Store.retrying` of a transaction that wrote events."""
    return any(m.id is not None for m in result[1])


MARKED = Point("wfm.store:Tx.mark_done", "after", given=lambda arguments, result: arguments[1])
LEASED = Point("wfm.store:Tx.claim_tasks", "after", TASKED, _entries)
SETTLED = Point("wfm.tasks:TaskRunner.settle", "after", TASKED)
BURIED = Point("wfm.store:Tx.bury", "after")

POINTS: dict[str, Point] = {
    # messages
    "before-read": Point("wfm.bus:Bus.read", "before"),
    "after-read": Point("wfm.bus:Bus._read", "after", given=_entries),
    "after-decode": Point("wfm.events:decode", "after"),
    "before-work": Point("wfm.service:Service._handle", "before"),
    "before-commit": MARKED,
    "after-commit": Point("wfm.store:Store.retrying", "after", since=MARKED),
    "before-publish": Point("wfm.store:Store.retrying", "after", given=_outbox),
    "after-publish": Point("wfm.bus:Bus.send", "after", given=_own_messages),
    "after-relay": Point("wfm.store:Tx.due_events", "after", given=lambda a, r: a[0].outbox),
    "before-dead-letter": Point("wfm.store:Tx.bury", "before"),
    "after-dead-letter": BURIED,
    "before-dead-letter-ack": Point("wfm.store:Store.retrying", "after", since=BURIED),
    "after-dead-letter-ack": Point("wfm.bus:Bus.send", "after", since=BURIED),
    # leases
    "after-lease": LEASED,
    "after-lease-commit": Point("wfm.store:Store.retrying", "after", TASKED, since=LEASED),
    "before-renewal": Point("wfm.store:Tx.renew_leases", "before", TASKED),
    "after-renewal": Point("wfm.store:Tx.renew_leases", "after", TASKED),
    "before-settle": Point("wfm.tasks:TaskRunner.settle", "before", TASKED),
    "before-settle-commit": SETTLED,
    "after-settle-commit": Point("wfm.store:Store.retrying", "after", TASKED, since=SETTLED),
    # effects
    "before-stage": Point("wfm.kinds:Stage.perform", "before", WORKER),
    "before-seal": Point("wfm.staging:_seal", "before", WORKER),
    "after-stage": Point("wfm.kinds:Stage.perform", "after", WORKER),
    "before-submit": Point("wfm.kinds:Submit.perform", "before", WORKER),
    "after-job-file": Point("wfm.backends.local:LocalBackend._prepare", "after", WORKER),
    "after-launch": Point("wfm.backends.local:_Launcher.launch", "after", WORKER),
    "after-submit": Point("wfm.kinds:Submit.perform", "after", WORKER),
    "before-collect": Point("wfm.kinds:Collect.perform", "before", WORKER),
    "after-collect": Point("wfm.kinds:Collect.perform", "after", WORKER),
    "before-cancel": Point("wfm.kinds:Cancel.perform", "before", WORKER),
    "after-cancel": Point("wfm.kinds:Cancel.perform", "after", WORKER),
    "before-purge": Point("wfm.kinds:Purge.perform", "before", WORKER),
    "after-purge": Point("wfm.kinds:Purge.perform", "after", WORKER),
    "before-poll": Point("wfm.kinds:Poll.perform", "before", RESULTS),
    "after-poll": Point("wfm.kinds:Poll.perform", "after", RESULTS, lambda a, r: r[0]),
}


def arm(name: str, action: Action, nth: int = 1) -> None:
    """Act, once, when this process comes by a point for the nth time; it says so in its log before."""

    def act() -> None:
        log.warning("came by %s: %s", name, action)
        _ACTIONS[action]()

    if action == "dawdle":
        _watch(Point("wfm.service:Service.stop", "after"), _told_to_stop.set)
    _watch(POINTS[name], _Nth(nth, act))


_told_to_stop = threading.Event()

_ACTIONS: dict[Action, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hold": lambda: threading.Event().wait(),
    "dawdle": _told_to_stop.wait,
}


class _Nth:
    """Calls something the nth time it is called itself. Several threads may come by."""

    def __init__(self, nth: int, act: Callable[[], None]) -> None:
        self._left = nth
        self._act = act
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            mine = self._left == 0
        if mine:
            self._act()


def _watch(point: Point, act: Callable[[], None]) -> None:
    passed = threading.Event()
    if point.since is None:
        passed.set()
    else:
        _watch(point.since, passed.set)
    module, _, path = point.function.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        if point.when == "before" and passed.is_set() and point.given(arguments, None):
            act()
        result = inner(*arguments, **named)
        if point.when == "after" and passed.is_set() and point.given(arguments, result):
            act()
        return result

    setattr(owner, name, wrapper)
