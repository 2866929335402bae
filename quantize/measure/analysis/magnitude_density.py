"""A magnitude histogram as a density: uniform inside every bin, with exact moments up to any point.

Rounding to a grid costs, per cell of the grid, a difference of the first three moments; so the expected error of any
format at any scale is a sum over cells, exact for this density whether a step is much finer or much coarser than a bin.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.magnitudes import BINS_PER_OCTAVE, EDGES, bin_of
from qtool.quantize.artifacts.site_statistics import Array, SiteStatistics

Floats = npt.NDArray[np.float64]
# A float64's exponent and first four mantissa bits, less the difference of the two exponent biases, are its bin.
_BITS_DROPPED = 48
_BIAS = (1023 - 127) * BINS_PER_OCTAVE


class MagnitudeDensity:
    """How many values have which magnitude."""

    def __init__(self, counts: Array, limit: float, known: Floats | None = None) -> None:
        """Make a density.

        Args:
            counts: values per bin of `magnitudes` [BINS], whole or estimated.
            limit: the largest magnitude: nothing lies above it.
            known: magnitudes [n] that are known exactly; they count in addition.
        """
        self._known = np.sort(np.zeros(0) if known is None else known)
        self._known_below = [
            np.concatenate([[0.0], np.cumsum(self._known**power)]) for power in range(3)
        ]
        filled = np.flatnonzero(counts)
        first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, 0)
        inside = np.asarray(counts[first : last + 1], dtype=np.float64)
        self._first = first
        self._low = EDGES[first : last + 1]
        self._high = EDGES[first + 1 : last + 2].copy()
        narrowest = self._low[-1] + (self._high[-1] - self._low[-1]) * 1e-6
        self._high[-1] = min(self._high[-1], max(limit, narrowest))
        self._per_unit = inside / (self._high - self._low)
        middle = (self._low + self._high) / 2
        square = (self._low**2 + self._low * self._high + self._high**2) / 3
        self._below = [np.concatenate([[0.0], np.cumsum(inside * weight)]) for weight in (1.0, middle, square)]

    @property
    def count(self) -> float:
        """How many values there are."""
        return float(self._below[0][-1] + self._known_below[0][-1])

    @property
    def absolute(self) -> float:
        """Σ|x|."""
        return float(self._below[1][-1] + self._known_below[1][-1])

    @property
    def square(self) -> float:
        """Σx²."""
        return float(self._below[2][-1] + self._known_below[2][-1])

    def moments(self, points: Floats) -> tuple[Floats, Floats, Floats]:
        """The number, Σ|x| and Σx² of the values up to every point (not negative; infinity counts all)."""
        bins = (np.ascontiguousarray(points).view(np.int64) >> _BITS_DROPPED) - (_BIAS + self._first)
        bins = bins.clip(0, len(self._low) - 1)
        low = self._low[bins]
        upto = np.minimum(np.maximum(points, low), self._high[bins])
        part = self._per_unit[bins] * (upto - low)
        upper = (1.0, (upto + low) / 2, (upto * upto + upto * low + low * low) / 3)
        moments = [below[bins] + part * weight for below, weight in zip(self._below, upper, strict=True)]
        if self._known.size:
            known = np.searchsorted(self._known, points, side="right")
            moments = [moment + below[known] for moment, below in zip(moments, self._known_below, strict=True)]
        count, absolute, square = moments
        return count, absolute, square


def ordinary_density(site: SiteStatistics) -> MagnitudeDensity:
    """The values of a site's ordinary rows, the sampled ones scaled up to all."""
    seen = int(site.ordinary.sum())
    scale = site.rows[0] * site.width / seen if seen else 0.0
    return MagnitudeDensity(site.ordinary * scale, float(site.channel_ordinary.max()))


def spike_density(site: SiteStatistics) -> MagnitudeDensity:
    """The values of a site's spikes; the largest, which hold most of their energy, exactly."""
    known = _known_spikes(site)
    return MagnitudeDensity(_without(site.spikes, known), site.amax, known)


def whole_density(site: SiteStatistics) -> MagnitudeDensity:
    """All values of a site."""
    known = _known_spikes(site)
    return MagnitudeDensity(_without(site.histogram, known), site.amax, known)


def _known_spikes(site: SiteStatistics) -> Floats:
    """Those of the largest values that no ordinary row reaches: they are spikes' values."""
    magnitudes = np.abs(site.top_values)
    return magnitudes[magnitudes > site.channel_ordinary[site.top_places[:, 3]]].astype(np.float64)


def _without(counts: Array, known: Floats) -> Array:
    return counts - np.bincount(bin_of(known.astype(np.float32)), minlength=len(counts))
