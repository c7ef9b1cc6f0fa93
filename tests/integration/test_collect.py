"""Collecting on real files: what counts, what is refused, and that inputs are what was staged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from wfm import jobs
from wfm.collect import METRICS_BYTES, Collected, Product, collect, verify_inputs
from wfm.errors import InputError, OutputError, UnavailableError
from wfm.jobs import InputFile, InputProduct, JobFacts, StagePlan
from wfm.model import ProductType, Resources
from wfm.staging import StagingPolicy, stage

RAW = b"raw data " * 200_000


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Attempt:
    """A staged attempt with one raw file and one upstream result, and what its job then writes."""

    def __init__(self, directory: Path, *, final: bool = True) -> None:
        self.final = final
        self.archive = directory / "archive"
        self.archive.mkdir()
        for name in ("raw.fits", "map.fits"):
            (self.archive / name).write_bytes(RAW)
        raw = InputFile("scan1", "raw.fits", len(RAW), sha256(RAW), (str(self.archive / "raw.fits"),))
        upstream = str(self.archive / "map.fits")
        product = InputProduct(7, "calibrate", "all", "INTERMEDIATE", "map.fits", upstream, len(RAW), sha256(RAW))
        facts = JobFacts(
            location_id=1,
            run_id=42,
            attempt=1,
            pipeline="maps",
            made_as="reduce",
            step="reduce",
            final=final,
            unit_key="all",
            unit_values={},
            software="reducer",
            version="1.0.0",
            command=("reduce",),
            environment={},
            resources=Resources(),
            config_parameters={},
            base_directory=str(directory / "base"),
            python=sys.executable,
        )
        self.plan = StagePlan(jobs.build_spec(facts), facts, (raw,), (product,))
        self.directory = Path(self.plan.spec.directory)
        self.raw = self.directory / "input/scan1/raw.fits"
        self.upstream = self.directory / "workspace/calibrate/all/map.fits"

    def stage(self) -> None:
        stage(self.plan, StagingPolicy("auto", 0))

    def write(self, path: str, data: bytes = b"data") -> Path:
        found = self.directory / path
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_bytes(data)
        return found

    def collect(self, **more: Any) -> Collected:
        return collect(str(self.directory), step="reduce", final=self.final, **more)

    def refusal(self) -> str:
        with pytest.raises(OutputError) as error:
            self.collect()
        return str(error.value)


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    attempt = Attempt(tmp_path)
    attempt.stage()
    return attempt


@pytest.fixture
def intermediate(tmp_path: Path) -> Attempt:
    attempt = Attempt(tmp_path, final=False)
    attempt.stage()
    return attempt


# --- what counts ---


def test_the_place_decides_the_type(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits", b"map")
    attempt.write("output/science/deep/er/map.fits", b"deep")
    attempt.write("output/qa/noise.json", b'{"rms": 0.5}')
    attempt.write("output/plots/map.png", b"plot")
    attempt.write("output/statistics/table.csv", b"1,2")
    attempt.write("output/logs/reduce.log", b"told")
    attempt.write("logs/job.log", b"said")
    attempt.write("workspace/reduce/scratch", b"not a result")
    found = attempt.collect()
    assert found.warnings == ()
    assert found.products == tuple(
        Product(type_, path, len(data), sha256(data), metrics)
        for path, type_, data, metrics in (
            ("logs/job.log", ProductType.LOG, b"said", {}),
            ("output/logs/reduce.log", ProductType.LOG, b"told", {}),
            ("output/plots/map.png", ProductType.PLOT, b"plot", {}),
            ("output/qa/noise.json", ProductType.QA_METRIC, b'{"rms": 0.5}', {"rms": 0.5}),
            ("output/science/deep/er/map.fits", ProductType.SCIENCE, b"deep", {}),
            ("output/science/map.fits", ProductType.SCIENCE, b"map", {}),
            ("output/statistics/table.csv", ProductType.STATISTICS, b"1,2", {}),
        )
    )


def test_an_intermediate_step_leaves_its_results_in_its_workspace(intermediate: Attempt) -> None:
    intermediate.write("workspace/reduce/map.fits", b"map")
    intermediate.write("workspace/reduce/any/where/qa.json", b'{"rms": 1}')
    intermediate.write("logs/job.log", b"said")
    intermediate.write("output/science/map.fits", b"not looked at")
    assert [(p.type, p.path, p.metrics) for p in intermediate.collect().products] == [
        (ProductType.LOG, "logs/job.log", {}),
        (ProductType.INTERMEDIATE, "workspace/reduce/any/where/qa.json", {}),
        (ProductType.INTERMEDIATE, "workspace/reduce/map.fits", {}),
    ]


def test_collecting_again_finds_the_same(attempt: Attempt) -> None:
    for n in range(100):
        attempt.write(f"output/science/{n}.fits", f"{n}".encode())
    attempt.write("output/qa/bad.json", b"{")
    attempt.write("output/science/empty.fits", b"")
    attempt.write("output/science/.hidden")
    (attempt.directory / "output/science/latest.fits").symlink_to("99.fits")
    first = attempt.collect()
    assert len(first.products) == 103
    assert len(first.warnings) == 3
    assert attempt.collect() == first


def test_products_become_read_only(attempt: Attempt) -> None:
    path = attempt.write("output/science/map.fits")
    path.chmod(0o600)
    closed = attempt.write("output/science/closed.fits")
    closed.chmod(0o000)
    script = attempt.write("output/science/script.sh")
    script.chmod(0o4775)
    attempt.collect()
    assert {stat.S_IMODE(p.stat().st_mode) for p in (path, closed, script)} == {0o444}
    shutil.rmtree(attempt.directory)


@pytest.mark.parametrize("name", ["Karte äöü €.fits", "数据.fits", "white space", "-rf", "a" * 255, "back\\slash"])
def test_any_name(attempt: Attempt, name: str) -> None:
    attempt.write(f"output/science/{name}")
    assert [p.path for p in attempt.collect().products] == [f"output/science/{name}"]


def test_a_thousand_products(attempt: Attempt) -> None:
    for n in range(1000):
        attempt.write(f"output/science/{n // 100}/{n}.fits", f"{n}".encode())
    counted: list[int] = []
    found = attempt.collect(progress=counted.append)
    assert len(found.products) == 1000
    assert sum(counted) == sum(p.size for p in found.products)


# --- what is refused ---


def test_every_file_in_a_wrong_place_is_named(attempt: Attempt) -> None:
    attempt.write("output/science/good.fits")
    attempt.write("output/lost.fits")
    attempt.write("output/unknown/deep/lost.fits")
    text = attempt.refusal()
    allowed = "allowed is a place below output/science/, output/qa/, output/plots/, output/statistics/, output/logs/"
    assert text.splitlines()[1:] == [f"output/lost.fits: {allowed}", f"output/unknown/deep/lost.fits: {allowed}"]
    assert "'reduce'" in text


def test_a_file_instead_of_a_directory_is_in_a_wrong_place(attempt: Attempt) -> None:
    attempt.write("output/science/good.fits")
    (attempt.directory / "output/plots").rmdir()
    attempt.write("output/plots")
    assert "output/plots: allowed is" in attempt.refusal()


def test_nothing_is_refused(attempt: Attempt) -> None:
    attempt.write("logs/job.log")
    attempt.write("output/logs/more.log")
    attempt.write("output/science/.hidden.fits")
    text = attempt.refusal()
    assert "wrote no result below output/ (WORKFLOW_OUTPUT_DIR)" in text
    assert "output/science/.hidden.fits" in text
    shutil.rmtree(attempt.directory / "output")
    assert "wrote no result" in attempt.refusal()


def test_nothing_is_refused_of_an_intermediate_step_too(intermediate: Attempt) -> None:
    intermediate.write("logs/job.log")
    intermediate.write("output/science/map.fits")
    assert "wrote no result below workspace/reduce/" in intermediate.refusal()


def test_a_link_to_a_file_of_the_attempt_counts_as_that_file(attempt: Attempt) -> None:
    attempt.write("workspace/reduce/map.fits", b"map")
    attempt.write("output/science/.v3.fits", b"v3")
    science = attempt.directory / "output/science"
    (science / "map.fits").symlink_to("../../workspace/reduce/map.fits")
    (science / "absolute.fits").symlink_to(attempt.directory / "workspace/reduce/map.fits")
    (science / "indirect.fits").symlink_to("map.fits")
    (science / "latest.fits").symlink_to(".v3.fits")
    assert [(p.path, p.size, p.checksum) for p in attempt.collect().products] == [
        ("output/science/absolute.fits", 3, sha256(b"map")),
        ("output/science/indirect.fits", 3, sha256(b"map")),
        ("output/science/latest.fits", 2, sha256(b"v3")),
        ("output/science/map.fits", 3, sha256(b"map")),
    ]


def test_links_that_lead_elsewhere_are_refused(attempt: Attempt, tmp_path: Path) -> None:
    science = attempt.directory / "output/science"
    sibling = Path(f"{attempt.directory}-other")  # its name begins like the attempt's
    sibling.mkdir()
    (sibling / "file").touch()
    (science / "archive").symlink_to(attempt.archive / "raw.fits")
    (science / "dangling").symlink_to("nowhere")
    (science / "folder").symlink_to("../plots")
    (science / "loop").symlink_to("loop")
    (science / "pipe").symlink_to("../../pipe")
    (science / "sibling").symlink_to(sibling / "file")
    os.mkfifo(attempt.directory / "pipe")
    lines = attempt.refusal().splitlines()[1:]
    assert [x.removeprefix("output/science/").split(",")[0] for x in lines] == [
        "archive: is a link that leads out of the attempt",
        "dangling: is a link that leads nowhere",
        "folder: is a link to a directory",
        "loop: is a link that leads nowhere",
        "pipe: is neither a file nor a directory",
        "sibling: is a link that leads out of the attempt",
    ]


@pytest.mark.parametrize("tree", ["output", "output/science", "logs"])
def test_a_tree_that_was_replaced_by_a_link_is_refused(attempt: Attempt, tmp_path: Path, tree: str) -> None:
    attempt.write("output/plots/map.png")
    shutil.rmtree(attempt.directory / tree)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    (attempt.directory / tree).symlink_to(tmp_path / "elsewhere")
    assert f"{tree}: " in attempt.refusal()


def test_what_is_no_file_is_refused(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt.write("output/science/map.fits")
    os.mkfifo(attempt.directory / "output/science/pipe")
    monkeypatch.chdir(attempt.directory / "logs")  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    assert attempt.refusal().splitlines()[1:] == [
        "logs/socket: is neither a file nor a directory",
        "output/science/pipe: is neither a file nor a directory",
    ]


def test_hard_links_within_the_attempt_are_fine(attempt: Attempt) -> None:
    first = attempt.write("output/science/map.fits", b"map")
    (attempt.directory / "output/science/again.fits").hardlink_to(first)
    scratch = attempt.write("workspace/reduce/scratch", b"scratch")
    (attempt.directory / "output/plots/published").hardlink_to(scratch)
    assert len(attempt.collect().products) == 3


def test_a_hard_link_to_a_file_elsewhere_is_refused(attempt: Attempt) -> None:
    original = attempt.archive / "raw.fits"
    (attempt.directory / "output/science/raw.fits").hardlink_to(original)
    mode = original.stat().st_mode
    assert "output/science/raw.fits: is a hard link to a file outside the attempt" in attempt.refusal()
    assert original.stat().st_mode == mode


def test_unfit_names_are_refused(attempt: Attempt) -> None:
    for name in (b"new\nline", b"latin-\xe9", b"bell\x07"):
        with open(os.path.join(os.fsencode(attempt.directory), b"output/science", name), "wb") as file:
            file.write(b"x")
    attempt.write("output/plots/del\x7f/map.png")
    lines = attempt.refusal().splitlines()[1:]
    assert len(lines) == 4
    assert all("a name must be UTF-8 without control characters" in x for x in lines)
    assert r"'output/science/latin-\udce9'" in "".join(lines)
    "".join(lines).encode()


def test_hidden_and_temporary_files_are_passed_over(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits")
    names = [".hidden", ".nfs000123", "map.fits~", "map.fits.tmp", "map.fits.part", ".cache/deep/file", "new\n.tmp"]
    for name in names:
        attempt.write(f"output/science/{name}")
    attempt.write("output/.DS_Store")
    found = attempt.collect()
    assert [p.path for p in found.products] == ["output/science/map.fits"]
    (warning,) = found.warnings
    passed_over = [".DS_Store", *(f"science/{x.split('/')[0]}" for x in names[:-1]), r"science/new\n.tmp"]
    assert all(f"output/{name}" in warning for name in passed_over)
    assert "deep" not in warning
    assert "\n" not in warning


def test_what_makes_a_zarr_is_not_hidden(attempt: Attempt) -> None:
    names = [".zarray", ".zattrs", ".zgroup", ".zmetadata", "0.0"]
    for name in names:
        attempt.write(f"output/science/map.zarr/{name}")
    found = attempt.collect()
    assert [p.path for p in found.products] == [f"output/science/map.zarr/{name}" for name in names]
    assert found.warnings == ()


def test_empty_files_are_allowed(attempt: Attempt) -> None:
    attempt.write("output/science/empty.fits", b"")
    attempt.write("logs/job.log", b"")
    found = attempt.collect()
    assert found.warnings == ("empty: output/science/empty.fits",)
    assert [p.checksum for p in found.products] == [sha256(b"")] * 2


def test_a_file_that_still_changes_is_not_accepted(attempt: Attempt) -> None:
    attempt.write("output/science/one.fits", b"x" * 3_000_000)
    growing = attempt.write("output/science/two.fits", b"x" * 3_000_000)
    with (
        growing.open("ab", buffering=0) as file,
        pytest.raises(UnavailableError, match=r"two\.fits: changed while it was read"),
    ):
        attempt.collect(progress=lambda _: file.write(b"x"))


def test_without_the_lease_it_stops(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits")
    with pytest.raises(UnavailableError, match="lease"):
        attempt.collect(alive=lambda: False)


def test_a_directory_out_of_sight_is_unavailable(attempt: Attempt) -> None:
    shutil.rmtree(attempt.directory)
    with pytest.raises(UnavailableError, match=str(attempt.directory)):
        attempt.collect()


def test_long_lists_are_cut(attempt: Attempt) -> None:
    for n in range(200):
        attempt.write(f"output/{n}")
    lines = attempt.refusal().splitlines()
    assert len(lines) == 51
    assert lines[-1] == "and 151 more"


# --- metrics ---


def metrics(attempt: Attempt, content: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    attempt.write("output/qa/metrics.json", content)
    found = attempt.collect()
    (product,) = found.products
    assert product.type is ProductType.QA_METRIC
    return product.metrics, found.warnings


def test_metrics_are_read(attempt: Attempt) -> None:
    content = {"rms": 0.5, "n": 3, "ok": True, "text": "gut ü", "beam": {"fwhm": 12.5, "unit": "arcsec"}, "big": 2**80}
    found, warnings = metrics(attempt, json.dumps(content).encode())
    assert warnings == ()
    assert found == {
        "rms": 0.5,
        "n": 3,
        "ok": True,
        "text": "gut ü",
        "beam.fwhm": 12.5,
        "beam.unit": "arcsec",
        "big": 2**80,
    }


def test_what_is_no_metric_is_left_out(attempt: Attempt) -> None:
    content = {"rms": 0.5, "list": [1], "none": None, "a": {"b": {"c": 1}}, "nul": "\0", "\0": 1}
    found, warnings = metrics(attempt, json.dumps(content).encode())
    assert found == {"rms": 0.5}
    (warning,) = warnings
    assert all(key in warning for key in ("list", "none", "a.b", "nul", r"'\x00'"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "truncated"),
        (b"[1]", "not a JSON object"),
        (b'{"rms": NaN}', "malformed"),
        (b'{"rms": 1e999}', "out of range"),
        (b'{"rms": "\xff"}', "utf-8"),
        (b'{"rms": "\\ud800"}', "metrics"),
        (b"[" * 100_000, "depth"),
        (b'{"text": "%s"}' % (b"x" * METRICS_BYTES), "larger than 1000000 bytes"),
    ],
    ids=["cut", "list", "nan", "inf", "latin", "surrogate", "deep", "long"],
)
def test_bad_metrics_are_no_fault(attempt: Attempt, content: bytes, reason: str) -> None:
    found, warnings = metrics(attempt, content)
    assert found == {}
    (warning,) = warnings
    assert warning.startswith("output/qa/metrics.json: no metrics: ")
    assert reason in warning


# --- inputs ---


def test_untouched_inputs_are_not_read_again(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits", b"map")
    counted: list[int] = []
    attempt.collect(progress=counted.append)
    assert sum(counted) == 3


def test_every_altered_input_is_named(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits")
    for path in (attempt.raw, attempt.upstream):
        path.chmod(0o644)
        path.write_bytes(b"x" + RAW[1:])
    with pytest.raises(InputError, match="input altered by the job") as error:
        attempt.collect()
    assert "input/scan1/raw.fits" in str(error.value)
    assert "workspace/calibrate/all/map.fits" in str(error.value)


@pytest.mark.parametrize("how", ["in place", "replaced", "shorter", "removed", "folder", "link"])
def test_any_alteration_is_found(attempt: Attempt, how: str) -> None:
    """Even one of the same length, by a program that sets the time back."""
    before = attempt.raw.stat()
    if how == "in place":
        attempt.raw.chmod(0o644)
        with attempt.raw.open("r+b") as file:
            file.write(b"X")
        attempt.raw.chmod(0o444)
    else:
        attempt.raw.unlink()
    if how in ("replaced", "shorter"):
        attempt.raw.write_bytes(b"X" + RAW[(1 if how == "replaced" else 2) :])
    elif how == "folder":
        attempt.raw.mkdir()
    elif how == "link":
        attempt.raw.symlink_to("/dev/null")
    if how not in ("removed", "link"):
        os.utime(attempt.raw, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify_inputs(str(attempt.directory)) == ["input/scan1/raw.fits"]


def test_a_touched_input_is_as_good_as_before(attempt: Attempt) -> None:
    attempt.raw.chmod(0o644)
    attempt.raw.touch()
    data = attempt.upstream.read_bytes()
    attempt.upstream.unlink()
    attempt.upstream.write_bytes(data)
    assert verify_inputs(str(attempt.directory)) == []


def test_without_the_record_of_staging_nothing_is_accepted(attempt: Attempt) -> None:
    attempt.write("output/science/map.fits")
    (attempt.directory / jobs.STAGED).write_text('[{"path": 3}]')
    with pytest.raises(InputError, match="record of staging"):
        attempt.collect()
    shutil.rmtree(attempt.directory / jobs.CONFIG)
    with pytest.raises(InputError, match="record of staging"):
        attempt.collect()


STAGE_AS_NOBODY = """
import os, sys
import msgspec
from wfm.jobs import StagePlan
from wfm.staging import StagingPolicy, stage

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert stage(msgspec.json.decode(sys.argv[1], type=StagePlan), StagingPolicy("auto", 0)).linked == 2
"""


@pytest.fixture
def linked() -> Iterator[Attempt]:
    """Staged by nobody, so with links to what belongs to root."""
    if os.geteuid() != 0:
        pytest.skip("only root can stage as somebody else")
    directory = Path(tempfile.mkdtemp(prefix="wfm-collect-"))  # pytest's own directories are closed to others
    directory.chmod(0o755)
    attempt = Attempt(directory)
    (directory / "base").mkdir()
    (directory / "base").chmod(0o777)
    plan = msgspec.json.encode(attempt.plan).decode()
    subprocess.run([sys.executable, "-c", STAGE_AS_NOBODY, plan], check=True, timeout=60)
    yield attempt
    shutil.rmtree(directory)


def test_a_linked_original_that_changed_is_found(linked: Attempt) -> None:
    assert verify_inputs(str(linked.directory)) == []
    (linked.archive / "raw.fits").write_bytes(b"X" + RAW[1:])
    assert verify_inputs(str(linked.directory)) == ["input/scan1/raw.fits"]


def test_a_link_that_was_replaced_hides_nothing(linked: Attempt) -> None:
    linked.raw.unlink()
    linked.raw.write_bytes(RAW)
    assert verify_inputs(str(linked.directory)) == []
    (linked.archive / "raw.fits").write_bytes(b"X" + RAW[1:])
    assert verify_inputs(str(linked.directory)) == ["input/scan1/raw.fits"]


def test_a_result_that_is_a_link_to_linked_raw_data_is_refused(linked: Attempt) -> None:
    (linked.directory / "output/science/raw.fits").symlink_to("../../input/scan1/raw.fits")
    assert "leads out of the attempt" in linked.refusal()
