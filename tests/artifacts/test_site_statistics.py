"""Merging parts of a text gives the whole; derived numbers agree with numpy in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.quantize.artifacts.magnitudes import EDGES, bin_of
from qtool.quantize.artifacts.site_statistics import FIELDS, TOP_VALUES, SiteStatistics
from qtool.quantize.artifacts.statistics import Sampling
from qtool.quantize.measure.places import Places
from qtool.quantize.measure.site_batch import statistics_of

SUMS = ("powers", "channel_sum", "channel_square", "errors", "gram")
ALL = Sampling(histogram=1, median=1, error=1)
SOME = Sampling(histogram=2, median=3, error=2)


def part(values: np.ndarray, numbers: list[int], sampling: Sampling = ALL) -> SiteStatistics:
    """The statistics of the sequences `numbers` of values [S, T, C]."""
    tokens = np.arange(values.shape[0] * values.shape[1]).reshape(values.shape[:2])
    chosen = np.array(numbers)
    rows = torch.from_numpy(np.ascontiguousarray(values[chosen].reshape(-1, values.shape[2])))
    return statistics_of(rows, Places.of(chosen, tokens[chosen], sampling), "input", gram=True)


def made(seed: int, coarse: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((8, 12, 7)).astype(np.float32)
    if coarse:
        values = (values * 2).round()  # many ties
    for _ in range(3):
        values[rng.integers(8), rng.integers(12), rng.integers(7)] = rng.choice([-400.0, 300.0])
    return values


def assert_same(merged: SiteStatistics, whole: SiteStatistics) -> None:
    for name in FIELDS:
        ours, theirs = getattr(merged, name), getattr(whole, name)
        assert ours.dtype == theirs.dtype, name
        if name in SUMS:
            size = np.abs(theirs).max() if theirs.size else 0.0
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * size, err_msg=name)
        elif name == "ratios":
            np.testing.assert_array_equal(ours[:, [0, 2, 3]], theirs[:, [0, 2, 3]])
            np.testing.assert_allclose(ours[:, 1], theirs[:, 1], rtol=1e-12)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def merged_at_random(parts: list[SiteStatistics], rng: np.random.Generator) -> SiteStatistics:
    """Any two, in any order, until one is left."""
    left = list(parts)
    while len(left) > 1:
        one = left.pop(int(rng.integers(len(left))))
        other = left.pop(int(rng.integers(len(left))))
        left.append(one.merge(other))
    return left[0]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), owner=st.lists(st.integers(0, 3), min_size=8, max_size=8), coarse=st.booleans())
def test_parts_merge_in_any_order_and_association(seed: int, owner: list[int], coarse: bool) -> None:
    values = made(seed, coarse)
    groups = [[s for s in range(8) if owner[s] == k] for k in sorted(set(owner))]
    for sampling in (ALL, SOME):
        parts = [part(values, group, sampling) for group in groups]
        rng = np.random.default_rng(seed)
        forward = reduce(SiteStatistics.merge, parts)
        assert_same(merged_at_random(parts, rng), forward)
        assert_same(merged_at_random(parts, rng), forward)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), owner=st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_parts_merge_to_the_whole(seed: int, owner: list[int]) -> None:
    # Small integers, so that the float32 sums inside a batch and XᵀX are exact however the rows are cut.
    values = (np.random.default_rng(seed).integers(-4, 5, (8, 12, 7))).astype(np.float32)
    values[seed % 8, 3, 2] = 250
    groups = [[s for s in range(8) if owner[s] == k] for k in sorted(set(owner))]
    for sampling in (ALL, SOME):
        parts = [part(values, group, sampling) for group in groups]
        assert_same(merged_at_random(parts, np.random.default_rng(seed)), part(values, list(range(8)), sampling))


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (3.0, 0.5), (-0.2, 40.0)])
def test_derived_numbers_agree_with_numpy(shift: float, scale: float) -> None:
    rng = np.random.default_rng(11)
    values = (rng.standard_normal((6, 64, 24)) * scale + shift).astype(np.float32)
    values[2, 5, 9] = -90 * scale
    site = part(values, list(range(6)))
    exact = values.astype(np.float64)
    mean, variance = exact.mean(), exact.var()
    assert site.count == exact.size and site.tokens == 6 * 64 and site.width == 24
    assert site.mean == pytest.approx(mean, rel=1e-5, abs=1e-6 * scale)
    assert site.std == pytest.approx(variance**0.5, rel=1e-5)
    assert site.kurtosis == pytest.approx(((exact - mean) ** 4).mean() / variance**2, rel=1e-4)
    assert site.second_moment == pytest.approx((exact**2).mean(), rel=1e-5)
    assert site.crest == pytest.approx(np.abs(exact).max() / np.sqrt((exact**2).mean()), rel=1e-5)
    assert (site.low, site.high, site.amax) == (exact.min(), exact.max(), np.abs(exact).max())
    np.testing.assert_array_equal(site.channel_amax, np.abs(values).max(axis=(0, 1)))
    magnitude = np.abs(exact).reshape(-1, 24)
    median = np.sort(magnitude, axis=1)[:, 11]
    assert site.ratio_max == pytest.approx((magnitude.max(axis=1) / median).max(), rel=1e-6)
    for share in (0.1, 0.5, 0.99):
        wanted = float(np.quantile(magnitude, share))
        index = int(bin_of(np.array([wanted], dtype=np.float32))[0])
        assert site.quantile(share) == pytest.approx(wanted, abs=EDGES[index + 1] - EDGES[index])
    assert site.quantile(1.0) == site.amax


def test_the_histogram_scales_sampled_rows_up_to_all() -> None:
    values = made(3, coarse=False)
    sampled, every = part(values, list(range(8)), SOME), part(values, list(range(8)))
    assert sampled.ordinary.sum() < every.ordinary.sum()
    np.testing.assert_array_equal(sampled.spikes, every.spikes)
    assert sampled.histogram.sum() == pytest.approx(every.count)
    np.testing.assert_array_equal(every.histogram, every.ordinary + every.spikes)


def test_known_kurtosis() -> None:
    rng = np.random.default_rng(0)
    assert part(rng.standard_normal((4, 500, 50)).astype(np.float32) + 5, [0, 1, 2, 3]).kurtosis == pytest.approx(
        3, abs=0.06
    )
    assert part(rng.random((4, 500, 50)).astype(np.float32), [0, 1, 2, 3]).kurtosis == pytest.approx(1.8, abs=0.03)


def test_a_site_of_zeros_and_a_constant_site() -> None:
    zeros = part(np.zeros((2, 3, 4), dtype=np.float32), [0, 1])
    derived = (zeros.amax, zeros.mean, zeros.std, zeros.kurtosis, zeros.crest, zeros.ratio_max, zeros.quantile(0.9))
    assert derived == (0,) * 7
    twos = part(np.full((2, 3, 4), -2, dtype=np.float32), [0, 1])
    assert (twos.mean, twos.std, twos.kurtosis, twos.crest, twos.quantile(1.0)) == (-2, 0, 0, 1, 2)


def test_the_top_list_holds_100_and_ties_stand_in_order_of_place() -> None:
    values = np.ones((8, 12, 7), dtype=np.float32)
    values[1::2] = -1
    values[6, 4, 3] = -5
    whole = part(values, [6, 7]).merge(part(values, [4, 0])).merge(part(values, [1, 2]))
    assert len(whole.top_values) == TOP_VALUES
    assert whole.top_values[0] == -5 and whole.top_places[0].tolist() == [6, 4, 6 * 12 + 4, 3]
    places = [tuple(place) for place in whole.top_places[1:, [0, 1, 3]].tolist()]
    everywhere = [(s, p, c) for s in (0, 1, 2, 4, 6, 7) for p in range(12) for c in range(7) if (s, p, c) != (6, 4, 3)]
    assert places == everywhere[: TOP_VALUES - 1]


def test_the_picture_comes_from_the_part_with_the_first_sequence() -> None:
    values = made(1, coarse=False)
    first, second = part(values, [0, 1]), part(values, [2, 3])
    assert second.picture.size == 0
    for merged in (first.merge(second), second.merge(first)):
        np.testing.assert_array_equal(merged.picture, first.picture)


def test_fields_are_not_shared_between_parts_and_their_merge() -> None:
    values = made(5, coarse=False)
    one, other = part(values, [0]), part(values, [1])
    before: dict[str, Any] = {name: getattr(one, name).copy() for name in FIELDS}
    one.merge(other)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), before[name])
    assert_same(one.merge(other), replace(one).merge(replace(other)))
