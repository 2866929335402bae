"""What every candidate format would cost at a site: static scales from the histograms, dynamic ones as measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.formats import FP8_E4M3, INT8, NumericFormat
from qtool.quantize.artifacts.site_statistics import DYNAMIC_CANDIDATES, DYNAMIC_FORMATS, SiteStatistics
from qtool.quantize.measure.analysis.findings import FormatError
from qtool.quantize.measure.analysis.magnitude_density import (
    Floats,
    MagnitudeDensity,
    ordinary_density,
    spike_density,
    whole_density,
)
from qtool.quantize.measure.analysis.number_grid import number_grid
from qtool.quantize.measure.analysis.quantization_error import absolute_error, best_range, clip_rate, squared_error

STATIC_MAX, STATIC_QUANTILE, STATIC_MSE = "static max", "static q0.999", "static mse"
QUANTILE = 0.999
# A site that no one quantizes by a searched scale: what it costs at its maximum is enough to know.
OUTPUT_FORMATS: tuple[NumericFormat, ...] = (INT8, FP8_E4M3)
LARGEST_SQNR_DB = 300.0  # stands for an error of zero: beyond what float64 resolves


def format_errors(name: str, role: Role, site: SiteStatistics) -> Iterator[FormatError]:
    """One site's candidates: formats × static scales, then the dynamic ones where they were measured.

    Sites of role "output" have static scales at their maximum only, for INT8 and FP8. A site of so few rows that none
    was sampled has no candidates: an expert that was hit twice.

    Args:
        name: the site.
        role: its role.
        site: its statistics.
    """
    if site.rows[0] and not site.ordinary.any():
        return
    parts = (ordinary_density(site), spike_density(site))
    if role == "output":
        for fmt in OUTPUT_FORMATS:
            yield from _static(name, fmt, {STATIC_MAX: site.amax}, parts)
        return
    whole, median, high = whole_density(site), site.quantile(0.5), site.quantile(QUANTILE)
    lowest = median if median > 0 else high
    for fmt in DYNAMIC_FORMATS:
        ranges = {
            STATIC_MAX: site.amax,
            STATIC_QUANTILE: high if high > 0 else site.amax,
            STATIC_MSE: best_range(whole, number_grid(fmt), lowest, site.amax),
        }
        yield from _static(name, fmt, ranges, parts)
    yield from _dynamic(name, site, parts)


def _static(
    name: str, fmt: NumericFormat, ranges: dict[str, float], parts: tuple[MagnitudeDensity, MagnitudeDensity]
) -> Iterator[FormatError]:
    grid = number_grid(fmt)
    widths = np.array(list(ranges.values()))
    absolute = np.stack([absolute_error(part, grid, widths / grid.largest) for part in parts])
    square = np.stack([squared_error(part, grid, widths / grid.largest) for part in parts])
    counts = np.array([part.count for part in parts])
    clipped = np.stack([clip_rate(part, widths) for part in parts])
    for index, scale in enumerate(ranges):
        share = float(counts @ clipped[:, index] / max(counts.sum(), 1.0))
        yield _row(name, fmt, scale, parts, absolute[:, index], square[:, index], share)


def _dynamic(
    name: str, site: SiteStatistics, parts: tuple[MagnitudeDensity, MagnitudeDensity]
) -> Iterator[FormatError]:
    # The rows that were quantized are scaled up by how much of Σ|x| and Σx² they hold.
    held = site.errors[:, 0, :]
    all_values = np.array([[part.absolute, part.square] for part in parts])
    if (site.rows[held[:, 1] == 0] > 0).any():
        return
    factor = np.divide(all_values, held, out=np.zeros_like(all_values), where=held > 0)
    for index, (fmt, block) in enumerate(DYNAMIC_CANDIDATES):
        error = site.errors[:, 1 + index, :] * factor
        scale = f"per token, {block}" if block else "per token"
        yield _row(name, fmt, scale, parts, error[:, 0], error[:, 1], 0.0)


def _row(
    name: str,
    fmt: NumericFormat,
    scale: str,
    parts: tuple[MagnitudeDensity, MagnitudeDensity],
    absolute: Floats,
    square: Floats,
    clipped: float,
) -> FormatError:
    """A row from Σ|error| and Σerror² of ordinary rows and spikes [2]."""
    values, energy = sum(part.absolute for part in parts), sum(part.square for part in parts)
    return FormatError(
        site=name,
        format=fmt.name,
        scale=scale,
        relative_mae=_share(float(absolute.sum()), values),
        relative_mae_ordinary=_share(float(absolute[0]), parts[0].absolute),
        sqnr_db=_decibel(energy, float(square.sum())),
        sqnr_ordinary_db=_decibel(parts[0].square, float(square[0])),
        clip_rate=clipped,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _decibel(energy: float, error: float) -> float:
    if error <= 0 or energy <= 0:
        return LARGEST_SQNR_DB
    return min(10 * math.log10(energy / error), LARGEST_SQNR_DB)
