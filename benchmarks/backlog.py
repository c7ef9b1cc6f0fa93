"""A backlog, measured: one registration makes 100,000 runs, and the workers are slow.

Four roles as four processes on real servers. What is watched, from the registration on: the length of each stream,
the memory of Valkey and of each role, the pending events of the ledger, and that work goes on meanwhile. When the
backlog stands, the ledger has nothing to tell any more, and some runs of the backlog have been completed, one package
comes for another pipeline of the same priority; it ends when that has its slot.

    python benchmarks/backlog.py [--runs 100000] [--report FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from msgspec import structs

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.main_path import rss_mb
from tests.harness import World, wait_until
from wfm import events, migrations
from wfm.bus import Bus
from wfm.embedded import Embedded
from wfm.model import Role
from wfm.service import open_bus
from wfm.store import connect

WORKED_OFF = 60
"""Runs of the backlog that are completed before this ends."""

FLAT_MB = 64.0
"""How much more memory than before the flood a role may take at its peak."""

VALKEY_MB = 128.0
"""What Valkey may take: full command streams, and the public stream at its cap."""

PATIENCE = 600.0
"""Seconds from the registration on after which it ends, whatever was seen by then."""


def peak_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


class Watch:
    """What was seen from outside, and its extremes."""

    def __init__(self, world: World, bus: Bus, pids: dict[str, int]) -> None:
        self.world = world
        self.bus = bus
        self.pids = pids
        self.longest: dict[str, int] = {}
        self.valkey_mb = 0.0
        self.rss = {name: {"start": round(rss_mb(pid), 1)} for name, pid in pids.items()}
        self.log: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def look(self) -> dict[str, Any]:
        """Sample once. The counts are cheap enough not to disturb much; the roles' peaks come from the kernel."""
        kinds = [*events.TYPES, "events"]
        lengths = {k: n for k, n in self.bus.backlog(kinds).items() if n}
        for kind, n in lengths.items():
            self.longest[kind] = max(n, self.longest.get(kind, 0))
        used: Any = self.bus.client.info("memory")
        self.valkey_mb = max(self.valkey_mb, used["used_memory"] / 1e6)
        counts = self.world.query(
            "SELECT (SELECT count(*) FROM run WHERE state = 'PENDING') AS pending,"
            " (SELECT count(*) FROM run WHERE state NOT IN ('PENDING', 'FAILED', 'COMPLETED')) AS admitted,"
            " (SELECT count(*) FROM run WHERE state = 'FAILED') AS failed,"
            " (SELECT count(*) FROM run WHERE state = 'COMPLETED') AS completed,"
            " (SELECT count(*) FROM event WHERE done_at IS NULL) AS events"
        )[0]
        seen = {
            "at_s": round(time.monotonic() - self.began, 1),
            "runs": {name: getattr(counts, name) for name in ("pending", "admitted", "failed", "completed")},
            "events_pending": counts.events,
            "streams": lengths,
            "rss_mb": {name: round(rss_mb(pid)) for name, pid in self.pids.items()},
        }
        self.log.append(seen)
        return seen

    def end(self) -> None:
        for name, pid in self.pids.items():
            self.rss[name] |= {"peak": round(peak_mb(pid), 1), "end": round(rss_mb(pid), 1)}


def packages(world: World, n: int) -> list[Any]:
    """They share one file: what is on disk is not what is measured."""
    one = world.package("shared")
    return [
        structs.replace(one, name=name, executed_obs_unit=structs.replace(one.executed_obs_unit, name=name))
        for name in (f"p{i:06}" for i in range(n))
    ]


