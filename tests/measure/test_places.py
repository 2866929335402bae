"""Where rows stand, and the sampling that depends on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from qtool.quantize.artifacts.statistics import Sampling
from qtool.quantize.measure.places import Places

SAMPLING = Sampling(histogram=8, median=16, error=64)
KINDS = ("for_histogram", "for_median", "for_error")


def chosen(places: Places, kind: str) -> set[tuple[int, int]]:
    rows = getattr(places, kind).numpy()
    return set(zip(places.sequence[rows].tolist(), places.position[rows].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_does_not_depend_on_the_batch_cut(kind: str) -> None:
    tokens = np.arange(24 * 100).reshape(24, 100)
    whole = chosen(Places.of(np.arange(24), tokens, SAMPLING), kind)
    for size in (1, 5, 24):
        parts: set[tuple[int, int]] = set()
        for start in range(0, 24, size):
            numbers = np.arange(start, min(start + size, 24))
            parts |= chosen(Places.of(numbers, tokens[numbers], SAMPLING), kind)
        assert parts == whole
    scattered = np.array([3, 7, 20])
    assert chosen(Places.of(scattered, tokens[scattered], SAMPLING), kind) == {p for p in whole if p[0] in (3, 7, 20)}


def test_sampling_does_not_depend_on_the_tokens_or_the_rows_beside() -> None:
    rng = np.random.default_rng(0)
    places = Places.of(np.arange(6), rng.integers(0, 99, (6, 50)), SAMPLING)
    other = Places.of(np.arange(6), rng.integers(0, 99, (6, 50)), SAMPLING)
    rows = np.sort(rng.choice(300, 90, replace=False))
    taken = places.take(rows)
    there = set(zip(taken.sequence.tolist(), taken.position.tolist(), strict=True))
    for kind in KINDS:
        assert chosen(places, kind) == chosen(other, kind)
        assert chosen(taken, kind) == chosen(places, kind) & there


@pytest.mark.parametrize(("kind", "share"), [("for_histogram", 8), ("for_median", 16), ("for_error", 64)])
def test_about_one_row_in_n_is_chosen_from_everywhere(kind: str, share: int) -> None:
    places = Places.of(np.arange(200), np.zeros((200, 512), dtype=np.int64), SAMPLING)
    rows = getattr(places, kind).numpy()
    wanted = len(places) / share
    assert abs(len(rows) - wanted) < 5 * wanted**0.5
    for axis in (places.sequence, places.position):
        counts = np.bincount(axis[rows] // 8)
        expected = wanted / len(counts)
        assert np.abs(counts - expected).max() < 6 * expected**0.5 + 1  # no band is favoured or left out


def test_every_row_of_a_short_text_is_chosen() -> None:
    places = Places.of(np.arange(4), np.zeros((4, 512), dtype=np.int64), Sampling.for_tokens(2048))
    for kind in KINDS:
        np.testing.assert_array_equal(getattr(places, kind).numpy(), np.arange(2048))
    assert Sampling.for_tokens(2049).histogram > 1


def test_spans_are_the_runs_of_equal_sequences() -> None:
    places = Places.of(np.array([2, 5, 9]), np.arange(12).reshape(3, 4), SAMPLING)
    assert places.spans == [(2, 0, 4), (5, 4, 8), (9, 8, 12)]
    some = places.take(np.array([1, 3, 8, 9, 11]))
    assert some.spans == [(2, 0, 2), (9, 2, 5)]
    assert some.take(np.array([2, 4])).spans == [(9, 0, 2)]
    assert some.token.tolist() == [1, 3, 8, 9, 11]
    assert some.position.tolist() == [1, 3, 0, 1, 3]


def test_sequence_zero_has_a_span() -> None:
    assert Places.of(np.array([0]), np.zeros((1, 3), dtype=np.int64), SAMPLING).spans == [(0, 0, 3)]
