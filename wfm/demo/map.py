"""Last step, once for all scans: line maps to science cubes, statistics, a quality report and an overview plot.

``science/iris_OBSID_LINE.fits`` holds, per quantity, the cube (scan, step, slit pixel) and, but for errors, its mean
over the scans, and the table of the times; ``statistics/statistics.json`` what `statistics` computes;
``qa/quality.json`` the quality of every scan with what deserves a look; ``plots/overview.png`` one page to see it all.

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
class Scan:
    """What ``linefit`` made of one scan.

    Attributes:
        name: of the file, without what the steps have appended.
        primary: header of the observation.
        times: of each step, seconds since the start of the observation.
        maps: by line and quantity of `MAPS`, images of shape (step, slit pixel).
    """

    name: str
    primary: fits.Header
    times: FloatArray
    maps: dict[str, dict[str, fits.ImageHDU]]


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


def combine(job: Job) -> None:
    """Combines all scans of the job."""
    parameters = job.parameters(max_fill_fraction=float)
    scans = read(job.inputs("input_products", "_lines.fits"))
    quality = quality_report(job.inputs("input_products", "_qa.json"), **parameters)
    lines = [stack(scans, name) for name in scans[0].maps]
    numbers = statistics(scans, lines)
    for name in ("science", "plots"):
        (job.output / name).mkdir(parents=True, exist_ok=True)
    for line in lines:
        product = science_product(scans, line)
        product[0].header["CREATOR"] = job.creator
        product.writeto(job.output / "science" / f"iris_{numbers['obsid']}_{line.name}.fits", overwrite=True)
    write_json(job.output / "statistics" / "statistics.json", numbers)
    write_json(job.output / "qa" / "quality.json", quality)
    plot(scans, lines, numbers, job.output / "plots" / "overview.png", job.workspace)
    log = [f"{len(scans)} scans: {', '.join(scan.name for scan in scans)}"]
    log += [f"{name}: {values['total']}" for name, values in numbers["lines"].items()]
    log += [f"{flag['scan']}: {flag['line']}: {flag['reason']}" for flag in quality["flags"]]
    write_log(job.output / "logs" / "map.log", log)


def read(paths: list[Path]) -> list[Scan]:
    """All scans in the order of time.

    Raises:
        BadInputError: a file cannot be read, or does not belong with the others.
    """
    scans = sorted((read_scan(path) for path in paths), key=lambda scan: (scan.primary["DATE_OBS"], scan.name))
    for scan in scans:
        if kinship(scan) != kinship(scans[0]):
            raise BadInputError(f"{scan.name} and {scans[0].name} differ in observation, lines or shape")
    return scans


def read_scan(path: Path) -> Scan:
    """One file of ``linefit``."""
    with reading(path), fits.open(path, memmap=False) as product:
        primary = product[0].header
        if absent := {"OBSID", "ORIGIN", "STARTOBS", "DATE_OBS", "DATE_END"} - set(primary):
            raise ValueError(f"no {', '.join(sorted(absent))} in the header")
        lines = [hdu.name.removesuffix(" INTENSITY") for hdu in product if hdu.name.endswith(" INTENSITY")]
        return Scan(
            name=path.name.removesuffix("_lines.fits"),
            primary=primary.copy(),
            times=product["EXPOSURES"].data["TIME"].astype(np.float64),
            maps={line.lower(): {key: product[f"{line} {key}"].copy() for key in MAPS} for line in lines},
        )


def kinship(scan: Scan) -> tuple[object, ...]:
    """What the scans of one observation have in common."""
    shapes = {line: {key: image.shape for key, image in maps.items()} for line, maps in scan.maps.items()}
    return scan.primary["OBSID"], scan.times.shape, shapes


def stack(scans: list[Scan], name: str) -> Line:
    """One line of all scans."""
    return Line(
        name=name,
        headers={key: scans[0].maps[name][key].header for key in MAPS},
        cubes={key: np.stack([scan.maps[name][key].data for scan in scans]).astype(np.float64) for key in MAPS},
    )


def statistics(scans: list[Scan], lines: list[Line]) -> dict[str, Any]:
    """The `summary` of each line, over all scans and for each, and to what it refers."""
    return {
        "obsid": scans[0].primary["OBSID"],
        "origin": scans[0].primary["ORIGIN"],
        "scans": len(scans),
        "start_time": scans[0].primary["DATE_OBS"],
        "end_time": end_time(scans),
        "units": {"intensity": "DN Angstrom/s"},
        "velocity_reference": "vacuum rest wavelength on the level-2 scale; positive is away from us. "
        "For velocities relative to the whole map, subtract the line's total median_velocity_kms.",
        "lines": {
            line.name: {
                "rest_wavelength_angstrom": line.headers["VELOCITY"]["RESTWAV"],
                "sampling_error_kms": line.sampling_error,
                "total": summary(line, slice(None)),
                "per_scan": [
                    {
                        "scan": scan.name,
                        "start_time": scan.primary["DATE_OBS"],
                        "end_time": scan.primary["DATE_END"],
                        **summary(line, slice(i, i + 1)),
                    }
                    for i, scan in enumerate(scans)
                ],
            }
            for line in lines
        },
    }


def summary(line: Line, scans: slice) -> dict[str, Any]:
    """The numbers of one line in some scans; None where there is nothing to compute from.

    Intensities are in DN Angstrom/s and over all measured pixels, velocities and widths in km/s and over the fitted
    ones. ``median_velocity_error_kms`` joins the standard error of the median, from the scatter of the pixels, with the
    sampling error, which does not average out.
    """
    intensity, velocity = line.cubes["INTENSITY"][scans], line.cubes["VELOCITY"][scans]
    measured, fitted = intensity[np.isfinite(intensity)], velocity[np.isfinite(velocity)]
    centre, statistical, error = finite_median(velocity), None, None
    if centre is not None:
        scatter = MAD_TO_SIGMA * np.median(np.abs(fitted - centre))
        statistical = float(MEDIAN_EFFICIENCY * scatter / np.sqrt(fitted.size))
        error = float(np.hypot(statistical, line.sampling_error))
    return {
        "pixels": intensity.size,
        "fraction_measured": measured.size / intensity.size,
        "fraction_fitted": fitted.size / intensity.size,
        "mean_intensity": float(measured.mean()) if measured.size else None,
        "median_intensity": finite_median(intensity),
        "median_velocity_kms": centre,
        "median_velocity_statistical_error_kms": statistical,
        "median_velocity_error_kms": error,
        "median_pixel_velocity_error_kms": finite_median(line.cubes["VELOCITY_ERROR"][scans]),
        "median_width_kms": finite_median(line.cubes["WIDTH"][scans]),
    }


def end_time(scans: list[Scan]) -> str:
    """When the last of them ended."""
    return max(str(scan.primary["DATE_END"]) for scan in scans)


def quality_report(paths: list[Path], max_fill_fraction: float) -> dict[str, Any]:
    """The quality of every scan as ``linefit`` found it, and flags for what deserves a look."""
    scans, flags = [], []
    for path in paths:
        with reading(path):
            scan = json.loads(path.read_bytes())
            for line, values in scan["lines"].items():
                reasons = []
                if values["fraction_fill"] > max_fill_fraction:
                    reasons.append(f"fill fraction {values['fraction_fill']:.3f} is above {max_fill_fraction}")
                if not values["fraction_fitted"]:
                    reasons.append("no pixel could be fitted")
                flags += [{"scan": scan["scan"], "line": line, "reason": reason} for reason in reasons]
            scans.append(scan)
    return {"passed": not flags, "flags": flags, "scans": scans}


def mean_over_scans(cube: FloatArray) -> FloatArray:
    """The mean over the first axis of what is finite; NaN where nothing is."""
    n = np.isfinite(cube).sum(axis=0)
    return np.asarray(np.nansum(cube, axis=0) / np.where(n, n, np.nan))


def science_product(scans: list[Scan], line: Line) -> fits.HDUList:
    """The FITS file of one line; world coordinates are those of the first scan, as the pointing follows the Sun."""
    primary = scans[0].primary.copy()
    primary["DATE_END"] = end_time(scans)
    primary["NSCANS"] = len(scans)
    product = fits.HDUList([fits.PrimaryHDU(header=primary)])
    for key, cube in line.cubes.items():
        header = line.headers[key].copy()
        if not key.endswith("_ERROR"):  # the mean of errors is not the error of the mean
            product.append(fits.ImageHDU(mean_over_scans(cube).astype(np.float32), header, name=f"MEAN {key}"))
        header["CTYPE3"], header["CRPIX3"], header["CRVAL3"], header["CDELT3"] = "SCAN", 1.0, 1.0, 1.0
        product.append(fits.ImageHDU(cube.astype(np.float32), header, name=key))
    times = np.stack([scan.times for scan in scans])
    columns = [
        fits.Column("SCAN", f"A{max(len(scan.name) for scan in scans)}", array=[scan.name for scan in scans]),
        fits.Column("DATE_OBS", "A23", array=[scan.primary["DATE_OBS"] for scan in scans]),
        fits.Column("TIME", f"{times.shape[1]}D", unit="s", array=times),
    ]
    product.append(fits.BinTableHDU.from_columns(columns, name="TIMES"))
    return product


# --- the plot ---


def plot(scans: list[Scan], lines: list[Line], numbers: dict[str, Any], path: Path, workspace: Path) -> None:
    """Draws the `overview` into a PNG file."""
    with tempfile.TemporaryDirectory(dir=workspace) as scratch:
        if not os.access(os.path.expanduser("~"), os.W_OK):
            os.environ.setdefault("MPLCONFIGDIR", scratch)
        import matplotlib as mpl

        with mpl.rc_context():
            mpl.rcdefaults()  # a user's own style must not change the product
            mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"})
            figure = overview(scans, lines, numbers)
            figure.savefig(path, dpi=100, metadata={"Software": None})


def overview(scans: list[Scan], lines: list[Line], numbers: dict[str, Any]) -> Figure:
    """Per line the mean maps beside all scans in the order of time; below them the course of all lines in time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4 * len(lines) + 3.2), layout="constrained")
    what = "Simulated IRIS observation" if numbers["origin"] == "simulated" else "IRIS observation"
    start = numbers["start_time"][:19].replace("T", " ")
    title = f"{what} {numbers['obsid']}: {len(scans)} raster scans of {scans[0].times.size} steps from {start} UT"
    figure.suptitle(title, fontsize=12)
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
    minutes = np.array([scan.times.mean() for scan in scans]) / 60
    for column, draw in enumerate((draw_intensities, draw_velocities)):
        axes = figure.add_subplot(bottom[column])
        draw(axes, minutes, numbers)
        axes.set_xlabel(f"Minutes since {scans[0].primary['STARTOBS'][11:19]} UT")
        axes.margins(y=0.25)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, ncols=2, loc="upper center")
    caption = "Grey: no measurement. Velocities refer to the vacuum rest wavelength; red is away from us."
    figure.supxlabel(caption, fontsize=9)
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


