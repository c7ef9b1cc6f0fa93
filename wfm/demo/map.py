"""Last step, once for all scans: line maps to science cubes, statistics, a quality report and an overview plot.

``science/iris_OBSID_LINE.fits`` holds, per quantity, the cube (scan, step, slit pixel) and its mean over the scans, and
the table of the times; ``statistics/statistics.json`` what `statistics` computes; ``qa/quality.json`` the quality
of every scan with what deserves a look; ``plots/overview.png`` one page to see it all.

Everything is a function of the inputs alone: the same inputs leave the same bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from wfm.demo.contract import BadInputError, Job, reading, run, write_json, write_log
from wfm.demo.linefit import MAPS, finite_median

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

FloatArray = npt.NDArray[np.float64]

LABELS = {"mg_ii_k": "Mg II k 2796 Å", "si_iv": "Si IV 1403 Å"}
MEDIAN_EFFICIENCY = np.sqrt(np.pi / 2)
"""Standard error of the median of normal values over that of their mean (Kendall & Stuart, vol. 1, ch. 10)."""
MAD_TO_SIGMA = 1.4826


@dataclass(frozen=True)
class Line:
    """One spectral line over all scans.

    Attributes:
        name: as in the config of ``linefit``.
        headers: by quantity of `MAPS`, the header of the first scan's image.
        cubes: by quantity, (scan, step, slit pixel).
    """

    name: str
    headers: dict[str, fits.Header]
    cubes: dict[str, FloatArray]

    @property
    def sampling_error(self) -> float:
        """In km/s; see `wfm.demo.linefit`."""
        return float(self.headers["VELOCITY"]["SAMPERR"])


@dataclass(frozen=True)
class Observation:
    """All scans in the order of time.

    Attributes:
        scans: names of the scans.
        primaries: the primary header of each.
        times: of each step, seconds since the start of the observation, (scan, step).
        lines: by name.
    """

    scans: list[str]
    primaries: list[fits.Header]
    times: FloatArray
    lines: dict[str, Line]


def combine(job: Job) -> None:
    """Combines all scans of the job."""
    parameters = job.parameters(max_fill_fraction=float)
    observation = read(job.inputs("input_products", "_lines.fits"))
    quality = quality_report(job.inputs("input_products", "_qa.json"), **parameters)
    numbers = statistics(observation)
    obsid = observation.primaries[0]["OBSID"]
    for name in ("science", "plots"):
        (job.output / name).mkdir(parents=True, exist_ok=True)
    for line in observation.lines.values():
        product = science_product(observation, line)
        product[0].header["CREATOR"] = job.creator
        product.writeto(job.output / "science" / f"iris_{obsid}_{line.name}.fits", overwrite=True)
    write_json(job.output / "statistics" / "statistics.json", numbers)
    write_json(job.output / "qa" / "quality.json", quality)
    plot(observation, numbers, job.output / "plots" / "overview.png", job.workspace)
    log = [f"{len(observation.scans)} scans: {', '.join(observation.scans)}"]
    log += [f"{name}: {values['total']}" for name, values in numbers["lines"].items()]
    log += [f"{flag['scan']}: {flag['line']}: {flag['reason']}" for flag in quality["flags"]]
    write_log(job.output / "logs" / "map.log", log)


def read(paths: list[Path]) -> Observation:
    """Reads what ``linefit`` made, one file per scan.

    Raises:
        BadInputError: a file cannot be read, or does not belong with the others.
    """
    files = {}
    for path in paths:
        with reading(path), fits.open(path, memmap=False) as product:
            images = {hdu.name: hdu.copy() for hdu in product[1:]}
            files[path.name.removesuffix("_lines.fits")] = product[0].header.copy(), images
    scans = sorted(files, key=lambda scan: (files[scan][0]["DATE_OBS"], scan))
    first = scans[0]
    for scan in scans:
        primary, images = files[scan]
        kinship = (primary["OBSID"], {name: hdu.shape for name, hdu in images.items() if hdu.is_image})
        if scan == first:
            expected = kinship
        elif kinship != expected:
            raise BadInputError(f"{scan} and {first} differ in observation, lines or shape")
    names = [name.split()[0] for name in files[first][1] if name.endswith(" INTENSITY")]
    return Observation(
        scans=scans,
        primaries=[files[scan][0] for scan in scans],
        times=np.stack([files[scan][1]["EXPOSURES"].data["TIME"] for scan in scans]).astype(np.float64),
        lines={
            name.lower(): Line(
                name=name.lower(),
                headers={key: files[first][1][f"{name} {key}"].header for key in MAPS},
                cubes={
                    key: np.stack([files[scan][1][f"{name} {key}"].data for scan in scans]).astype(np.float64)
                    for key in MAPS
                },
            )
            for name in names
        },
    )


def statistics(observation: Observation) -> dict[str, Any]:
    """The numbers of each scan and of all together; None where there is nothing to compute from.

    Intensities are in DN Angstrom/s and over all measured pixels, velocities and widths in km/s and over the fitted
    ones. ``median_velocity_error_kms`` joins the standard error of the median, from the scatter of the pixels, with the
    sampling error, which does not average out.
    """

    def numbers(line: Line, scans: slice) -> dict[str, Any]:
        intensity, velocity = line.cubes["INTENSITY"][scans], line.cubes["VELOCITY"][scans]
        measured = intensity[np.isfinite(intensity)]
        fitted = velocity[np.isfinite(velocity)]
        centre = finite_median(velocity)
        statistical = None
        if centre is not None:
            scatter = MAD_TO_SIGMA * np.median(np.abs(fitted - centre))
            statistical = float(MEDIAN_EFFICIENCY * scatter / np.sqrt(fitted.size))
        return {
            "pixels": intensity.size,
            "fraction_measured": measured.size / intensity.size,
            "fraction_fitted": fitted.size / intensity.size,
            "mean_intensity": float(measured.mean()) if measured.size else None,
            "median_intensity": finite_median(intensity),
            "median_velocity_kms": centre,
            "median_velocity_statistical_error_kms": statistical,
            "median_velocity_error_kms": None
            if statistical is None
            else float(np.hypot(statistical, line.sampling_error)),
            "median_pixel_velocity_error_kms": finite_median(line.cubes["VELOCITY_ERROR"][scans]),
            "median_width_kms": finite_median(line.cubes["WIDTH"][scans]),
        }

    every = slice(None)
    primaries = observation.primaries
    return {
        "obsid": primaries[0]["OBSID"],
        "scans": len(observation.scans),
        "start_time": primaries[0]["DATE_OBS"],
        "end_time": max(primary["DATE_END"] for primary in primaries),
        "units": {"intensity": "DN Angstrom/s"},
        "velocity_reference": "vacuum rest wavelength on the level-2 scale; positive is away from the observer",
        "lines": {
            line.name: {
                "rest_wavelength_angstrom": line.headers["VELOCITY"]["RESTWAV"],
                "sampling_error_kms": line.sampling_error,
                "total": numbers(line, every),
                "per_scan": [
                    {
                        "scan": scan,
                        "start_time": primary["DATE_OBS"],
                        "end_time": primary["DATE_END"],
                        **numbers(line, slice(i, i + 1)),
                    }
                    for i, (scan, primary) in enumerate(zip(observation.scans, primaries, strict=True))
                ],
            }
            for line in observation.lines.values()
        },
    }


def quality_report(paths: list[Path], max_fill_fraction: float) -> dict[str, Any]:
    """The quality of every scan as ``linefit`` found it, and flags for what deserves a look."""
    scans = []
    for path in paths:
        with reading(path):
            scans.append(json.loads(path.read_bytes()))
    flags = []
    for scan in scans:
        for line, values in scan["lines"].items():
            if values["fraction_fill"] > max_fill_fraction:
                reason = f"fill fraction {values['fraction_fill']:.3f} is above {max_fill_fraction}"
                flags.append({"scan": scan["scan"], "line": line, "reason": reason})
            if not values["fraction_fitted"]:
                flags.append({"scan": scan["scan"], "line": line, "reason": "no pixel could be fitted"})
    return {"passed": not flags, "flags": flags, "scans": scans}


def mean_over_scans(cube: FloatArray) -> FloatArray:
    """The mean over the first axis of what is finite; NaN where nothing is."""
    n = np.isfinite(cube).sum(axis=0)
    return np.asarray(np.nansum(cube, axis=0) / np.where(n, n, np.nan))


def science_product(observation: Observation, line: Line) -> fits.HDUList:
    """The FITS file of one line; world coordinates are those of the first scan, as the pointing follows the Sun."""
    primary = observation.primaries[0].copy()
    primary["DATE_END"] = max(p["DATE_END"] for p in observation.primaries)
    primary["NSCANS"] = len(observation.scans)
    product = fits.HDUList([fits.PrimaryHDU(header=primary)])
    for key, cube in line.cubes.items():
        header = line.headers[key].copy()
        product.append(fits.ImageHDU(mean_over_scans(cube).astype(np.float32), header, name=f"MEAN {key}"))
        header["CTYPE3"], header["CRPIX3"], header["CRVAL3"], header["CDELT3"] = "SCAN", 1.0, 1.0, 1.0
        product.append(fits.ImageHDU(cube.astype(np.float32), header, name=key))
    columns = [
        fits.Column("SCAN", f"A{max(len(scan) for scan in observation.scans)}", array=observation.scans),
        fits.Column("DATE_OBS", "A23", array=[p["DATE_OBS"] for p in observation.primaries]),
        fits.Column("TIME", f"{observation.times.shape[1]}D", unit="s", array=observation.times),
    ]
    product.append(fits.BinTableHDU.from_columns(columns, name="TIMES"))
    return product


# --- the plot ---


def plot(observation: Observation, numbers: dict[str, Any], path: Path, workspace: Path) -> None:
    """Draws the `overview` into a PNG file."""
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        if not os.access(Path("~").expanduser(), os.W_OK):
            os.environ.setdefault("MPLCONFIGDIR", scratch)
        import matplotlib as mpl

        mpl.use("Agg")
        with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
            figure = overview(observation, numbers)
            figure.savefig(path, dpi=100, metadata={"Software": None})


def overview(observation: Observation, numbers: dict[str, Any]) -> Figure:
    """Per line the mean maps beside all scans in the order of time; below them the course of both lines in time."""
    from matplotlib.figure import Figure

    lines = list(observation.lines.values())
    first = observation.primaries[0]
    figure = Figure(figsize=(13, 4 * len(lines) + 3.2), layout="constrained")
    scans, steps = observation.times.shape
    start = first["DATE_OBS"][:19].replace("T", " ")
    figure.suptitle(
        f"IRIS observation {first['OBSID']}: {scans} raster scans of {steps} steps from {start} UT", fontsize=12
    )
    rows = figure.add_gridspec(len(lines) + 1, 1, height_ratios=[4] * len(lines) + [2.6])
    for row, line in enumerate(lines):
        columns = rows[row].subgridspec(1, 4, width_ratios=(1, 4, 1, 4))
        for column, quantity in enumerate(("INTENSITY", "VELOCITY")):
            mean = figure.add_subplot(columns[2 * column])
            every = figure.add_subplot(columns[2 * column + 1], sharey=mean)
            picture = draw_maps(mean, every, line, quantity)
            unit = "Intensity [DN Å s$^{-1}$]" if quantity == "INTENSITY" else "Doppler velocity [km s$^{-1}$]"
            figure.colorbar(picture, ax=every, label=unit, pad=0.01, extend="both", aspect=30)
    bottom = rows[len(lines)].subgridspec(1, 2)
    draw_intensities(figure.add_subplot(bottom[0]), observation, numbers)
    draw_velocities(figure.add_subplot(bottom[1]), observation, numbers)
    figure.supxlabel(
        "Grey: no measurement. Velocities refer to the vacuum rest wavelength; red is away from us.", fontsize=9
    )
    return figure


def draw_maps(mean: Axes, every: Axes, line: Line, quantity: str) -> AxesImage:
    """The mean over the scans, and beside it all exposures, one column each: steps follow each other in time."""
    cube, header = line.cubes[quantity], line.headers[quantity]
    scans, steps, slit = cube.shape
    y = sky_edges(header, 1, slit)
    style = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", **colours(cube, quantity)}
    mean.imshow(mean_over_scans(cube).T, extent=(*sky_edges(header, 2, steps), *y), **style)
    mean.set(title=f"Mean {quantity.lower()}", xlabel="Solar X [arcsec]", ylabel="Solar Y [arcsec]")
    picture = every.imshow(cube.reshape(scans * steps, slit).T, extent=(0.5, scans + 0.5, *y), **style)
    for edge in range(1, scans):
        every.axvline(edge + 0.5, color="white" if quantity == "INTENSITY" else "black", linewidth=0.4)
    every.set(title=LABELS.get(line.name, line.name), xlabel="Scan", xticks=range(1, scans + 1))
    every.tick_params(labelleft=False)
    return picture


def colours(cube: FloatArray, quantity: str) -> dict[str, Any]:
    """Colour map and limits: percentiles for intensity; for velocity a diverging map with zero in its middle."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, PowerNorm

    finite = cube[np.isfinite(cube)]
    if quantity == "VELOCITY":
        limit = float(np.percentile(np.abs(finite), 98)) if finite.size else 1.0
        return {"cmap": colormaps["RdBu_r"].with_extremes(bad="0.75"), "norm": Normalize(-limit, limit)}
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    return {"cmap": colormaps["inferno"].with_extremes(bad="0.75"), "norm": PowerNorm(0.5, max(low, 0), high)}


