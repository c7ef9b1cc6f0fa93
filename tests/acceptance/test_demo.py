"""The demonstration as a new user runs it: only the command line and the files on disk are looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.demo_direct import direct
from tests.harness import wait_until
from wfm.demo import data
from wfm.embedded import Daemon, Embedded
from wfm.model import Role

REPOSITORY = Path(__file__).parents[2]


class Home:
    """A fresh folder in which somebody types commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / ".wfm"
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(("WFM_", "CCAT_"))}
        cache = REPOSITORY / ".cache"
        cache.mkdir(exist_ok=True)
        (folder / ".cache").symlink_to(cache)

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "wfm", *words]

    def wfm(self, *words: str) -> str:
        done = subprocess.run(
            self.argv(*words), cwd=self.folder, env=self.environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.wfm(*words, "--json"))

    def daemons(self) -> list[Daemon]:
        names = [p.stem for p in (self.home / "run").glob("*.pid")]
        return [Daemon(self.home, name) for name in names]

    def roles(self) -> dict[str, int]:
        found = {d.name: d.pid() for d in self.daemons() if d.name.startswith(tuple(str(r) for r in Role))}
        return {name: pid for name, pid in found.items() if pid}


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path)
    yield home
    pids = [pid for d in home.daemons() if (pid := d.pid())]
    subprocess.run(home.argv("down"), cwd=home.folder, env=home.environ, capture_output=True, check=False)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20, "no process is left")


def check_outcome(home: Home, pipeline: str, scans: list[Path]) -> None:
    """What the demonstration promises, whatever happened on the way."""
    home.wfm("up")
    runs = home.json("runs", "list", "--pipeline", pipeline, "--limit", "1000")
    counts = {
        s: sum(r["step"] == s and r["state"] == "COMPLETED" for r in runs) for s in ("calibrate", "linefit", "map")
    }
    assert counts == {"calibrate": 13, "linefit": 13, "map": 2}
    assert {r["state"] for r in runs} <= {"COMPLETED", "CANCELLED"}, runs
    assert [line["state"] for line in home.json("why", pipeline)] == ["covered"] * 27
    home.wfm("events", "verify")

    maps = sorted((r for r in runs if r["step"] == "map" and r["state"] == "COMPLETED"), key=lambda r: int(r["id"]))
    assert [r["superseded"] for r in maps] == [True, False]
    lineage = home.wfm("lineage", str(maps[-1]["id"]))
    assert all(f"package {scan.stem}" in lineage for scan in scans)

    detail = home.json("runs", "show", str(maps[-1]["id"]))
    directory = Path(detail["job"]["directory"])
    products = {p["type"]: directory / p["path"] for p in detail["products"]}
    assert products["PLOT"].read_bytes().startswith(b"\x89PNG")
    statistics = json.loads(products["STATISTICS"].read_text())
    compare(statistics, direct(scans))


def compare(made: Any, computed: Any, path: str = "") -> None:
    """Every number of the direct computation stands in the statistics."""
    if isinstance(computed, dict):
        for key, value in computed.items():
            assert key in made, f"{path}/{key}"
            compare(made[key], value, f"{path}/{key}")
    elif isinstance(computed, list):
        assert len(made) == len(computed), path
        for i, (m, c) in enumerate(zip(made, computed, strict=True)):
            compare(m, c, f"{path}/{i}")
    elif isinstance(computed, float):
        assert made == pytest.approx(computed, rel=1e-3, abs=1e-6), path
    else:
        assert made == computed, path


def test_the_demonstration_on_simulated_data_from_an_empty_folder(home):
    out = home.wfm("demo", "--simulated")
    assert "completed runs: calibrate 13, linefit 13, map 2" in out
    assert "3 new runs" in out
    assert not home.roles(), "what the demonstration started it stopped"
    scans = sorted((home.home / "demo" / "iris-simulated" / "archive").glob("*.fits"))
    check_outcome(home, "iris-simulated", scans)


def test_the_demonstration_on_real_data_while_everything_is_killed(home):
    """Roles killed one by one and all together, Redis emptied, Postgres killed: the same products."""
    scans = data.fetch(REPOSITORY / ".cache", print)
    # Started by hand first, so that the demonstration finds it running and leaves it alone.
    home.wfm("up")
    demo = subprocess.Popen(
        home.argv("demo"),
        cwd=home.folder,
        env=home.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:

        def completed() -> int:
            done = subprocess.run(
                home.argv("runs", "list", "--limit", "1000", "--json"),
                cwd=home.folder,
                env=home.environ,
                capture_output=True,
                text=True,
                check=False,
            )
            return sum(r["state"] == "COMPLETED" for r in json.loads(done.stdout)) if done.returncode == 0 else -1

        def kill(names: list[str]) -> None:
            roles = home.roles()
            for name in names:
                os.kill(roles[name], signal.SIGKILL)
            home.wfm("up")
            assert set(home.roles()) == set(roles)

        wait_until(lambda: completed() >= 1, 120, "the first run")
        for name in sorted(home.roles()):
            kill([name])
        servers = Embedded(home.home)
        with redis.Redis.from_url(servers.redis_url) as client:
            client.flushall()
        kill(sorted(home.roles()))
        os.kill(servers.status()["postgres"].pid or 0, signal.SIGKILL)
        home.wfm("up")
        with redis.Redis.from_url(servers.redis_url) as client:
            client.flushall()
        out, _ = demo.communicate(timeout=240)
        assert demo.returncode == 0, out
    finally:
        demo.kill()
        demo.wait()
    check_outcome(home, "iris", scans)
