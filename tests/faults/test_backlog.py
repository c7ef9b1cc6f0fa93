"""Back-pressure: a backlog waits in Postgres, streams stay at their mark, and what they did not take is not lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import structs

from tests.faults.bench import bench
from tests.harness import World, wait_until
from wfm import events
from wfm.model import Role
from wfm.service import build, open_bus, open_store

MARK = 50
PACKAGES = 2000
RUNS = 250
WORKED = 8
"""Runs that compute; the others are cancelled while they wait."""


@contextmanager
def longest(world: World) -> Iterator[Counter[str]]:
    """The greatest length of each command stream, looked at all the time."""
    seen: Counter[str] = Counter()
    stop = threading.Event()
    bus = open_bus(world.settings)

    def look() -> None:
        while not stop.is_set():
            for kind, n in bus.backlog(list(events.TYPES)).items():
                seen[kind] = max(seen[kind], n)
            time.sleep(0.005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        bus.client.close()


def test_a_flood_keeps_streams_at_their_mark_and_nothing_of_it_is_lost(servers, migrated, tmp_path):
    with bench(servers, migrated, tmp_path) as b:
        world = b.world
        world.environ |= {"WFM_STREAM_HIGH_WATER": str(MARK), "WFM_LEASE_SECONDS": "30"}
        world.store.close()
        world.store = open_store(world.settings)
        world.pipeline("flood", [{"name": "one", "group_by": ["executed_obs_unit"]}])
        with longest(world) as seen:
            # Nobody reads arrivals; then, nobody reads what became of them.
            for start in range(0, PACKAGES, 500):
                world.register(*(package(world, i) for i in range(start, start + 500)))
            assert pending(world) == {"data.arrived": PACKAGES, "pipeline.changed": 1}
            b.start(Role.TRIGGER_MANAGER)
            wait_until(lambda: pending(world) == {"gap.detected": RUNS}, what="all units have runs")
            wait_until(lambda: seen["gap.detected"])
            assert max(seen.values()) <= MARK, seen

            # Nobody reads of their ends, each of which must be told: a unit's coverage follows from it.
            b.stop()
            ids = [r.id for r in world.query("SELECT id FROM run ORDER BY id")]
            world.cancel(*ids[WORKED:])
            assert pending(world)["run.cancelled"] == RUNS - WORKED
            b.start()
            report = world.check()
        assert max(seen.values()) <= MARK + len(Role) * MARK, "each relay may add a page at the same moment"
        assert (report.runs, report.completed, report.packages) == (RUNS, WORKED, PACKAGES)
        assert Counter(c.why for c in world.coverage().values()) == {"covered": WORKED, "cancelled": RUNS - WORKED}


def test_the_relay_takes_from_the_ledger_what_a_stream_has_room_for(world):
    """What it took and could not publish would be backed off, and wait ever longer."""
    world.environ |= {"WFM_STREAM_HIGH_WATER": "5"}
    world.pipeline("p", [{"name": "one", "group_by": ["raw_data_package"]}])
    world.register(*(world.package(f"p{i:02}") for i in range(20)))
    world.query("UPDATE event SET publish_at = now() WHERE type = 'data.arrived' RETURNING 1")
    service = build(world.settings, Role.WORKFLOW_MANAGER)
    client, stream = service.bus.client, "wfm:{1}:data.arrived"

    def relayed() -> tuple[int, int]:
        service._commit(service._relay_turn)
        published = world.query("SELECT 1 FROM event WHERE type = 'data.arrived' AND publishes > 0")
        return len(published), client.xlen(stream)

    assert relayed() == (0, 5)
    client.xtrim(stream, maxlen=2, approximate=False)
    assert relayed() == (3, 5)
    assert relayed() == (3, 5)
    with service.store.begin() as tx:
        tx.load_events([r.id for r in tx.all("SELECT id FROM event")])
        assert Counter(m.type for m in tx.outbox) == {"data.arrived": 5, "pipeline.changed": 1}
    service.store.close()
    client.close()


def test_what_an_admission_looked_at_is_done_though_it_was_never_published(world):
    world.environ |= {"WFM_STREAM_HIGH_WATER": "5", "WFM_REPUBLISH_SECONDS": "3600"}
    world.pipeline("p", [{"name": "one", "group_by": ["raw_data_package"], "resources": {"cpu": 99}}])
    with world.roles(Role.TRIGGER_MANAGER):
        world.register(*(world.package(f"p{i:02}") for i in range(20)))
        wait_until(lambda: pending(world) == {"gap.detected": 20})
    # The trigger-manager may have found all by itself, and not read yet what it was told.
    with world.roles(Role.TRIGGER_MANAGER, Role.WORKFLOW_MANAGER):
        wait_until(lambda: pending(world) == {}, seconds=20)
        report = world.check()
    assert report.runs == 20
    assert {r.waiting_for.split(":")[0] for r in world.runs()} == {"never fits"}


def package(world: World, i: int) -> Any:
    """One of the packages of a unit."""
    made = world.package(f"p{i:04}")
    unit = structs.replace(made.executed_obs_unit, name=f"scan-{i % RUNS:03}")
    return structs.replace(made, executed_obs_unit=unit)


def pending(world: World) -> dict[str, int]:
    rows = world.query("SELECT type, count(*) AS n FROM event WHERE done_at IS NULL GROUP BY type")
    return {r.type: r.n for r in rows}