def sky_edges(header: fits.Header, axis: int, size: int) -> tuple[float, float]:
    """Where the first pixel of an axis begins and the last one ends, in arcsec."""
    first, last = (
        header[f"CRVAL{axis}"] + header[f"CDELT{axis}"] * (edge - header[f"CRPIX{axis}"]) for edge in (0.5, size + 0.5)
    )
    return first, last


def draw_intensities(axes: Axes, observation: Observation, numbers: dict[str, Any]) -> None:
    """The light curves, each relative to the mean of all scans."""
    minutes = observation.times.mean(axis=1) / 60
    for line, marker in zip(observation.lines, cycle("osD^"), strict=False):
        course = per_scan(numbers, line, "mean_intensity") / numbers["lines"][line]["total"]["mean_intensity"]
        axes.plot(minutes, course, marker=marker, label=LABELS.get(line, line))
    finish(axes, observation, "Mean intensity / mean of all scans")


def draw_velocities(axes: Axes, observation: Observation, numbers: dict[str, Any]) -> None:
    """The median velocities with the error bars of the scatter; the sampling error, common to all, is in the legend."""
    minutes = observation.times.mean(axis=1) / 60
    for line, marker in zip(observation.lines, cycle("osD^"), strict=False):
        course = per_scan(numbers, line, "median_velocity_kms")
        error = per_scan(numbers, line, "median_velocity_statistical_error_kms")
        sampling = numbers["lines"][line]["sampling_error_kms"]
        label = f"{LABELS.get(line, line)} (sampling: ±{sampling:.0f} km s$^{{-1}}$)"
        axes.errorbar(minutes, course, error, marker=marker, capsize=2, label=label)
    finish(axes, observation, "Median velocity [km s$^{-1}$]")


def per_scan(numbers: dict[str, Any], line: str, quantity: str) -> FloatArray:
    """One of the `statistics` over the scans; NaN where there is none."""
    return np.array([scan[quantity] for scan in numbers["lines"][line]["per_scan"]], dtype=np.float64)


def finish(axes: Axes, observation: Observation, label: str) -> None:
    """What both courses in time share."""
    axes.set(xlabel=f"Minutes since {observation.primaries[0]['STARTOBS'][11:19]} UT", ylabel=label)
    axes.margins(y=0.25)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2, loc="upper center")


if __name__ == "__main__":
    run(combine)