def measure(directory: Path, runs: int) -> dict[str, Any]:
    servers = Embedded(directory / "servers")
    servers.start()
    world = None
    processes = {}
    try:
        engine = connect(servers.database_url, "wfm")
        migrations.upgrade(engine, "wfm")
        engine.dispose()
        world = World(directory, servers.database_url, servers.redis_url)
        world.environ |= {"WFM_SWEEP_SECONDS": "1"}
        world.apply(
            """
            kind: software
            name: slow
            versions:
              - version: 1.0.0
                command: [/bin/sh, -c, 'sleep 1; : > "$WORKFLOW_OUTPUT_DIR/science/x"']
            """
        )
        world.pipeline("flood", [{"name": "one", "software": "slow", "group_by": ["raw_data_package"]}])
        processes = {str(role): world.spawn(role) for role in Role}
        wait_until(
            lambda: len(world.query("SELECT 1 FROM task WHERE run_id IS NULL")) == 2, what="the roles are at work"
        )
        world.register(
            world.package("first")
        )  # each role has worked once, so that its memory is that of a role at work
        wait_until(lambda: world.states()["one", "COMPLETED"] == 1)

        flood = packages(world, runs)
        bus = open_bus(world.settings)
        watch = Watch(world, bus, {name: p.pid for name, p in processes.items()})
        world.register(*flood)
        registered = time.monotonic() - watch.began
        decided = quiet = None
        told = time.monotonic()
        while True:
            seen = watch.look()
            now = time.monotonic() - watch.began
            if decided is None and sum(seen["runs"].values()) == runs + 1:
                decided = now
            if decided and quiet is None and seen["events_pending"] < 100:
                quiet = now
            if quiet and seen["runs"]["completed"] > WORKED_OFF:
                break
            if now > PATIENCE:
                break
            if time.monotonic() > told + 10:
                told = time.monotonic()
                print(json.dumps(seen), file=sys.stderr, flush=True)
            time.sleep(0.25)
        new = new_data(world)
        watch.end()
        return report(world, watch, runs, registered, decided, quiet, new)
    finally:
        for p in processes.values():
            p.terminate()
        for p in processes.values():
            try:
                p.wait(timeout=60)
            except subprocess.TimeoutExpired:
                p.kill()
        if world is not None:
            world.close()
        servers.stop()


def new_data(world: World) -> dict[str, Any]:
    """How long new data waits for a slot behind the backlog, and how many runs of the backlog get one before it."""
    rule = {"table": "obs_unit", "column": "name", "operator": "eq", "value": "tonight"}
    world.apply(json.dumps({"kind": "grouping", "name": "tonight", "rules": [rule]}))
    step = {"name": "one", "software": "slow", "group_by": ["raw_data_package"]}
    world.pipeline("tonight", [step], grouping="tonight")
    world.register(world.package("tonight", obs_unit="tonight"))
    mine = "SELECT r.id FROM run r JOIN pipeline p ON p.id = r.pipeline_id WHERE p.name = 'tonight'"
    wait_until(lambda: world.query(f"{mine} AND r.state <> 'PENDING'"), PATIENCE, what="new data has its slot")
    (seen,) = world.query(
        f"""
        SELECT extract(epoch FROM own.at - r.created_at)::float AS seconds, (SELECT count(*) FROM transition t
            WHERE t.trigger = 'build' AND t.at > r.created_at AND t.at < own.at) AS overtaken
        FROM run r JOIN transition own ON own.run_id = r.id AND own.trigger = 'build' WHERE r.id = ({mine})
        """
    )
    return {"seconds_to_a_slot": round(seen.seconds, 2), "runs_of_the_backlog_before_it": seen.overtaken}


def report(
    world: World,
    watch: Watch,
    runs: int,
    registered: float,
    decided: float | None,
    quiet: float | None,
    new: dict[str, Any],
) -> dict[str, Any]:
    settings = world.settings
    command = {k: n for k, n in watch.longest.items() if k != "events"}
    writers = len(watch.pids) + 1
    held = {
        "everything became a run": decided is not None,
        "the ledger has nothing left to tell": quiet is not None,
        "no run failed": watch.log[-1]["runs"]["failed"] == 0,
        "work went on": watch.log[-1]["runs"]["completed"] > WORKED_OFF,
        "no stream was longer than the mark and a batch of each writer": max(command.values(), default=0)
        <= settings.stream_high_water + writers * settings.batch_size,
        "new data had the first slot that was free": new["runs_of_the_backlog_before_it"] == 0,
        f"Valkey stayed below {VALKEY_MB:g} MB": watch.valkey_mb <= VALKEY_MB,
    }
    for name, rss in watch.rss.items():
        held[f"{name} took at most {FLAT_MB:g} MB more"] = rss["peak"] - rss["start"] <= FLAT_MB
    return {
        "runs": runs,
        "seconds": {"registered": registered, "all_runs_exist": decided, "ledger_quiet": quiet},
        "longest_streams": watch.longest,
        "valkey_peak_mb": round(watch.valkey_mb, 1),
        "rss_mb": watch.rss,
        "last": watch.log[-1],
        "new_data": new,
        "held": held,
        "samples": watch.log,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--report", type=Path, help="everything that was sampled, as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wfm-bench-") as directory:
        found = measure(Path(directory), args.runs)
    if args.report:
        args.report.write_text(json.dumps(found, indent=2))
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=2))
    sys.exit(0 if all(found["held"].values()) else 1)


if __name__ == "__main__":
    main()
