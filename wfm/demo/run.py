"""`wfm demo`: the main job, step by step, with the commands that anybody would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wfm import catalogue, views
from wfm.config import Settings, load
from wfm.demo import data
from wfm.embedded import Embedded
from wfm.errors import UnavailableError, WfmError
from wfm.service import open_store
from wfm.store import Store, is_connection_error

STEPS = ("calibrate", "linefit", "map")
MOST_SECONDS = 1800.0
QUIET_SECONDS = 60.0


@dataclass
class Demo:
    """One demonstration: its names, its folder below WFM_HOME, and where it prints."""

    settings: Settings
    pipeline: str
    folder: Path
    console: Console

    # --- saying and doing ---

    def say(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]", highlight=False)

    def command(self, *words: str, show: bool = True) -> str:
        """Run `wfm` with these words as a user would, and show both the command and what it prints."""
        if show:
            self.console.print(f"$ wfm {shlex.join(words)}", style="cyan", highlight=False, markup=False)
        environment = {**os.environ, "WFM_HOME": str(self.settings.home), "COLUMNS": str(self.console.width)}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "wfm", *words], stdout=subprocess.PIPE, text=True, check=False, env=environment
        )
        if show:
            self.console.print(done.stdout.rstrip(), highlight=False, markup=False, soft_wrap=True)
        if done.returncode:
            raise WfmError(f"`wfm {shlex.join(words)}` ended with code {done.returncode}")
        return done.stdout

    # --- waiting ---

    def wait(self, store: Store, scans: int) -> None:
        """Wait until every unit of the three steps is covered, with a bar; servers may come and go meanwhile."""
        units = 2 * scans + 1
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            job = bar.add_task("units covered", total=units)
            last, since, began = -1, time.monotonic(), time.monotonic()
            while True:
                lines = self._patiently(
                    lambda: _read(
                        store, lambda c: views.coverage_summary(c, self.settings.processing_location_id, self.pipeline)
                    )
                )
                covered = sum(line.states["covered"] for line in lines)
                bar.update(job, completed=covered)
                if covered == units and all(line.complete for line in lines):
                    return
                if blocked := sum(line.states["blocked"] for line in lines):
                    raise WfmError(f"{blocked} units are blocked; `wfm why {self.pipeline}` says why")
                now = time.monotonic()
                if covered != last:
                    last, since = covered, now
                elif now - since > QUIET_SECONDS:
                    bar.console.print(
                        "nothing has moved for a minute; `wfm status` shows what does not run", style="yellow"
                    )
                    since = now
                if now - began > MOST_SECONDS:
                    raise UnavailableError(f"not done after {MOST_SECONDS:g} s; `wfm status` and `wfm why` say why")
                time.sleep(0.2)

    def _patiently(self, read: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + MOST_SECONDS
        while True:
            try:
                return read()
            except Exception as e:
                if not is_connection_error(e) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _tell(self, text: str) -> None:
        self.console.print(text, markup=False)

    # --- the parts ---

    def scans(self, simulated: bool) -> list[Path]:
        """The 13 raw files, in an archive folder of the demonstration's own."""
        if simulated:
            originals = data.simulate(self.folder / "simulated")
        else:
            originals = data.fetch(self.settings.home.parent / ".cache", self._tell)
        archive = self.folder / "archive"
        archive.mkdir(parents=True, exist_ok=True)
        scans = []
        for original in originals:
            scan = archive / original.name
            if not scan.exists() or scan.stat().st_size != original.stat().st_size:
                shutil.copyfile(original, scan)
            scans.append(scan)
        return scans

    def definitions(self, simulated: bool) -> Path:
        """The pipeline file that ships with wfm, beside a location for the archive; simulated data stay apart."""
        documents = list(yaml.safe_load_all(files("wfm.demo").joinpath("pipeline.yaml").read_text(encoding="utf-8")))
        for document in documents:
            if document["kind"] == "grouping":
                origin = {
                    "table": "raw_data_package",
                    "column": "metadata",
                    "json_path": "origin",
                    "value": "simulated",
                }
                document["rules"].append({**origin, "operator": "eq" if simulated else "neq"})
                document["name"] = f"{self.pipeline}-rasters"
            if document["kind"] == "pipeline":
                document |= {"name": self.pipeline, "grouping": f"{self.pipeline}-rasters"}
        archive = {"kind": "location", "name": f"{self.pipeline}-archive", "site": "local", "type": "long_term_archive"}
        path = self.folder / "pipeline.yaml"
        path.write_text(
            yaml.safe_dump_all([{**archive, "root": str(self.folder / "archive")}, *documents], sort_keys=False)
        )
        return path

    def packages(self, scans: Sequence[Path], name: str) -> Path:
        """A file of raw data packages, one for each scan."""
        documents = []
        for scan, file in zip(scans, catalogue.scan_files(scans), strict=True):
            about = data.describe(scan)
            documents.append(
                {
                    "kind": "raw_data_package",
                    "name": scan.stem,
                    "instrument": "IRIS",
                    "module": about["instrument_module"],
                    "executed_obs_unit": {
                        "name": f"{'sim-' if about['origin'] == 'simulated' else ''}scan-{about['raster_index']:02d}",
                        "obs_unit": f"OBSID {about['obsid']}",
                        "source": "AR 12017",
                        "program": "flare watch",
                        "started_at": about["start_time"],
                        "ended_at": about["end_time"],
                    },
                    "metadata": about,
                    "files": [{"name": file.name, "size": file.size, "checksum": file.checksum}],
                    "location": f"{self.pipeline}-archive",
                    "path": str(self.folder / "archive"),
                }
            )
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
        return path

    def runs(self) -> list[dict[str, Any]]:
        """All runs of the pipeline."""
        listed: list[dict[str, Any]] = json.loads(
            self.command("runs", "list", "--pipeline", self.pipeline, "--limit", "1000", "--json", show=False)
        )
        return listed


