"""What rounding a site's values to a format costs at a static scale, from their histogram, clipping included.

Values are taken as uniform inside a bin of the histogram (a bin is 3 to 6 % wide); ties at a cell's border have no
weight, so round-half-even and round-half-up cost the same.
"""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.formats import NumericFormat
from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.magnitude_density import Floats, MagnitudeDensity, whole_density
from qtool.quantize.measure.analysis.number_grid import NumberGrid, number_grid

COARSE_STEPS, FINE_STEPS = 48, 17


def squared_error(density: MagnitudeDensity, grid: NumberGrid, scales: Floats) -> Floats:
    """Σerror² of all values at every scale.

    Args:
        density: the values.
        grid: the format.
        scales: float64 [n], the value of one unit of the grid: range / grid.largest.

    Returns:
        float64 [n].
    """
    return _over_cells(density, grid, scales, np.inf)


def squared_error_unclipped(density: MagnitudeDensity, grid: NumberGrid, scales: Floats) -> Floats:
    """Σerror² at every scale [n] on an integer grid that goes on for ever with the same step: nothing clips."""
    end = grid.largest + 0.5
    beyond = density.count - density.moments(scales * end)[0]
    return _over_cells(density, grid, scales, end) + beyond * scales**2 / 12


def absolute_error(density: MagnitudeDensity, grid: NumberGrid, scales: Floats) -> Floats:
    """Σ|error| of all values at every scale [n], as `squared_error`."""
    levels = scales[:, None] * grid.levels
    count, total, _ = density.moments(_edges(grid, scales, np.inf))
    count_at, total_at, _ = density.moments(levels)
    above = (total[:, 1:] - total_at) - levels * (count[:, 1:] - count_at)
    below = levels * (count_at - count[:, :-1]) - (total_at - total[:, :-1])
    return np.maximum((above + below).sum(axis=1), 0.0)


def clip_rate(density: MagnitudeDensity, ranges: Floats) -> Floats:
    """The share of values with a magnitude above every range [n]."""
    if density.count == 0:
        return np.zeros(len(ranges))
    return np.maximum(1 - density.moments(ranges)[0] / density.count, 0.0)


def static_mse(site: SiteStatistics, fmt: NumericFormat, ranges: Floats) -> Floats:
    """The mean squared error of a site's values in a format whose largest code stands for every range [n]."""
    density, grid = whole_density(site), number_grid(fmt)
    return squared_error(density, grid, ranges / grid.largest) / max(density.count, 1.0)


def best_range(density: MagnitudeDensity, grid: NumberGrid, lowest: float, highest: float) -> float:
    """The range in [lowest, highest] with the least Σerror²: a logarithmic search, coarse, then fine round the best.

    Args:
        density: the values.
        grid: the format.
        lowest, highest: where to look, for example from the median to the maximum; positive.

    Returns:
        The range; the largest one among equals, so that nothing clips without need.
    """
    if not 0 < lowest < highest:
        return highest
    coarse = np.geomspace(highest, lowest, COARSE_STEPS)
    best = int(np.argmin(squared_error(density, grid, coarse / grid.largest)))
    fine = np.geomspace(coarse[max(best - 1, 0)], coarse[min(best + 1, COARSE_STEPS - 1)], FINE_STEPS)
    tried = np.concatenate([[coarse[best]], fine])
    return float(tried[np.argmin(squared_error(density, grid, tried / grid.largest))])


def _over_cells(density: MagnitudeDensity, grid: NumberGrid, scales: Floats, end: float) -> Floats:
    levels = scales[:, None] * grid.levels
    count, total, square = (np.diff(moment, axis=1) for moment in density.moments(_edges(grid, scales, end)))
    return np.maximum((square - 2 * levels * total + levels**2 * count).sum(axis=1), 0.0)


def _edges(grid: NumberGrid, scales: Floats, end: float) -> Floats:
    """[n, m + 1]: where the cells of the grid's levels begin and end."""
    edges = np.empty((len(scales), len(grid.levels) + 1))
    edges[:, 0] = 0.0
    edges[:, 1:-1] = scales[:, None] * grid.cuts
    edges[:, -1] = np.inf if end == np.inf else scales * end
    return edges
