"""The magnitude histogram: every magnitude in the bin whose edges enclose it, quantiles to within a bin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.quantize.artifacts.magnitudes import BINS, BINS_PER_OCTAVE, EDGES, bin_of, quantile


def counted(values: np.ndarray) -> np.ndarray:
    return np.bincount(bin_of(np.abs(values).astype(np.float32)), minlength=BINS)


@given(st.lists(st.floats(0, width=32, allow_infinity=False, allow_nan=False), min_size=1, max_size=50))
def test_a_magnitude_lies_between_the_edges_of_its_bin(magnitudes: list[float]) -> None:
    values = np.array(magnitudes, dtype=np.float32)
    bins = bin_of(values)
    assert (EDGES[bins] <= values).all()
    assert (values < EDGES[bins + 1]).all()


def test_every_bin_begins_at_its_edge() -> None:
    edges = EDGES[:-1].astype(np.float32)
    brute = np.searchsorted(EDGES, edges.astype(np.float64), side="right") - 1
    np.testing.assert_array_equal(bin_of(edges), brute)
    np.testing.assert_array_equal(bin_of(edges), np.arange(len(edges)))
    just_below = np.nextafter(edges[1:], np.float32(0))
    np.testing.assert_array_equal(bin_of(just_below), np.arange(len(edges) - 1))
    assert (np.diff(EDGES) > 0).all()


def test_zero_subnormals_and_the_largest_float() -> None:
    special = np.array([0.0, 1e-45, 1e-40, np.finfo(np.float32).tiny, 1.0, np.finfo(np.float32).max], dtype=np.float32)
    bins = bin_of(special)
    assert bins[0] == bins[1] == 0
    assert bins[3] == BINS_PER_OCTAVE  # the first octave holds what is not normal
    assert EDGES[bins[4]] == 1.0
    assert bins[5] == len(EDGES) - 2
    assert EDGES[-1] == 2.0**128
    assert np.isfinite(quantile(counted(special[-1:]), 0.0))


def test_bins_are_16_to_an_octave_and_at_most_a_sixteenth_wide() -> None:
    inside = EDGES[(EDGES >= 1) & (EDGES < 2)]
    assert len(inside) == BINS_PER_OCTAVE
    normal = EDGES[BINS_PER_OCTAVE:]
    growth = normal[1:] / normal[:-1]
    assert growth.min() > 1 + 1 / 32 and growth.max() <= 1 + 1 / 16


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("shape", ["normal", "heavy", "uniform"])
def test_a_quantile_is_numpys_to_within_a_bin(share: float, shape: str) -> None:
    rng = np.random.default_rng(7)
    values = {
        "normal": rng.standard_normal(20_000),
        "heavy": rng.standard_t(2, 20_000) * 50,
        "uniform": rng.uniform(-3, 3, 20_000),
    }[shape].astype(np.float32)
    wanted = float(np.quantile(np.abs(values), share, method="inverted_cdf"))
    index = int(bin_of(np.array([wanted], dtype=np.float32))[0])
    width = EDGES[index + 1] - EDGES[index]
    assert quantile(counted(values), share) == pytest.approx(wanted, abs=width)


def test_quantiles_inside_one_bin_are_linear() -> None:
    counts = np.zeros(BINS, dtype=np.int64)
    index = int(bin_of(np.array([1.0], dtype=np.float32))[0])
    counts[index] = 4
    assert [quantile(counts, share) for share in (0.25, 0.5, 1.0)] == [1 + 1 / 64, 1 + 1 / 32, 1 + 1 / 16]


def test_an_empty_histogram_has_quantile_zero() -> None:
    assert quantile(np.zeros(BINS, dtype=np.int64), 0.5) == 0.0


def test_quantiles_of_zeros_stay_in_the_lowest_bin() -> None:
    counts = counted(np.zeros(10, dtype=np.float32))
    assert 0 <= quantile(counts, 0.5) <= EDGES[1]
