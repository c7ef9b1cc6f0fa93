"""The gap engine, measured at rising sizes: raw packages of which each is covered, in three steps.

The steps are one run per scan (a package each), one per source and line, one over everything. What is there before is
written by set-based SQL, with the digests that the engine itself would give, so that everything is covered. Measured
in a process of its own, without streams:

* one arriving package to the commit of its run, many times;
* a full reconciliation that finds nothing, and one that finds packages of which no message told;
* `wfm why` of one unit of each step, of a package, and the counts of the pipeline;
* a flood of packages registered at once to the commit of their runs;
* the memory of the process that plays the trigger-manager.

    python benchmarks/gaps.py [10000 100000 1000000] [--report FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.harness import World
from wfm import catalogue, gaps, grouping, migrations, views
from wfm.catalogue import ExecutedObsUnitIn, FileIn, PackageIn
from wfm.config import load
from wfm.decide import DIGEST_MODULUS, item_hash, set_digest, wanted_digest
from wfm.embedded import Embedded
from wfm.events import DataArrived
from wfm.gaps import facts
from wfm.roles import TriggerManager
from wfm.service import open_store
from wfm.store import Store, connect, result_hash

SCANS_PER_GROUP = 1000
ARRIVALS = 300
FLOOD = 10_000
LOST = 100
"""Arrivals of which no message tells, before the second reconciliation."""

LIMITS = {
    "arrival_p99_ms": 50.0,
    "reconcile_s": 10.0,
    "flood_s": 5.0,
    "why_worst_ms": 50.0,
    "peak_mb": 200.0,
}


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- what is there before ---


def scan_name(n: int) -> str:
    return f"scan-{n:07}"


def group_names(size: int) -> list[str]:
    return [f"src{g:04}" for g in range(max(10, size // SCANS_PER_GROUP))]


def copied(store: Store, table: str, columns: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """COPY in pieces, so that what travels is never whole in memory."""
    with store.begin() as tx:
        raw: Any = tx.conn.connection.cursor()
        raw.execute("SET LOCAL session_replication_role = replica")
        piece = io.StringIO()
        for i, row in enumerate(rows, 1):
            piece.write("\t".join("\\N" if v is None else str(v) for v in row) + "\n")
            if i % 50_000 == 0:
                piece.seek(0)
                raw.copy_from(piece, table, columns=columns.split(", "))
                piece = io.StringIO()
        piece.seek(0)
        raw.copy_from(piece, table, columns=columns.split(", "))


def fill(world: World, size: int) -> None:
    """`size` packages, their units, and a COMPLETED run for each (step, unit)."""
    world.pipeline(
        "nightly",
        [
            {"name": "scan", "group_by": ["executed_obs_unit"]},
            {"name": "map", "group_by": ["line", "source"], "depends_on": ["scan"]},
            {"name": "all", "group_by": [], "depends_on": ["map"]},
        ],
    )
    world.register(package(size + FLOOD + ARRIVALS + LOST, "first"))  # instrument and module
    store = world.store
    with store.begin() as tx:
        for table in ("event", "physical_copy", "raw_data_file", "raw_data_package", "executed_obs_unit", "obs_unit"):
            tx.run(f"DELETE FROM {table}")
        steps = {
            r.name: r
            for r in tx.all(
                "SELECT s.*, (SELECT id FROM software_version v WHERE v.software_id = s.software_id) AS version_id"
                " FROM reduction_step s"
            )
        }
        (pipeline,) = {s.pipeline_id for s in steps.values()}
    groups = group_names(size)
    members: dict[str, int] = dict.fromkeys(groups, 0)
    counts: dict[str, int] = dict.fromkeys(groups, 0)
    results: dict[str, int] = dict.fromkeys(groups, 0)

    def scans() -> Iterator[tuple[Any, ...]]:
        for n in range(size):
            name, group = scan_name(n), groups[n % len(groups)]
            key = grouping.unit_key({"executed_obs_unit": name})
            item = item_hash("package", name)
            wanted = wanted_digest(item, 1, {}, "copy", "1.0.0", "")
            result = result_hash("scan", key, wanted)
            members[group] = (members[group] + item) % DIGEST_MODULUS
            results[group] = (results[group] + result) % DIGEST_MODULUS
            counts[group] += 1
            values = json.dumps({"executed_obs_unit": name})
            yield "scan", n + 1, group, key, values, item, 1, wanted, result

    def coarse() -> Iterator[tuple[Any, ...]]:
        done = {}
        for i, group in enumerate(groups):
            values = {"line": "co", "source": group}
            key = grouping.unit_key(values)
            wanted = wanted_digest(members[group], counts[group], {"scan": results[group]}, "copy", "1.0.0", "")
            done[group] = result_hash("map", key, wanted)
            row = ("map", size + 1 + i, group, key, json.dumps(values))
            yield *row, members[group], counts[group], wanted, done[group]
        everything = set_digest(members.values())
        wanted = wanted_digest(everything, size, {"map": set_digest(done.values())}, "copy", "1.0.0", "")
        row = ("all", size + len(groups) + 1, "", "all", "{}")
        yield *row, everything, size, wanted, result_hash("all", "all", wanted)

    with store.begin() as tx:
        tx.run(
            "CREATE TABLE filled (step text, n bigint, grp text, key text, vals jsonb, item numeric, members bigint,"
            " wanted text, result numeric)"
        )
    columns = "step, n, grp, key, vals, item, members, wanted, result"
    copied(store, "filled", columns, scans())
    copied(store, "filled", columns, coarse())
    statements = {
        "the catalogue": """
            INSERT INTO source (name) SELECT DISTINCT grp FROM filled WHERE step = 'map' ON CONFLICT DO NOTHING;
            INSERT INTO obs_unit (name, source_id, line) SELECT name, id, 'co' FROM source WHERE name LIKE 'src%';
            INSERT INTO executed_obs_unit (id, name, obs_unit_id) OVERRIDING SYSTEM VALUE
                SELECT f.n, f.vals ->> 'executed_obs_unit', o.id FROM filled f JOIN obs_unit o ON o.name = f.grp
                WHERE f.step = 'scan' ORDER BY f.n;
            INSERT INTO raw_data_package (id, name, executed_obs_unit_id, instrument_module_id, size, item)
                OVERRIDING SYSTEM VALUE
                SELECT f.n, f.vals ->> 'executed_obs_unit', f.n, (SELECT id FROM instrument_module), 10, f.item
                FROM filled f WHERE f.step = 'scan' ORDER BY f.n;
            INSERT INTO physical_copy (location_id, package_id, path)
                SELECT (SELECT id FROM data_location WHERE name = 'archive'), id, name FROM raw_data_package
        """,
        "units": f"""
            INSERT INTO unit (id, pipeline_id, dims, key, "values", generation, digest, members)
                OVERRIDING SYSTEM VALUE
                SELECT f.n, {pipeline}, s.dims, f.key, f.vals, 1, f.item, f.members
                FROM filled f JOIN reduction_step s ON s.name = f.step ORDER BY f.n;
            INSERT INTO unit_member (unit_id, package_id, added, item)
                SELECT f.n, f.n, 1, f.item FROM filled f WHERE f.step = 'scan'
                UNION ALL SELECT m.n, f.n, 1, f.item FROM filled f JOIN filled m ON m.step = 'map' AND m.grp = f.grp
                WHERE f.step = 'scan'
                UNION ALL SELECT (SELECT n FROM filled WHERE step = 'all'), f.n, 1, f.item
                FROM filled f WHERE f.step = 'scan';
            INSERT INTO unit_edge (upper_id, lower_id)
                SELECT m.n, f.n FROM filled f JOIN filled m ON m.step = 'map' AND m.grp = f.grp WHERE f.step = 'scan'
                UNION ALL SELECT (SELECT n FROM filled WHERE step = 'all'), n FROM filled WHERE step = 'map'
        """,
        "runs": f"""
            INSERT INTO run (id, location_id, pipeline_id, pipeline_name, step_id, step_name, unit_id, generation,
                wanted, result, software_version_id, cpu, memory_gb, state, chart_version, finished_at, job, backend,
                handle)
                OVERRIDING SYSTEM VALUE
                SELECT f.n, 1, {pipeline}, 'maps', s.id, s.name, f.n, 1, f.wanted, f.result,
                {next(iter(steps.values())).version_id}, 1, 1, 'COMPLETED', 1, now(), '{{}}', 'local', 'x'
                FROM filled f JOIN reduction_step s ON s.name = f.step ORDER BY f.n;
            INSERT INTO coverage (step_id, unit_id, state, why, reason, wanted, run_id, result)
                SELECT s.id, f.n, 'covered', 'covered', 'run ' || f.n, f.wanted, f.n, f.result
                FROM filled f JOIN reduction_step s ON s.name = f.step ORDER BY f.n
        """,
        "what decisions rest on": f"""
            UPDATE coverage o SET basis = z.basis, gates = z.gates FROM (
                SELECT c.step_id, c.unit_id, {facts.FINGERPRINTS}
                FROM coverage c JOIN reduction_step s ON s.id = c.step_id
                JOIN ({facts.RULES}) rules ON rules.step_id = s.id
                JOIN unit u ON u.id = c.unit_id LEFT JOIN backfill b ON b.id = c.backfill_id
                CROSS JOIN (SELECT CAST(NULL AS text) AS digests) rv
                CROSS JOIN (SELECT CAST(NULL AS text) AS rows) qu LEFT JOIN LATERAL ({facts.UPSTREAM}) up ON true) z
            WHERE (o.step_id, o.unit_id) = (z.step_id, z.unit_id)
        """,
        "sequences": "; ".join(
            f"SELECT setval(pg_get_serial_sequence('{t}', 'id'), (SELECT max(id) FROM {t}))"
            for t in ("executed_obs_unit", "raw_data_package", "unit", "run")
        ),
    }
    for what, sql in statements.items():
        say(f"  {what}")
        with store.begin() as tx:
            if what == "what decisions rest on":
                gaps.mend_tallies(tx, 1)  # as the triggers are off, there are none yet
            tx.run("SET LOCAL session_replication_role = replica")
            for statement in sql.split(";"):
                tx.run(statement, **({"limits": facts.limits(tx)} if ":limits" in statement else {}))
    with store.engine.connect() as conn:
        auto = conn.execution_options(isolation_level="AUTOCOMMIT")
        auto.exec_driver_sql("DROP TABLE filled")
        auto.exec_driver_sql("VACUUM ANALYZE")
        auto.exec_driver_sql("CHECKPOINT")


def package(n: int, group: str) -> PackageIn:
    name = scan_name(n)
    return PackageIn(
        name=name,
        executed_obs_unit=ExecutedObsUnitIn(name=name, obs_unit=group, source=group, line="co"),
        instrument="cam",
        module="mod1",
        metadata={},
        files=(FileIn(name="raw.txt", size=10, checksum="sha256:" + "0" * 64),),
        location="archive",
        path=name,
    )


# --- what is measured ---


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(postmaster: int) -> float:
    """What this process and all of Postgres have used so far: says more than the clock where others are at work."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(stat.parent.name) == postmaster:
            ticks += sum(map(int, fields[11:15]))  # with the children that have ended
        elif int(fields[1]) == postmaster:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def spread(seconds: Iterable[float]) -> dict[str, float]:
    found = sorted(s * 1000 for s in seconds)
    return {
        "median_ms": round(statistics.median(found), 1),
        "p99_ms": round(found[min(len(found) - 1, int(len(found) * 0.99))], 1),
        "worst_ms": round(found[-1], 1),
    }


