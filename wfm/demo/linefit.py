"""Second step, once per scan: calibrated spectra to intensity, Doppler velocity and width of each line.

Per pixel, with f_i the spectrum at the wavelengths l_i of the line and c the mean of the samples beside it:

    S = sum(f_i - c)         intensity = S dl
    centre = sum(l_i (f_i - c)) / S                 velocity = c0 (centre - rest) / rest, positive away from us
    width^2 = sum((l_i - centre)^2 (f_i - c)) / S   the standard deviation of the profile, not of the gas alone

Errors are first-order propagation of the independent errors of f_i and c (Bevington & Robinson 2003, Data Reduction
and Error Analysis, ch. 3): with k_i = (l_i - centre) / S for the centre and k_i = ((l_i - centre)^2 - width^2) / S for
the squared width, variance = sum(k_i^2 s_i^2) + (sum k_i)^2 s_c^2.

That is the noise. A line narrower than the distance dv between two samples is caught by one of them, and any velocity
within +-dv/2 gives the same answer: the spread of a uniform distribution, dv / sqrt(12), is added in quadrature to the
error of every velocity and also quoted alone (``SAMPERR``). It is an upper bound where the line is resolved.

The zero point of velocities is the vacuum rest wavelength (NIST Atomic Spectra Database) on the wavelength scale of the
level-2 data, which is corrected for the orbit and the temperature of the spectrograph.

From each NAME_calibrated.fits it makes NAME_lines.fits, with per line the images (step, slit pixel) named by `MAPS`,
and NAME_qa.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from wfm.demo.contract import BadInputError, Job, reading, run, write_json, write_log

FloatArray = npt.NDArray[np.float64]

LIGHT_SPEED = 299792.458
"""In km/s."""
FILL = 1
"""How the mask of the calibrated spectra marks a fill value."""
CONTINUUM_UNIT, INTENSITY_UNIT, VELOCITY_UNIT = "adu/s", "adu Angstrom/s", "km/s"
MAPS = {
    "CONTINUUM": CONTINUUM_UNIT,
    "CONTINUUM_ERROR": CONTINUUM_UNIT,
    "INTENSITY": INTENSITY_UNIT,
    "INTENSITY_ERROR": INTENSITY_UNIT,
    "VELOCITY": VELOCITY_UNIT,
    "VELOCITY_ERROR": VELOCITY_UNIT,
    "WIDTH": VELOCITY_UNIT,
    "WIDTH_ERROR": VELOCITY_UNIT,
}
LINE_PARAMETERS = {"window", "rest_wavelength", "half_width", "continuum"}


def linefit(job: Job) -> None:
    """Measures the lines of every calibrated scan of the job."""
    parameters = job.parameters(min_snr=float, min_continuum_samples=int, lines=dict)
    for name, line in parameters["lines"].items():
        if not isinstance(line, dict) or line.keys() != LINE_PARAMETERS:
            raise BadInputError(f"config parameters: line {name} needs exactly {', '.join(sorted(LINE_PARAMETERS))}")
    log = []
    for path in job.inputs("input_products", "_calibrated.fits"):
        scan = path.name.removesuffix("_calibrated.fits")
        with reading(path), fits.open(path, memmap=False) as spectra:
            product, quality = fit_scan(spectra, **parameters)
        product[0].header["CREATOR"] = job.creator
        product.writeto(job.output / f"{scan}_lines.fits", overwrite=True)
        write_json(job.output / f"{scan}_qa.json", {"scan": scan, "lines": quality})
        log += [f"{scan}: {name}: {values}" for name, values in quality.items()]
    write_log(job.logs / "linefit.log", log)


def fit_scan(
    spectra: fits.HDUList, min_snr: float, min_continuum_samples: int, lines: dict[str, dict[str, Any]]
) -> tuple[fits.HDUList, dict[str, dict[str, Any]]]:
    """The line maps of one calibrated scan, and their quality by line.

    Args:
        spectra: what the step ``calibrate`` made.
        min_snr: velocity and width are NaN where intensity / error is below this.
        min_continuum_samples: everything is NaN where fewer samples beside the line are valid.
        lines: by name: ``window``, ``rest_wavelength``, ``half_width`` of the line, and ``continuum``: nearest and
            farthest distance from the rest wavelength of the samples beside it, on both sides; in Angstrom.
    """
    product = fits.HDUList([fits.PrimaryHDU(header=spectra[0].header)])
    quality = {}
    for name, line in lines.items():
        window = line["window"]
        header = spectra[window].header
        wavelength = header["CRVAL1"] + header["CDELT1"] * (np.arange(header["NAXIS1"]) + 1 - header["CRPIX1"])
        maps = moments(spectra[window].data, spectra[f"{window} error"].data, wavelength, line, min_continuum_samples)
        with np.errstate(invalid="ignore"):
            snr = maps["INTENSITY"] / maps["INTENSITY_ERROR"]
            faint = ~(snr >= min_snr)
        for key in ("VELOCITY", "VELOCITY_ERROR", "WIDTH", "WIDTH_ERROR"):
            maps[key][faint] = np.nan
        sampling = LIGHT_SPEED * header["CDELT1"] / line["rest_wavelength"] / np.sqrt(12)
        maps["VELOCITY_ERROR"] = np.hypot(maps["VELOCITY_ERROR"], sampling)
        for key, unit in MAPS.items():
            hdu = fits.ImageHDU(maps[key], map_header(header), name=f"{name} {key}")
            hdu.header["BUNIT"] = unit
            hdu.header["RESTWAV"] = (line["rest_wavelength"], "Angstrom, vacuum")
            hdu.header["SAMPERR"] = (sampling, "km/s, part of VELOCITY_ERROR due to sampling")
            product.append(hdu)
        quality[name] = {
            "fraction_fill": float(np.mean(spectra[f"{window} mask"].data == FILL)),
            "fraction_measured": float(np.mean(np.isfinite(snr))),
            "fraction_fitted": float(np.mean(np.isfinite(maps["VELOCITY"]))),
            "median_snr": finite_median(snr),
            "median_velocity_kms": finite_median(maps["VELOCITY"]),
            "median_velocity_error_kms": finite_median(maps["VELOCITY_ERROR"]),
        }
    product.append(spectra["EXPOSURES"].copy())
    return product, quality


def moments(
    flux: FloatArray,
    sigma: FloatArray,
    wavelength: FloatArray,
    line: dict[str, Any],
    min_continuum_samples: int,
) -> dict[str, FloatArray]:
    """The `MAPS` of one line, each (step, slit pixel), by the formulas at the head of this module.

    Every sample of the line must be valid, as a hole would pull the centre to one side.

    Args:
        flux, sigma: spectrum and its error, (step, slit pixel, wavelength), NaN where masked.
        wavelength: in Angstrom, rising in equal steps.
        line: see `fit_scan`.

    Raises:
        ValueError: the window does not reach far enough on either side of the line.
    """
    rest, (near, far) = line["rest_wavelength"], line["continuum"]
    distance = np.abs(wavelength - rest)
    inside = distance <= line["half_width"]
    beside = (distance > near) & (distance <= far)
    if inside.sum() < 3 or beside.sum() < min_continuum_samples:
        raise ValueError(f"the window has too few samples at {rest} Angstrom")

    usable = np.isfinite(flux[..., beside])
    n = usable.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        n = np.where(n >= min_continuum_samples, n, np.nan)
        continuum = np.nansum(flux[..., beside], axis=-1) / n
        continuum_variance = np.nansum(sigma[..., beside] ** 2, axis=-1) / n**2
        f = flux[..., inside] - continuum[..., None]
        variance = sigma[..., inside] ** 2

        def error(k: FloatArray) -> FloatArray:
            """Of a quantity whose derivatives by the samples f_i are k."""
            squared = (k**2 * variance).sum(axis=-1) + k.sum(axis=-1) ** 2 * continuum_variance
            return np.asarray(np.sqrt(squared))

        total = f.sum(axis=-1)
        offset = wavelength[inside] - rest
        centre = (offset * f).sum(axis=-1) / total
        from_centre = offset - centre[..., None]
        width_squared = (from_centre**2 * f).sum(axis=-1) / total
        width = np.sqrt(width_squared)
        step = wavelength[1] - wavelength[0]
        to_velocity = LIGHT_SPEED / rest
        return {
            "CONTINUUM": continuum,
            "CONTINUUM_ERROR": np.sqrt(continuum_variance),
            "INTENSITY": total * step,
            "INTENSITY_ERROR": error(np.ones_like(f)) * step,
            "VELOCITY": centre * to_velocity,
            "VELOCITY_ERROR": error(from_centre / total[..., None]) * to_velocity,
            "WIDTH": width * to_velocity,
            "WIDTH_ERROR": error((from_centre**2 - width_squared[..., None]) / total[..., None])
            / (2 * width)
            * to_velocity,
        }


def map_header(spectrum: fits.Header) -> fits.Header:
    """The world coordinates of a (step, slit pixel) image: those of the spectra without their first axis."""
    header = fits.Header()
    for axis in (1, 2):
        for key in ("CTYPE", "CUNIT", "CRPIX", "CRVAL", "CDELT"):
            header[f"{key}{axis}"] = spectrum[f"{key}{axis + 1}"]
        for other in (1, 2):
            header[f"PC{axis}_{other}"] = spectrum[f"PC{axis + 1}_{other + 1}"]
    return header


def finite_median(values: FloatArray) -> float | None:
    """The median of what is finite; None if nothing is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


if __name__ == "__main__":
    run(linefit)
