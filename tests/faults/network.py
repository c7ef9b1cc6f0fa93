"""A world whose roles work as threads of the test, each with a network of its own that can be made bad."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from tests.faults.proxy import PostgresProxy, Proxy, RedisProxy
from tests.faults.recorded import record
from tests.harness import World
from wfm.config import load
from wfm.model import Role
from wfm.service import Service, build

P = TypeVar("P", bound=Proxy)

HASTE = {
    "WFM_LEASE_SECONDS": "4",
    "WFM_CLAIM_IDLE_SECONDS": "0.5",
    "WFM_REPUBLISH_SECONDS": "0.5",
    "WFM_SWEEP_SECONDS": "0.2",
    "WFM_BLOCK_SECONDS": "0.2",
    "WFM_POLL_MAX_SECONDS": "0.2",
    "WFM_VANISH_GRACE_SECONDS": "1",
    "WFM_RETRY_BACKOFF_SECONDS": "0.1",
}
"""What waits for seconds or minutes in production is due at once."""

SHORT_LEASE = {"WFM_LEASE_SECONDS": "1"}
"""For tests that wait for its end. A busy machine may miss a renewal: they allow for effects that are repeated."""

ONE = [{"name": "one", "group_by": ["executed_obs_unit"]}]
TWO = [*ONE, {"name": "two", "depends_on": ["one"], "group_by": []}]


class _Proxies(dict[Role, P]):
    """By role; made when first asked for, so that roles without faults are not slowed."""

    def __init__(self, make: Callable[[], P]) -> None:
        self._make = make

    def __missing__(self, role: Role) -> P:
        self[role] = self._make()
        return self[role]

    def all(self) -> list[P]:
        """Those of all roles."""
        return [self[r] for r in Role]


class Network:
    """The proxies before the servers, by role. A role that none was asked for is connected directly."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.environ |= HASTE
        self._open = ExitStack()
        given = world.settings
        self.postgres = _Proxies(lambda: self._open.enter_context(PostgresProxy(given.database_url)))
        self.redis = _Proxies(lambda: self._open.enter_context(RedisProxy(given.redis_url)))

    def close(self) -> None:
        self._open.close()

    def service(self, role: Role, *, direct: bool = False, slots: int = 4, **environ: str) -> Service:
        """A role behind its proxies, or directly at the servers."""
        own = {}
        if role in self.postgres and not direct:
            own["WFM_DATABASE_URL"] = self.postgres[role].url
        if role in self.redis and not direct:
            own["WFM_REDIS_URL"] = self.redis[role].url
        service = build(load({**self.world.environ, **own, **environ}), role, slots=slots)
        self.world._services.append(record(service, self.world.ledger))
        return service

    @contextmanager
    def roles(self, which: Sequence[Role] = tuple(Role)) -> Iterator[dict[Role, Service]]:
        """Roles at work behind their proxies."""
        services = {r: self.service(r) for r in which}
        with at_work(*services.values()):
            yield services


@contextmanager
def at_work(*services: Service) -> Iterator[None]:
    """Have services work, as threads; at the end none may have died, and all must stop when they are told to."""
    threads = [threading.Thread(target=s.run, name=str(s.work.role)) for s in services]
    for t in threads:
        t.start()
    try:
        yield
        dead = [t.name for t in threads if not t.is_alive()]
        assert not dead, f"died: {dead}"
    finally:
        for s in services:
            s.stop()
        for t in threads:
            t.join(timeout=40)
        assert not [t.name for t in threads if t.is_alive()], "a role did not stop"