def peak_mb() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)


def measure(size: int, environ: dict[str, str]) -> dict[str, Any]:
    """In the process that plays the trigger-manager."""
    settings = load(environ)
    store = open_store(settings)
    manager = TriggerManager(settings)
    groups = group_names(size)
    fresh = iter(range(size, size + ARRIVALS + LOST + FLOOD))
    found: dict[str, Any] = {"size": size}
    with store.begin() as tx:
        directory = tx.all("SHOW data_directory")[0][0]
    postmaster = int(Path(directory, "postmaster.pid").read_text().split()[0])

    def measured(name: str, work: Callable[[], Any], times: int = 1) -> None:
        """Seconds by the clock; notes them and the CPU seconds."""
        before = cpu_seconds(postmaster)
        seconds = [timed(work) for _ in range(times)]
        found[f"{name}_s"] = round(min(seconds), 2)
        found[f"{name}_cpu_s"] = round((cpu_seconds(postmaster) - before) / times, 2)

    def register(count: int) -> list[PackageIn]:
        packages = [package(n, groups[n * 7919 % len(groups)]) for _, n in zip(range(count), fresh, strict=False)]
        with store.begin() as tx:
            catalogue.register(tx.conn, packages, location_ids=[1], actor="benchmark")
        return packages

    def arrive(name: str) -> None:
        store.retrying(lambda tx: manager.handle(tx, [DataArrived(raw_data_package=name)]))

    def forget() -> None:
        with store.begin() as tx:
            tx.run("UPDATE event SET done_at = now() WHERE done_at IS NULL")

    def runs() -> int:
        with store.begin() as tx:
            return int(tx.all("SELECT count(*) AS n FROM run WHERE state <> 'COMPLETED'")[0].n)

    def reconcile() -> None:
        manager._started = False
        store.retrying(manager.reconcile_when_due)

    say("  reconcile: nothing to find")
    measured("reconcile", reconcile, 3)
    assert runs() == 0, "not everything was covered"

    say("  arrivals")
    seconds, cpu = [], 0.0
    for _ in range(ARRIVALS):
        before = runs()
        (p,) = register(1)
        used = cpu_seconds(postmaster)
        seconds.append(timed(partial(arrive, p.name)))
        cpu += cpu_seconds(postmaster) - used
        assert runs() == before + 1
    found["arrival"] = spread(seconds)
    found["arrival_cpu_ms"] = round(cpu / ARRIVALS * 1000, 1)

    say("  reconcile: lost arrivals")
    before = runs()
    register(LOST)
    forget()
    measured("reconcile_lost", reconcile)
    assert runs() == before + LOST

    say("  why")
    with store.engine.connect() as conn:
        asked: dict[str, Callable[[int], Any]] = {
            "why_scan": lambda i: views.why(
                conn,
                pipeline="nightly",
                step="scan",
                unit=grouping.unit_key({"executed_obs_unit": scan_name(i * 7919 % size)}),
                location_id=1,
            ),
            "why_map": lambda i: views.why(
                conn,
                pipeline="nightly",
                step="map",
                unit=grouping.unit_key({"line": "co", "source": groups[i % len(groups)]}),
                location_id=1,
            ),
            "why_all": lambda i: views.why(conn, pipeline="nightly", step="all", unit="all", location_id=1),
            "why_package": lambda i: views.why_package(conn, scan_name(i * 7919 % size), location_id=1),
            "why_arrived": lambda i: views.why_package(conn, scan_name(size + i), location_id=1),
            "why_pipeline": lambda i: views.why(conn, pipeline="nightly", location_id=1, limit=20),
            "counts": lambda i: views.coverage_summary(conn, 1, "nightly"),
        }
        for name, ask in asked.items():
            ask(0)
            found[name] = spread(timed(partial(ask, i)) for i in range(30))
    found["why_worst_ms"] = max(found[name]["p99_ms"] for name in asked)

    say("  flood")
    before = runs()
    register(FLOOD)
    measured("flood", lambda: store.retrying(lambda tx: manager.handle(tx, [])))
    assert runs() == before + FLOOD
    found["arrival_p99_ms"] = found["arrival"]["p99_ms"]
    found["peak_mb"] = peak_mb()
    store.close()
    return found


