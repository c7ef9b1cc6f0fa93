"""A disk that is full while inputs are staged, while a job writes, and while results are collected."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.faults.network import HASTE, ONE
from tests.harness import wait_until
from wfm import staging
from wfm.model import RunState

SIZE = 4_000_000


@pytest.fixture
def disk(world, tmp_path):
    """A file system of its own, of 4 MB, for the attempt directories."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "pipelines"
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "wfm-test", place]
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode:
        if os.environ.get("CI"):
            pytest.fail(f"CI runs as root and must be able to mount: {made.stderr}")
        pytest.skip(f"no file system can be mounted here: {made.stderr}")
    world.environ |= HASTE
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


statvfs = os.statvfs  # one test deceives wfm about it


def free(disk):
    at = statvfs(disk)
    return at.f_bavail * at.f_frsize


def fill(disk, leave=0):
    """Take all space but so many bytes."""
    with open(disk / "ballast", "ab", buffering=0) as ballast:
        ballast.write(b"\0" * max(0, free(disk) - leave))
    assert free(disk) <= leave + 4096


def big(world, name):
    return world.package(name, name * 500_000)


@pytest.mark.parametrize("known", [True, False], ids=["foreseen", "met while writing"])
def test_staging_is_held_while_the_disk_is_full_and_goes_on_when_it_is_not(world, disk, monkeypatch, known):
    monkeypatch.setattr(staging, "DISK_RETRY_SECONDS", 0.3)
    if not known:  # as if somebody else took the space after the look
        before = statvfs(disk)
        monkeypatch.setattr(os, "statvfs", lambda _: before)
    world.pipeline("p", ONE)
    fill(disk, leave=100_000)
    with world.roles():
        world.register(big(world, "a"), big(world, "b"))
        held = wait_until(lambda: [r for r in world.runs() if r.waiting_for.startswith("held: disk:")])
        assert held[0].state == RunState.STAGING_DATA
        assert free(disk) >= 50_000, "who is held gives back what it took"
        assert not world.executions()
        (disk / "ballast").unlink()
        wait_until(lambda: world.all_covered(2), what="all covered")
        report = world.check()
    assert report.jobs == 2
    assert [r.attempt for r in world.runs()] == [1, 1]


WRITER = """
import json, os, sys
sys.path.insert(0, {repository!r})
exec(open({program!r}).read())  # the result is complete, and written down
if not os.path.exists({again!r}):
    open({again!r}, "w").close()
    with open(os.path.join(os.environ["WORKFLOW_ATTEMPT_DIRECTORY"], "workspace", "junk"), "ab", buffering=0) as f:
        try:
            while f.write(b"x" * 4096):
                pass
        except OSError:
            pass
"""


def test_a_job_whose_exit_record_finds_no_space_is_repeated_when_there_is_some(world, disk, tmp_path, monkeypatch):
    """Nothing of an attempt without a record is registered; the next one is held until the disk has space."""
    monkeypatch.setattr(staging, "DISK_RETRY_SECONDS", 0.3)
    program = tmp_path / "writer.py"
    program.write_text(WRITER.format(repository="", program=str(world.program), again=str(tmp_path / "full")))
    world.apply(
        f"""
        kind: software
        name: writer
        versions:
          - version: 1.0.0
            command: [python, {program}]
        """
    )
    world.pipeline("p", [{**ONE[0], "software": "writer", "max_retries": 1}])
    with world.roles():
        world.register(big(world, "a"))
        held = wait_until(lambda: [r for r in world.runs() if r.waiting_for.startswith("held: disk:")])
        assert held[0].attempt == 2
        assert held[0].failure == "vanished"
        assert not world.query("SELECT 1 FROM data_product")
        for junk in disk.rglob("junk"):
            junk.unlink()
        wait_until(lambda: world.all_covered(1), what="covered")
        world.check()
    assert {p.attempt for p in world.query("SELECT attempt FROM data_product")} == {2}


def test_collecting_needs_no_space(world, disk):
    """The disk is full from the end of the job on: hashing and registering go on all the same."""
    world.config("c", seconds=0.5)
    world.pipeline("p", [{**ONE[0], "config": "c"}])
    with world.roles():
        world.register(big(world, "a"))
        wait_until(world.executions)
        fill(disk, leave=600_000)  # enough for the result and the record of the job
        wait_until(lambda: list(disk.rglob("exit.json")), what="the job is over")
        fill(disk)
        wait_until(lambda: world.all_covered(1), what="covered")
        world.check()