def _read(store: Store, look: Callable[[Any], Any]) -> Any:
    with store.begin() as tx:
        return look(tx.conn)


def main(*, simulated: bool = False) -> None:
    """Run the demonstration. What it started it stops again; what it made stays.

    Raises:
        WfmError: a command failed, or a unit cannot be covered.
    """
    settings = load()
    pipeline = "iris-simulated" if simulated else "iris"
    demo = Demo(settings, pipeline, settings.home / "demo" / pipeline, Console(highlight=False))
    demo.console.print(settings.which_home, markup=False, soft_wrap=True)
    demo.folder.mkdir(parents=True, exist_ok=True)
    was_up = settings.embedded and Embedded(settings.home).status()["postgres"].running
    kind = "simulated scans" if simulated else "13 raster scans of NASA's IRIS spectrograph (2014-03-29, real data)"
    demo.say(f"Raw data: {kind}")
    scans = demo.scans(simulated)
    try:
        _run(demo, scans, simulated)
    finally:
        if not was_up:
            demo.say("The demonstration stops what it started; everything it made stays")
            demo.command("down")
    demo.console.print(
        f"\nLook around:  wfm up;  wfm why {pipeline};  wfm runs list;  wfm runs show ID;  wfm events list;  wfm down"
    )


def _run(demo: Demo, scans: Sequence[Path], simulated: bool) -> None:
    demo.say("Start Postgres, Valkey and the four roles")
    demo.command("up")
    settings = demo.settings
    if settings.embedded:
        servers = Embedded(settings.home)
        settings = settings.with_servers(servers.database_url, servers.redis_url)
    store = open_store(settings)
    try:
        demo.say("Say what to process, and how")
        demo.command("apply", "-f", str(demo.definitions(simulated)))

        demo.say("12 scans arrive, registered in one transaction")
        before = {r["id"] for r in demo.runs()}
        demo.command("data", "add", "-f", str(demo.packages(scans[:12], "first")))
        again = bool(before)
        demo.wait(store, 13 if again else 12)
        first = demo.runs()
        _count(demo, first)

        demo.say("The 13th scan arrives late" + (" (it has already, in an earlier demonstration)" if again else ""))
        demo.command("data", "add", "-f", str(demo.packages(scans[12:], "late")))
        demo.wait(store, 13)
        runs = demo.runs()
        new = [r for r in runs if r["id"] not in {f["id"] for f in first}]
        for r in sorted(new, key=lambda r: int(r["id"])):
            demo.console.print(f"  run {r['id']:>3}  {r['step']:<10} {r['unit']:<24} {r['state']}", markup=False)
        superseded = [r["id"] for r in runs if r["step"] == "map" and r["superseded"]]
        demo.console.print(f"  {len(new)} new runs; superseded: run {', '.join(map(str, superseded))} (the old map)")
        _count(demo, runs)

        demo.say("What covers every unit, and what made the map")
        demo.command("status")
        newest = max(int(r["id"]) for r in runs if r["step"] == "map")
        demo.command("events", "verify")
        demo.command("lineage", str(newest))
        _show(demo, newest)
    finally:
        store.close()


def _count(demo: Demo, runs: Sequence[dict[str, Any]]) -> None:
    per_step = {s: sum(r["step"] == s and r["state"] == "COMPLETED" for r in runs) for s in STEPS}
    demo.console.print("  completed runs: " + ", ".join(f"{s} {n}" for s, n in per_step.items()))


def _show(demo: Demo, run_id: int) -> None:
    """The products of the newest map, its numbers, and where the pictures are."""
    detail = json.loads(demo.command("runs", "show", str(run_id), "--json", show=False))
    directory = Path(detail["job"]["directory"])
    demo.say("The products of the map")
    for p in sorted(detail["products"], key=lambda p: str(p["path"])):
        demo.console.print(
            f"  {p['type']:<11} {p['size']:>9,} B  {directory / p['path']}", markup=False, soft_wrap=True
        )
    pictures = [directory / p["path"] for p in detail["products"] if p["type"] == "PLOT"]
    demo.say("Pictures")
    for picture in pictures:
        demo.console.print(f"  {picture}", markup=False, soft_wrap=True)