def one_size(size: int) -> dict[str, Any]:
    say(f"{size:,} packages: filling")
    with tempfile.TemporaryDirectory(prefix="wfm-bench-") as directory:
        servers = Embedded(Path(directory) / "servers")
        servers.start()
        world = None
        try:
            engine = connect(servers.database_url, "wfm")
            migrations.upgrade(engine, "wfm")
            engine.dispose()
            world = World(Path(directory), servers.database_url, servers.redis_url)
            filled = timed(lambda: fill(world, size))
            say(f"  filled in {filled:.0f} s; measuring")
            child = subprocess.run(
                [sys.executable, __file__, str(size), "--measure"],
                input=json.dumps(world.environ),
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            return dict(json.loads(child.stdout))
        finally:
            if world is not None:
                world.close()
            servers.stop()


def table(found: list[dict[str, Any]]) -> str:
    lines = {
        "one arrival, median (ms)": lambda f: f["arrival"]["median_ms"],
        "one arrival, p99 (ms)": lambda f: f["arrival_p99_ms"],
        "its CPU, mean (ms)": lambda f: f["arrival_cpu_ms"],
        "reconciliation, nothing to find (s)": lambda f: f["reconcile_s"],
        "its CPU (s)": lambda f: f["reconcile_cpu_s"],
        f"reconciliation, {LOST} lost arrivals (s)": lambda f: f["reconcile_lost_s"],
        f"{FLOOD:,} packages at once (s)": lambda f: f["flood_s"],
        "their CPU (s)": lambda f: f["flood_cpu_s"],
        "why: a scan, p99 (ms)": lambda f: f["why_scan"]["p99_ms"],
        "why: a source, p99 (ms)": lambda f: f["why_map"]["p99_ms"],
        "why: all, p99 (ms)": lambda f: f["why_all"]["p99_ms"],
        "why: a package, p99 (ms)": lambda f: max(f["why_package"]["p99_ms"], f["why_arrived"]["p99_ms"]),
        "why: the pipeline, p99 (ms)": lambda f: f["why_pipeline"]["p99_ms"],
        "counts of the pipeline, p99 (ms)": lambda f: f["counts"]["p99_ms"],
        "memory at the peak (MB)": lambda f: f["peak_mb"],
    }
    head = "| packages | " + " | ".join(f"{f['size']:,}" for f in found) + " |"
    rule = "|---" * (len(found) + 1) + "|"
    return "\n".join(
        [head, rule, *(f"| {n} | " + " | ".join(f"{v(f):g}" for f in found) + " |" for n, v in lines.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--report", type=Path, help="all figures, as JSON")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.sizes[0], json.load(sys.stdin))))
        return
    found = [one_size(size) for size in args.sizes]
    over = [f"{f['size']:,}: {k} = {f[k]:g} > {most:g}" for f in found for k, most in LIMITS.items() if f[k] > most]
    if args.report:
        args.report.write_text(json.dumps({"sizes": found, "limits": LIMITS, "over": over}, indent=2))
    print(table(found))
    for line in over:
        print(f"over the limit: {line}")
    sys.exit(1 if over else 0)


if __name__ == "__main__":
    main()
