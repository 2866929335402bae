"""Site statistics of small arrays, computed the plain way: the reference for whatever is computed in a faster one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qtool.quantize.artifacts.magnitudes import bin_of
from qtool.quantize.artifacts.site_statistics import (
    DYNAMIC_CANDIDATES,
    FIRST_LENGTH,
    LENGTHS,
    MASSIVE_MAGNITUDE,
    MASSIVE_RATIO,
    SPIKE_RATIO,
    SiteStatistics,
    empty_histogram,
    top_order,
)

Values = npt.NDArray[np.float32]
SiteOf = Callable[..., SiteStatistics]


def plain_site(values: Values, *, first_sequence: int = 0, every: int = 1) -> SiteStatistics:
    """The statistics of [S, T, C]; token ids are 1000 + position. `every`: of how many ordinary rows one is sampled.

    Errors of dynamic candidates are made up: candidate k is off by a (k + 1)-hundredth of each value.
    """
    sequences, length, width = values.shape
    double = values.astype(np.float64)
    spikes = np.zeros((sequences, length), dtype=bool)
    histograms = [empty_histogram(), empty_histogram()]
    powers, ratios = np.zeros((2, 2)), np.zeros((2, 4))
    errors = np.zeros((2, 1 + len(DYNAMIC_CANDIDATES), 2))
    range_at = np.zeros(LENGTHS, dtype=np.float32)
    for sequence in range(sequences):
        token_amax = np.abs(values[sequence]).max(axis=1)
        middle = np.median(token_amax)
        for position in range(length):
            row, large = np.abs(values[sequence, position]), token_amax[position]
            kind = int(large > SPIKE_RATIO * middle)
            spikes[sequence, position] = kind
            octave = max(int(np.log2(position / FIRST_LENGTH)) + 1, 0) if position >= FIRST_LENGTH else 0
            range_at[octave] = max(range_at[octave], large)
            if not kind and position % every:
                continue
            np.add.at(histograms[kind], bin_of(row), 1)
            powers[kind] += [(double[sequence, position] ** power).sum() for power in (3, 4)]
            median = float(np.sort(row)[(width - 1) // 2])
            ratio = float(large) / median if median else 0.0
            is_massive = large > MASSIVE_MAGNITUDE and ratio > MASSIVE_RATIO
            ratios[kind, :2] += [1, ratio]
            ratios[kind, 2] = max(ratios[kind, 2], ratio)
            ratios[kind, 3] += is_massive
            sums = np.array([row.sum(dtype=np.float64), (double[sequence, position] ** 2).sum()])
            errors[kind, 0] += sums
            for candidate in range(len(DYNAMIC_CANDIDATES)):
                share = (candidate + 1) / 100
                errors[kind, 1 + candidate] += sums * [share, share**2]
    grid = np.indices(values.shape).reshape(3, -1)
    places = np.stack([grid[0] + first_sequence, grid[1], 1000 + grid[1], grid[2]], axis=1)
    top = top_order(values.reshape(-1), places)
    flat = double.reshape(-1, width)
    ordinary = np.abs(values.reshape(-1, width)[~spikes.reshape(-1)])
    return SiteStatistics(
        powers=powers,
        channel_sum=flat.sum(axis=0),
        channel_square=(flat**2).sum(axis=0),
        channel_low=values.reshape(-1, width).min(axis=0),
        channel_high=values.reshape(-1, width).max(axis=0),
        channel_ordinary=ordinary.max(axis=0, initial=0.0),
        rows=np.array([(~spikes).sum(), spikes.sum()]),
        ordinary=histograms[0],
        spikes=histograms[1],
        ratios=ratios,
        errors=errors,
        top_values=values.reshape(-1)[top],
        top_places=places[top],
        range_at=range_at,
        sequences=np.arange(sequences) + first_sequence,
        sequence_amax=np.abs(values).max(axis=(1, 2)),
        gram=np.zeros((0, 0)),
        picture=np.zeros((0, 0), dtype=np.float32),
    )


@pytest.fixture(scope="session")
def site_of() -> SiteOf:
    """`plain_site`."""
    return plain_site
