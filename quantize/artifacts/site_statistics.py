"""What passed one site, summed up so that two parts of a text merge into the statistics of both.

Merging is associative and commutative: counts, maxima, histograms and the list of largest values come out bit for
bit the same in any order; float64 sums to rounding (1e-12 relative).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.magnitudes import BINS, quantile

TOP_VALUES = 100
SPIKE_RATIO = 16.0  # a spike token's max|x| over the median of its sequence's token maxima
MASSIVE_MAGNITUDE = 100.0  # arXiv 2402.17762
MASSIVE_RATIO = 1000.0
FIRST_LENGTH = 128  # lengths at which ranges are recorded: 128, 256, 512, …
LENGTHS = 21
PICTURE = (48, 64)
ERROR_BLOCK = 64  # values that share a scale in the per-token-and-block candidates

DYNAMIC_FORMATS: tuple[NumericFormat, ...] = (INT8, INT4, FP8_E4M3, FP4_E2M1)
# (format, values that share a scale; 0: the whole token), in the order of SiteStatistics.errors
DYNAMIC_CANDIDATES: tuple[tuple[NumericFormat, int], ...] = tuple(
    (fmt, block) for block in (0, ERROR_BLOCK) for fmt in DYNAMIC_FORMATS
)

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """One site's values. C is the site's width (channels); a row is one token.

    Attributes:
        channel_sum, channel_square: float64 [C], per channel the sum and the sum of squares.
        channel_low, channel_high: float32 [C], per channel the smallest and largest value.
        channel_ordinary: float32 [C], per channel max|x| over the ordinary tokens: all but the spikes.
        rows: int64 [2], how many rows were ordinary and how many were spikes. A spike's max|x| is more than
            SPIKE_RATIO × the median of its sequence's token maxima at this site.
        powers: float64 [2, 2], for ordinary rows (sampled) and spikes: the sums of third and fourth powers.
        ordinary, spikes: int64 [BINS], how many values of ordinary rows and of spikes have which magnitude
            (`magnitudes`). Ordinary rows are sampled (Statistics.sampling), spikes are all counted.
        ratios: float64 [2, 4], for ordinary rows (sampled) and spikes: rows looked at, sum and maximum of
            max|x| / median|x|, and how many are massive by the per-token definition (max|x| > 100 and ratio > 1000).
            Rows whose median is 0 count as ratio 0.
        errors: float64 [2, 1 + candidates, 2], for ordinary rows (sampled) and spikes: the sums of |x| and x², then
            per candidate of DYNAMIC_CANDIDATES the sums of |error| and error². All zero where nothing is quantized.
        top_values, top_places: the TOP_VALUES largest magnitudes, largest first: float32 [n] values and int64 [n, 4]
            (sequence, position, token id, channel).
        range_at: float32 [LENGTHS], max|x| over positions below FIRST_LENGTH, then between each power of two and the
            next: its running maximum is the range of a text cut to 128, 256, 512 … tokens.
        sequences, sequence_amax: int64 [S] and float32 [S], max|x| of every sequence, by its number.
        gram: float64 [C, C] XᵀX, or [0, 0] where it was not asked for.
        picture: float32, at most PICTURE: max|x| over bins of ceil(T / 48) positions × ceil(C / 64) channels of the
            text's sequence 0; [0, 0] in a part that does not hold it.
    """

    channel_sum: Array
    channel_square: Array
    channel_low: Array
    channel_high: Array
    channel_ordinary: Array
    rows: Array
    powers: Array
    ordinary: Array
    spikes: Array
    ratios: Array
    errors: Array
    top_values: Array
    top_places: Array
    range_at: Array
    sequences: Array
    sequence_amax: Array
    gram: Array
    picture: Array

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of both parts together."""
        merged: dict[str, Array] = {}
        for name, combine in _COMBINE.items():
            merged[name] = combine(getattr(self, name), getattr(other, name))
        ratios = self.ratios + other.ratios
        ratios[:, 2] = np.maximum(self.ratios[:, 2], other.ratios[:, 2])
        values = np.concatenate([self.top_values, other.top_values])
        places = np.concatenate([self.top_places, other.top_places])
        order = top_order(values, places)
        sequences = np.concatenate([self.sequences, other.sequences])
        by_number = np.argsort(sequences, kind="stable")
        return SiteStatistics(
            **merged,
            picture=self.picture if self.picture.size else other.picture,
            ratios=ratios,
            top_values=values[order],
            top_places=places[order],
            sequences=sequences[by_number],
            sequence_amax=np.concatenate([self.sequence_amax, other.sequence_amax])[by_number],
        )

    @property
    def width(self) -> int:
        """C."""
        return len(self.channel_low)

    @property
    def tokens(self) -> int:
        """Rows seen."""
        return int(self.rows.sum())

    @property
    def count(self) -> int:
        """Values seen."""
        return self.tokens * self.width

    @property
    def low(self) -> float:
        """The smallest value."""
        return float(self.channel_low.min())

    @property
    def high(self) -> float:
        """The largest value."""
        return float(self.channel_high.max())

    @cached_property
    def channel_amax(self) -> Array:
        """max|x| per channel [C] float32."""
        return np.maximum(-self.channel_low, self.channel_high)

    @property
    def amax(self) -> float:
        """max|x|."""
        return float(self.channel_amax.max())

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return float(self.channel_sum.sum() / self.count)

    @property
    def second_moment(self) -> float:
        """The mean of the squares."""
        return float(self.channel_square.sum() / self.count)

    @property
    def std(self) -> float:
        """The standard deviation of all values."""
        return float(max(self.second_moment - self.mean**2, 0.0) ** 0.5)

    @property
    def kurtosis(self) -> float:
        """The fourth central moment over the squared variance: 3 for a normal distribution, 0 for a constant; from
        sampled ordinary rows and all spikes."""
        mean, square = self.mean, self.second_moment
        cube, fourth = ((self.powers[0] * self.sampled_once_in + self.powers[1]) / self.count).tolist()
        variance = square - mean**2
        moment = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        return moment / variance**2 if variance > 0 else 0.0

    @property
    def crest(self) -> float:
        """max|x| over the root mean square."""
        return self.amax / self.second_moment**0.5 if self.second_moment > 0 else 0.0

    @property
    def ratio_max(self) -> float:
        """The largest max|x| / median|x| among the tokens looked at."""
        return float(self.ratios[:, 2].max())

    @cached_property
    def histogram(self) -> Array:
        """float64 [BINS]: the estimated number of values in every bin, spikes and ordinary rows together; the
        sampled ordinary rows are scaled up to all."""
        return self.ordinary * self.sampled_once_in + self.spikes

    @property
    def sampled_once_in(self) -> float:
        """Ordinary rows to those whose magnitudes were counted; 0.0 when none was."""
        seen = int(self.ordinary.sum())
        return int(self.rows[0]) * self.width / seen if seen else 0.0

    def quantile(self, share: float) -> float:
        """The |x| below which `share` of all values lie, to the resolution of `magnitudes`."""
        return min(quantile(self.histogram, share), self.amax)


def top_order(values: Array, places: Array) -> Array:
    """Indices of the TOP_VALUES largest magnitudes, largest first; ties by sequence, position, channel."""
    return np.lexsort((places[:, 3], places[:, 1], places[:, 0], -np.abs(values)))[:TOP_VALUES]


def empty_histogram() -> Array:
    """int64 [BINS] zeros."""
    return np.zeros(BINS, dtype=np.int64)


_COMBINE: Mapping[str, Any] = {
    "channel_sum": np.add,
    "channel_square": np.add,
    "channel_low": np.minimum,
    "channel_high": np.maximum,
    "channel_ordinary": np.maximum,
    "rows": np.add,
    "powers": np.add,
    "ordinary": np.add,
    "spikes": np.add,
    "errors": np.add,
    "range_at": np.maximum,
    "gram": np.add,
}
FIELDS = tuple(field.name for field in fields(SiteStatistics))
