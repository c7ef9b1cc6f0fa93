"""The demonstration's statistics computed directly from the raw files, pixel by pixel, with none of its code.

The acceptance test compares this with what came out of the workflow. It follows the definitions in the documentation
of the three programs, in the plainest way: one loop over scans, steps and slit pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from astropy.io import fits

C = 299792.458
LINES = {
    "mg_ii_k": {
        "window": "Mg II k 2796",
        "rest": 2796.352,
        "half": 0.7,
        "near": 0.7,
        "far": 1.3,
        "gain": 18,
        "read": 1.2,
    },
    "si_iv": {"window": "Si IV 1403", "rest": 1402.770, "half": 0.65, "near": 0.7, "far": 1.4, "gain": 4, "read": 3.1},
}


def direct(paths: Sequence[Path], min_snr: float = 5.0) -> dict[str, Any]:
    """What ``statistics.json`` must hold, apart from the names of units and of the velocity reference.

    Args:
        paths: the raw files of all scans.
        min_snr: as in the config of the step ``linefit``.
    """
    scans = []
    for path in paths:
        with fits.open(path, memmap=False) as raw:
            header = raw[0].header
            pixels = {name: _pixels(raw, line, min_snr) for name, line in LINES.items()}
            scans.append({"scan": path.stem, "start": header["DATE_OBS"], "end": header["DATE_END"], "pixels": pixels})
            obsid, origin = header["OBSID"], header["ORIGIN"]
            sampling = {name: _sample_kms(raw, line) / math.sqrt(12) for name, line in LINES.items()}
    scans.sort(key=lambda scan: scan["start"])
    return {
        "obsid": obsid,
        "origin": origin,
        "scans": len(scans),
        "start_time": scans[0]["start"],
        "end_time": max(scan["end"] for scan in scans),
        "lines": {
            name: {
                "rest_wavelength_angstrom": line["rest"],
                "sampling_error_kms": sampling[name],
                "total": _summary([pixel for scan in scans for pixel in scan["pixels"][name]], sampling[name]),
                "per_scan": [
                    {
                        "scan": scan["scan"],
                        "start_time": scan["start"],
                        "end_time": scan["end"],
                        **_summary(scan["pixels"][name], sampling[name]),
                    }
                    for scan in scans
                ],
            }
            for name, line in LINES.items()
        },
    }


def _window_index(raw: fits.HDUList, window: str) -> int:
    return next(i for i in range(1, raw[0].header["NWIN"] + 1) if raw[0].header[f"TDESC{i}"] == window)


def _sample_kms(raw: fits.HDUList, line: dict[str, Any]) -> float:
    i = _window_index(raw, line["window"])
    span = raw[0].header[f"TWMAX{i}"] - raw[0].header[f"TWMIN{i}"]
    return float(span / (raw[i].shape[-1] - 1) / line["rest"] * C)


def _pixels(raw: fits.HDUList, line: dict[str, Any], min_snr: float) -> list[dict[str, float] | None]:
    """Every pixel of a scan; None where the line could not be measured."""
    i = _window_index(raw, line["window"])
    primary, cube, auxiliary = raw[0].header, raw[i].data, raw[raw[0].header["NWIN"] + 1]
    wavelengths = [float(w) for w in np.linspace(primary[f"TWMIN{i}"], primary[f"TWMAX{i}"], cube.shape[-1])]
    column = auxiliary.header["EXPTIMEN" if primary[f"TDET{i}"] == "NUV" else "EXPTIMEF"]
    found = []
    for step in range(cube.shape[0]):
        seconds = float(auxiliary.data[step, column])
        for slit in range(cube.shape[1]):
            spectrum = [(w - line["rest"], float(dn)) for w, dn in zip(wavelengths, cube[step, slit], strict=True)]
            found.append(_measure(spectrum, seconds, line, min_snr))
    return found


def _measure(
    spectrum: list[tuple[float, float]], seconds: float, line: dict[str, Any], min_snr: float
) -> dict[str, float] | None:
    """One pixel, from its offsets in Angstrom and counts in DN."""

    def variance(dn: float) -> float:
        return float(max(dn, 0.0) / line["gain"] + line["read"] ** 2)

    inside = [(x, dn) for x, dn in spectrum if abs(x) <= line["half"]]
    beside = [dn for x, dn in spectrum if line["near"] < abs(x) <= line["far"] and dn > -25]
    if any(dn <= -25 for _, dn in inside) or len(beside) < 3 or not seconds > 0:
        return None
    spacing = spectrum[1][0] - spectrum[0][0]
    pedestal = fmean(beside)
    pedestal_variance = sum(variance(dn) for dn in beside) / len(beside) ** 2

    def propagate(weights: list[float]) -> float:
        from_samples = sum(k * k * variance(dn) for k, (_, dn) in zip(weights, inside, strict=True))
        return math.sqrt(from_samples + sum(weights) ** 2 * pedestal_variance)

    total = sum(dn - pedestal for _, dn in inside)
    pixel = {"intensity": total * spacing / seconds}
    if total / propagate([1.0] * len(inside)) < min_snr:
        return pixel
    centre = sum(x * (dn - pedestal) for x, dn in inside) / total
    squared = sum((x - centre) ** 2 * (dn - pedestal) for x, dn in inside) / total
    noise = propagate([(x - centre) / total for x, _ in inside])
    to_kms = C / line["rest"]
    pixel["velocity"] = centre * to_kms
    pixel["velocity_error"] = to_kms * math.hypot(noise, spacing / math.sqrt(12))
    if squared >= 0:
        pixel["width"] = math.sqrt(squared) * to_kms
    return pixel


def _summary(pixels: list[dict[str, float] | None], sampling: float) -> dict[str, Any]:
    measured = [pixel for pixel in pixels if pixel is not None]
    values = {
        key: [pixel[key] for pixel in measured if key in pixel]
        for key in ("intensity", "velocity", "velocity_error", "width")
    }
    summary = {
        "pixels": len(pixels),
        "fraction_measured": len(measured) / len(pixels),
        "fraction_fitted": len(values["velocity"]) / len(pixels),
        "mean_intensity": fmean(values["intensity"]) if measured else None,
        "median_intensity": _median(values["intensity"]),
        "median_velocity_kms": _median(values["velocity"]),
        "median_pixel_velocity_error_kms": _median(values["velocity_error"]),
        "median_width_kms": _median(values["width"]),
        "median_velocity_statistical_error_kms": None,
        "median_velocity_error_kms": None,
    }
    if values["velocity"]:
        middle = median(values["velocity"])
        scatter = 1.4826 * median(abs(v - middle) for v in values["velocity"])
        statistical = math.sqrt(math.pi / 2) * scatter / math.sqrt(len(values["velocity"]))
        summary["median_velocity_statistical_error_kms"] = statistical
        summary["median_velocity_error_kms"] = math.sqrt(statistical**2 + sampling**2)
    return summary


def _median(values: list[float]) -> float | None:
    return median(values) if values else None
