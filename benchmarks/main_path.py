"""The main path, measured: what an idle role costs, how long a hand-over takes, how many runs per second.

Four roles as four processes, Postgres and Valkey from the wheels, data on disk, the local backend, jobs that do nothing
but leave the one file they must. Figures depend on the machine; compare figures of one run.

    python benchmarks/main_path.py [--runs 1000] [--report FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.harness import World, wait_until
from wfm import migrations
from wfm.embedded import Embedded
from wfm.model import Role
from wfm.store import connect

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_mb(pid: int) -> float:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024 / 1e6


def fsyncs_per_second(directory: Path) -> float:
    """The floor under every commit: how often this disk can say that a write is durable."""
    fd = os.open(directory / "fsync", os.O_CREAT | os.O_WRONLY)
    began, n = time.monotonic(), 0
    while time.monotonic() - began < 1.0:
        os.pwrite(fd, b"x" * 8192, 0)
        os.fdatasync(fd)
        n += 1
    os.close(fd)
    return n / (time.monotonic() - began)


def handovers(world: World) -> dict[str, dict[str, float]]:
    """By event type, milliseconds from the start of the writer's transaction to that of the reader's."""
    rows = world.query(
        "SELECT type, extract(epoch FROM done_at - created_at)::float * 1000 AS ms FROM event WHERE recipient <> ''"
    )
    found: dict[str, list[float]] = {}
    for r in rows:
        found.setdefault(r.type, []).append(r.ms)
    return {
        kind: {"n": len(ms), "median_ms": round(statistics.median(ms), 2), "max_ms": round(max(ms), 2)}
        for kind, ms in sorted(found.items())
    }


def start(world: World, role: Role) -> subprocess.Popen[bytes]:
    """A role as users start it: nothing of the tests is in its way."""
    with open(world.directory / f"{role}.log", "ab") as log:
        command = [sys.executable, "-P", "-m", "wfm", role]
        return subprocess.Popen(command, env={**os.environ, **world.environ}, stdout=log, stderr=log)


def completed(world: World) -> int:
    return int(world.query("SELECT count(*) AS n FROM run WHERE state = 'COMPLETED'")[0].n)


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
        world.environ |= {"WFM_SWEEP_SECONDS": "1", "WFM_LOCAL_CPU": "0"}
        world.apply(
            """
            kind: software
            name: nothing
            versions:
              - version: 1.0.0
                command: [/bin/sh, -c, ': > "$WORKFLOW_OUTPUT_DIR/science/x"']
            """
        )
        step = {"name": "one", "software": "nothing", "group_by": ["raw_data_package"]}
        world.pipeline("bench", [{**step, "resources": {"cpu": 0.01, "memory_gb": 0.01}}])
        processes = {role: start(world, role) for role in Role}
        wait_until(
            lambda: len(world.query("SELECT 1 FROM task WHERE run_id IS NULL")) == 2, what="the roles are at work"
        )
        time.sleep(5.0)
        before = {r: cpu_seconds(p.pid) for r, p in processes.items()}
        time.sleep(10.0)
        idle = {
            str(r): {"cpu_percent": round((cpu_seconds(p.pid) - before[r]) * 10, 2), "rss_mb": round(rss_mb(p.pid), 1)}
            for r, p in processes.items()
        }
        for i in range(20):
            world.register(world.package(f"idle{i:03}"))
            wait_until(lambda i=i: world.states()["one", "COMPLETED"] == i + 1)
            time.sleep(0.1)
        quiet = handovers(world)

        packages = [world.package(f"p{i:05}") for i in range(runs)]
        began, cpu = time.monotonic(), {r: cpu_seconds(p.pid) for r, p in processes.items()}
        world.register(*packages)
        # Looked at seldom and cheaply: the observer shares the cores.
        while world.query("SELECT 1 FROM run WHERE state <> 'COMPLETED' LIMIT 1") or completed(world) < 20 + runs:
            time.sleep(0.25)
        seconds = time.monotonic() - began
        busy = {str(r): round(cpu_seconds(p.pid) - cpu[r], 2) for r, p in processes.items()}
        return {
            "cores": len(os.sched_getaffinity(0)),
            "floors": {"fdatasync_per_s": round(fsyncs_per_second(directory))},
            "idle": idle,
            "handover_idle": quiet,
            "runs": runs,
            "seconds": round(seconds, 2),
            "runs_per_s": round(runs / seconds, 1),
            "cpu_seconds": busy,
        }
    finally:
        for p in processes.values():
            p.terminate()
        for p in processes.values():
            p.wait(timeout=30)
        if world is not None:
            world.close()
        servers.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wfm-bench-") as directory:
        report = measure(Path(directory), args.runs)
    text = json.dumps(report, indent=2)
    print(text)
    if args.report:
        args.report.write_text(text)


if __name__ == "__main__":
    main()
