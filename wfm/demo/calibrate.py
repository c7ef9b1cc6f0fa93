"""First step, once per scan: counts to calibrated spectra.

Masks what is no measurement, divides by the exposure time of each step, attaches errors, and writes a correct linear
wavelength axis. From each raw file NAME.fits it makes NAME_calibrated.fits with, per window, the image extensions
``WINDOW`` (DN/s, NaN where masked), ``WINDOW ERROR`` (DN/s, one sigma) and ``WINDOW MASK`` (see `Mask`), each of shape
(step, slit pixel, wavelength), and the table ``EXPOSURES`` (one row per step).

Source of the noise model: De Pontieu et al. 2014, Solar Physics 289, 2733, sections 3 and 7.1.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
from astropy.io import fits

from wfm.demo.contract import Job, reading, run, write_log

FloatArray = npt.NDArray[np.float64]

PHOTONS_PER_DN = {"FUV": 4.0, "NUV": 18.0}
READ_NOISE_DN = {"FUV": 3.1, "NUV": 1.2}
KEPT = ("TELESCOP", "INSTRUME", "ORIGIN", "OBSID", "OBS_DESC", "DATE_OBS", "DATE_END", "STARTOBS", "RASRPT", "NEXP")
"""Cards of the raw primary header that the products carry on."""


class Mask(IntEnum):
    """Why a sample is no measurement."""

    VALID = 0
    FILL = 1
    """The level-2 pipeline had no data here, and says so with a fill value of about -200."""
    SUSPECT = 2
    """More negative than noise can be: a mixture of data and fill made by the geometric correction."""
    NO_EXPOSURE = 3
    """The step was not exposed."""


def calibrate(job: Job) -> None:
    """Calibrates every raw file of the job."""
    parameters = job.parameters(fill_below=float, valid_above=float, windows=list)
    log = []
    for path in job.inputs("input_files", ".fits"):
        with reading(path), fits.open(path, memmap=False) as raw:
            product, lines = calibrate_scan(raw, **parameters)
        product[0].header["CREATOR"] = job.creator
        product.writeto(job.output / f"{path.stem}_calibrated.fits", overwrite=True)
        log += [f"{path.name}: {line}" for line in lines]
    write_log(job.logs / "calibrate.log", log)


def calibrate_scan(
    raw: fits.HDUList, fill_below: float, valid_above: float, windows: list[str]
) -> tuple[fits.HDUList, list[str]]:
    """The calibrated file of one level-2 raster, and lines for the log.

    Args:
        raw: a level-2 file: the primary header, one image per window, the table of the steps.
        fill_below: values at or below this are fill, in DN.
        valid_above: values that are not above this are masked, in DN.
        windows: names of the spectral windows that are wanted, as in ``TDESCi``.

    Raises:
        ValueError: the file has no such window; its windows are named.
        KeyError: the file lacks a header card that every level-2 raster has.
    """
    primary = raw[0].header
    names = {primary[f"TDESC{i}"]: i for i in range(1, primary["NWIN"] + 1)}
    if unknown := [w for w in windows if w not in names]:
        raise ValueError(f"no window {', '.join(map(repr, unknown))}; there are {', '.join(names)}")
    exposures = exposures_of(raw[primary["NWIN"] + 1])
    kept = fits.Header([primary.cards[name] for name in KEPT])
    product = fits.HDUList([fits.PrimaryHDU(header=kept)])
    log = []
    for window in windows:
        i = names[window]
        detector = primary[f"TDET{i}"][:3]
        counts = raw[i].data.astype(np.float64)
        seconds = exposures[f"EXPTIME_{detector}"][:, None, None]
        mask = sample_mask(counts, seconds, fill_below, valid_above)
        valid = np.where(mask == Mask.VALID, counts, np.nan)
        variance = np.maximum(valid, 0) / PHOTONS_PER_DN[detector] + READ_NOISE_DN[detector] ** 2
        header = window_header(primary, raw[i].header, i)
        product += [
            fits.ImageHDU(valid / seconds, header, name=window),
            fits.ImageHDU(np.sqrt(variance) / seconds, header, name=f"{window} error"),
            fits.ImageHDU(mask, header, name=f"{window} mask"),
        ]
        for hdu in product[-3:-1]:
            hdu.header["BUNIT"] = ("adu/s", "DN per second")
        share = {m.name.lower(): f"{np.mean(mask == m):.4f}" for m in Mask}
        log.append(f"{window}: {', '.join(f'{name} {value}' for name, value in share.items())}")
    columns = [fits.Column(name, "D", unit="s", array=values) for name, values in exposures.items()]
    product.append(fits.BinTableHDU.from_columns(columns, name="EXPOSURES"))
    return product, log


def sample_mask(
    counts: FloatArray, seconds: FloatArray, fill_below: float, valid_above: float
) -> npt.NDArray[np.uint8]:
    """The `Mask` of every sample; what is not a number counts as fill."""
    mask = np.full(counts.shape, Mask.SUSPECT, np.uint8)
    mask[counts > valid_above] = Mask.VALID
    mask[~(counts > fill_below)] = Mask.FILL
    mask[np.broadcast_to(np.isnan(seconds), counts.shape)] = Mask.NO_EXPOSURE
    return mask


def exposures_of(auxiliary: fits.ImageHDU) -> dict[str, FloatArray]:
    """Of each step: seconds since STARTOBS, and the exposure times of both detectors in seconds, NaN where not exposed.

    The header of the auxiliary extension names the column of each quantity.
    """
    time, fuv, nuv = (auxiliary.data[:, auxiliary.header[key]] for key in ("TIME", "EXPTIMEF", "EXPTIMEN"))
    return {
        "TIME": time.astype(np.float64),
        "EXPTIME_FUV": np.where(fuv > 0, fuv, np.nan),
        "EXPTIME_NUV": np.where(nuv > 0, nuv, np.nan),
    }


def window_header(primary: fits.Header, image: fits.Header, i: int) -> fits.Header:
    """World coordinates of window i: wavelength in Angstrom, solar y and x in arcsec.

    The files may be thinned along wavelength and slit while ``CDELTn`` and ``CRPIXn`` still speak of the full detector;
    ``TWMINi`` and ``TWMAXi`` are the wavelengths of the first and the last sample, ``TSRi`` and ``TERi`` the detector
    rows of the first and the last slit pixel. For full files this changes nothing.
    """
    samples, rows = image["NAXIS1"], image["NAXIS2"]
    thinning = (primary[f"TER{i}"] - primary[f"TSR{i}"]) / (rows - 1)
    header = fits.Header()
    header["WINDOW"] = primary[f"TDESC{i}"]
    header["DETECTOR"] = primary[f"TDET{i}"]
    header["CTYPE1"], header["CUNIT1"] = "WAVE", "Angstrom"
    header["CRPIX1"], header["CRVAL1"] = 1.0, primary[f"TWMIN{i}"]
    header["CDELT1"] = (primary[f"TWMAX{i}"] - primary[f"TWMIN{i}"]) / (samples - 1)
    header["CTYPE2"], header["CUNIT2"] = "HPLT-TAN", "arcsec"
    header["CRPIX2"], header["CRVAL2"] = (rows + 1) / 2, image["CRVAL2"]
    header["CDELT2"] = image["CDELT2"] * thinning
    header["CTYPE3"], header["CUNIT3"] = "HPLN-TAN", "arcsec"
    header["CRPIX3"], header["CRVAL3"], header["CDELT3"] = image["CRPIX3"], image["CRVAL3"], image["CDELT3"]
    header["PC2_2"], header["PC3_3"] = image["PC2_2"], image["PC3_3"]
    header["PC2_3"], header["PC3_2"] = image["PC2_3"] / thinning, image["PC3_2"] * thinning
    return header


if __name__ == "__main__":
    run(calibrate)