def draw_intensities(axes: Axes, minutes: FloatArray, numbers: dict[str, Any]) -> None:
    """The light curves, each relative to the mean of all scans."""
    for (name, values), marker in zip(numbers["lines"].items(), cycle("osD^"), strict=False):
        course = per_scan(values, "mean_intensity") / (values["total"]["mean_intensity"] or np.nan)
        axes.plot(minutes, course, marker=marker, label=LABELS.get(name, name))
    axes.set_ylabel("Mean intensity / mean of all scans")


def draw_velocities(axes: Axes, minutes: FloatArray, numbers: dict[str, Any]) -> None:
    """The median velocities with the error bars of the scatter; the sampling error, common to all, is in the legend."""
    for (name, values), marker in zip(numbers["lines"].items(), cycle("osD^"), strict=False):
        error = per_scan(values, "median_velocity_statistical_error_kms")
        label = f"{LABELS.get(name, name)} (sampling: ±{values['sampling_error_kms']:.0f} km s$^{{-1}}$)"
        course = per_scan(values, "median_velocity_kms")
        axes.errorbar(minutes, course, error, marker=marker, capsize=2, label=label)
    axes.set_ylabel("Median velocity [km s$^{-1}$]")


def per_scan(values: dict[str, Any], quantity: str) -> FloatArray:
    """One number of the `summary` over the scans; NaN where there is none."""
    return np.array([scan[quantity] for scan in values["per_scan"]], dtype=np.float64)


if __name__ == "__main__":
    run(combine)
