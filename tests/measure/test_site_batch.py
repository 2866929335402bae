"""One site on one batch, against plain loops in numpy over every value."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, NumericFormat
from qtool.quantize.artifacts.magnitudes import EDGES
from qtool.quantize.artifacts.site_statistics import (
    DYNAMIC_CANDIDATES,
    LENGTHS,
    PICTURE,
    TOP_VALUES,
    SiteStatistics,
)
from qtool.quantize.artifacts.statistics import Sampling
from qtool.quantize.measure import site_batch
from qtool.quantize.measure.places import Places
from qtool.quantize.measure.site_batch import statistics_of

ALL = Sampling(histogram=1, median=1, error=1)


def places_of(numbers: list[int], length: int) -> Places:
    tokens = np.random.default_rng(1).integers(0, 500, (len(numbers), length))
    return Places.of(np.array(numbers), tokens, ALL)


def heavy(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows with spikes, massive rows, ties and zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, width)).astype(np.float32)
    values[rng.integers(rows, size=rows // 12), rng.integers(width, size=rows // 12)] = 4096.0
    values[rng.integers(rows, size=rows // 12), rng.integers(width, size=rows // 12)] = -77.0
    values[rows // 2] = 0
    values[rows // 3, : width // 2 + 1] = 0  # its median is 0
    return values


def spikes_of(values: np.ndarray, places: Places) -> np.ndarray:
    """[n] bool: max|x| above 16 × the lower median of the sequence's row maxima."""
    largest = np.abs(values).max(axis=1)
    spikes = np.zeros(len(values), dtype=bool)
    for number in np.unique(places.sequence):
        mine = np.flatnonzero(places.sequence == number)
        middle = np.sort(largest[mine])[(len(mine) - 1) // 2]
        spikes[mine] = largest[mine] > 16 * middle
    return spikes


def on_grid(scaled: np.ndarray, fmt: NumericFormat) -> np.ndarray:
    if fmt.kind == "int":
        return np.clip(np.rint(scaled), -fmt.qmax, fmt.qmax)
    kind = ml_dtypes.float4_e2m1fn if fmt is FP4_E2M1 else ml_dtypes.float8_e4m3fn
    assert fmt in (FP4_E2M1, FP8_E4M3)
    return np.clip(scaled, -fmt.qmax, fmt.qmax).astype(kind).astype(np.float32)


def error_sums(row: np.ndarray, fmt: NumericFormat, block: int) -> np.ndarray:
    total = np.zeros(2)
    for start in range(0, len(row), block or len(row)):
        piece = row[start : start + (block or len(row))]
        scale = np.abs(piece).max() / np.float32(fmt.qmax) or np.float32(1)
        off = (on_grid(piece / scale, fmt) * scale - piece).astype(np.float64)
        total += [np.abs(off).sum(), (off**2).sum()]
    return total


def check(values: np.ndarray, places: Places, site: SiteStatistics, *, errors: bool = True) -> None:
    """Every field of `site` against loops over `values`."""
    rows, width = values.shape
    exact = values.astype(np.float64)
    spikes = spikes_of(values, places)
    assert site.rows.tolist() == [int((~spikes).sum()), int(spikes.sum())]
    absolute = np.abs(exact).sum(axis=0)
    np.testing.assert_allclose(site.channel_sum, exact.sum(axis=0), rtol=0, atol=2e-6 * absolute.max())
    np.testing.assert_allclose(site.channel_square, (exact**2).sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(site.channel_low, values.min(axis=0))
    np.testing.assert_array_equal(site.channel_high, values.max(axis=0))
    np.testing.assert_array_equal(site.channel_ordinary, np.abs(values[~spikes]).max(axis=0, initial=0))

    for kind, which in enumerate((~spikes, spikes)):
        counts = (site.ordinary, site.spikes)[kind]
        brute = np.zeros(len(counts), dtype=np.int64)
        np.add.at(brute, np.searchsorted(EDGES, np.abs(exact[which]).ravel(), side="right") - 1, 1)
        np.testing.assert_array_equal(counts, brute)
        for index, power in enumerate((3, 4)):
            size = (np.abs(exact[which]) ** power).sum()
            assert site.powers[kind, index] == pytest.approx((exact[which] ** power).sum(), abs=1e-5 * size)
        looked, total, largest, massive = 0, 0.0, 0.0, 0
        for row in np.abs(values[which]):
            median = np.sort(row)[(width - 1) // 2]
            ratio = row.max() / median if median > 0 else 0.0
            looked, total, largest = looked + 1, total + ratio, max(largest, ratio)
            massive += bool(row.max() > 100 and ratio > 1000)
        assert site.ratios[kind].tolist() == pytest.approx([looked, total, largest, massive], rel=1e-5)
        wanted = np.zeros((1 + len(DYNAMIC_CANDIDATES), 2))
        if errors:
            for row in values[which]:
                wanted[0] += [np.abs(row).sum(dtype=np.float64), (row.astype(np.float64) ** 2).sum()]
                for index, (fmt, block) in enumerate(DYNAMIC_CANDIDATES, start=1):
                    wanted[index] += error_sums(row, fmt, block)
        np.testing.assert_allclose(site.errors[kind], wanted, rtol=1e-6, atol=1e-6)

    everything = [
        (-abs(float(values[n, c])), int(places.sequence[n]), int(places.position[n]), c, n)
        for n in range(rows)
        for c in range(width)
    ]
    top = sorted(everything)[:TOP_VALUES]
    assert site.top_values.tolist() == [float(values[n, c]) for *_, c, n in top]
    assert site.top_places.tolist() == [[s, p, int(places.token[n]), c] for _, s, p, c, n in top]

    lengths = np.zeros(LENGTHS, dtype=np.float32)
    for n in range(rows):
        octave = next(k for k in range(LENGTHS) if places.position[n] < 128 * 2**k)
        lengths[octave] = max(lengths[octave], np.abs(values[n]).max())
    np.testing.assert_array_equal(site.range_at, lengths)
    numbers = np.unique(places.sequence)
    np.testing.assert_array_equal(site.sequences, numbers)
    maxima = [np.abs(values[places.sequence == number]).max() for number in numbers]
    np.testing.assert_array_equal(site.sequence_amax, np.array(maxima, dtype=np.float32))
    np.testing.assert_array_equal(site.picture, picture_of(values[places.sequence == 0]))


def picture_of(values: np.ndarray) -> np.ndarray:
    if not len(values):
        return np.zeros((0, 0), dtype=np.float32)
    tall, wide = (-(-size // limit) for size, limit in zip(values.shape, PICTURE, strict=True))
    rows = range(0, values.shape[0], tall)
    columns = range(0, values.shape[1], wide)
    return np.array([[np.abs(values[a : a + tall, b : b + wide]).max() for b in columns] for a in rows])


@pytest.mark.parametrize(
    ("numbers", "length", "width"),
    [([0], 40, 33), ([0, 1, 2], 30, 64), ([4, 9], 50, 7), ([0, 3], 1, 130), ([0], 300, 3), ([0, 1], 49, 65)],
)
def test_every_field_against_plain_loops(numbers: list[int], length: int, width: int) -> None:
    values = heavy(len(numbers) * length, width) if length > 1 else heavy(12, width)[:2]
    places = places_of(numbers, length)
    site = statistics_of(torch.from_numpy(values), places, "input", gram=True)
    check(values, places, site)
    exact = values.astype(np.float64)
    np.testing.assert_allclose(site.gram, exact.T @ exact, rtol=1e-5, atol=1e-5 * np.abs(site.gram).max())


def test_rows_of_unequal_sequences_as_an_expert_gets_them() -> None:
    whole = places_of([0, 1, 5, 6], 40)
    rng = np.random.default_rng(4)
    rows = np.sort(np.concatenate([rng.choice(40, 30, replace=False), [41], 80 + rng.choice(80, 33, replace=False)]))
    places = whole.take(rows)
    values = heavy(len(rows), 20, seed=9)
    check(values, places, statistics_of(torch.from_numpy(values), places, "input"))


@pytest.mark.parametrize("shape", [(2, 2**18 + 5), (5, 2**17 + 1)])
def test_a_width_larger_than_a_piece(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(8).standard_normal(shape).astype(np.float32)
    values[1, -1], values[0, 77] = -9e4, 300.0
    places = places_of([0], shape[0])
    site = statistics_of(torch.from_numpy(values), places, "output")
    exact = values.astype(np.float64)
    np.testing.assert_array_equal(site.channel_low, values.min(axis=0))
    np.testing.assert_array_equal(site.channel_high, values.max(axis=0))
    assert site.second_moment == pytest.approx((exact**2).mean(), rel=1e-5)
    assert site.powers[:, 1].sum() == pytest.approx((exact**4).sum(), rel=1e-5)
    np.testing.assert_allclose(site.channel_square, (exact**2).sum(axis=0), rtol=1e-5)
    order = np.lexsort((np.arange(values.size), -np.abs(values).ravel()))[:TOP_VALUES]
    assert site.top_values.tolist() == values.ravel()[order].tolist()
    assert site.top_places[:, 3].tolist() == (order % shape[1]).tolist()
    assert int((site.ordinary + site.spikes).sum()) == values.size


@pytest.mark.parametrize("piece", [1, 100, 1000])
def test_the_size_of_a_piece_changes_nothing_but_rounding(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_batch, "PIECE_VALUES", piece)
    monkeypatch.setattr(site_batch, "PIECE_ROWS", 1)
    values, places = heavy(120, 30), places_of([0, 1, 2], 40)
    check(values, places, statistics_of(torch.from_numpy(values), places, "input"))


def test_outputs_are_not_quantized() -> None:
    values, places = heavy(60, 16), places_of([0, 1], 30)
    site = statistics_of(torch.from_numpy(values), places, "output")
    assert not site.errors.any()
    check(values, places, site, errors=False)


def test_all_ties_and_a_bound_from_earlier_batches() -> None:
    values = np.ones((40, 9), dtype=np.float32)
    values[::3] *= -1
    places = places_of([2, 3], 20)
    check(values, places, statistics_of(torch.from_numpy(values), places, "cache"))
    values[7, 4] = 3
    bounded = statistics_of(torch.from_numpy(values), places, "cache", at_least=1.5)
    assert bounded.top_values.tolist() == [3.0]
    # A tie with the bound may still come earlier in the text than what is listed.
    assert len(statistics_of(torch.from_numpy(values), places, "cache", at_least=1.0).top_values) == TOP_VALUES


def test_which_rows_are_looked_at_when_rows_are_sampled() -> None:
    values = heavy(300, 12)
    tokens = np.zeros((3, 100), dtype=np.int64)
    places = Places.of(np.arange(3), tokens, Sampling(histogram=8, median=16, error=64))
    stream = statistics_of(torch.from_numpy(values), places, "stream")
    sampled = statistics_of(torch.from_numpy(values), places, "input")
    spikes = spikes_of(values, places)
    assert spikes.any()
    for site, chosen in ((stream, places.for_histogram), (sampled, places.for_median)):
        ordinary = int((~spikes[chosen.numpy()]).sum())
        assert 0 < ordinary < site.rows[0]
        assert site.ratios[:, 0].tolist() == [ordinary, spikes.sum()]  # spikes are all looked at
    mine = places.for_error.numpy()
    rows = values[mine[~spikes[mine]]].astype(np.float64)
    np.testing.assert_allclose(sampled.errors[0, 0], [np.abs(rows).sum(), (rows**2).sum()], rtol=1e-9)
    assert sampled.ordinary.sum() == 12 * (~spikes[places.for_histogram.numpy()]).sum()


def test_values_are_left_as_they_were() -> None:
    values = torch.from_numpy(heavy(60, 16))
    before = values.clone()
    statistics_of(values, places_of([0, 1], 30), "input", gram=True)
    assert torch.equal(values, before)


def test_values_that_are_not_contiguous() -> None:
    wide = torch.from_numpy(heavy(60, 32))
    values, places = wide[:, 5:16], places_of([0, 1], 30)
    check(values.numpy(), places, statistics_of(values, places, "input"))
