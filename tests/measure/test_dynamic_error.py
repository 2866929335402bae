"""Rounding rows with scales found at run time, against the format's values written out."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.site_statistics import DYNAMIC_CANDIDATES, ERROR_BLOCK
from qtool.quantize.measure.dynamic_error import candidate_errors, round_trip

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Round = Callable[[np.ndarray], np.ndarray]


def to_integers(qmax: int) -> Round:
    return lambda scaled: np.clip(np.rint(scaled), -qmax, qmax)


def to_fp8(scaled: np.ndarray) -> np.ndarray:
    return np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def to_fp4(scaled: np.ndarray) -> np.ndarray:
    """The nearest of the 15 values; of two as near, the one whose place in the list is even (its mantissa bit is 0)."""
    rounded = np.empty_like(scaled)
    for index, value in np.ndenumerate(scaled):
        distances = [abs(abs(float(value)) - each) for each in FP4_VALUES]
        nearest = [k for k, distance in enumerate(distances) if distance == min(distances)]
        chosen = nearest[0] if len(nearest) == 1 else next(k for k in nearest if k % 2 == 0)
        rounded[index] = np.copysign(FP4_VALUES[chosen], value)
    return rounded


ROUND: dict[NumericFormat, Round] = {
    INT8: to_integers(127),
    INT4: to_integers(7),
    FP8_E4M3: to_fp8,
    FP4_E2M1: to_fp4,
}


def brute(rows: np.ndarray, fmt: NumericFormat, block: int) -> np.ndarray:
    width = rows.shape[1]
    back = np.empty_like(rows)
    for n in range(len(rows)):
        for start in range(0, width, block or width):
            piece = rows[n, start : start + (block or width)]
            scale = np.abs(piece).max() / np.float32(fmt.qmax)
            scale = scale if scale > 0 else np.float32(1)
            back[n, start : start + len(piece)] = ROUND[fmt](piece / scale) * scale
    return back


@pytest.mark.parametrize("fmt", ROUND, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("block", [0, 16, 64])
@pytest.mark.parametrize("width", [64, 90, 5])
def test_round_trip_equals_the_written_out_one(fmt: NumericFormat, block: int, width: int) -> None:
    rng = np.random.default_rng(width + block)
    rows = rng.standard_normal((12, width)).astype(np.float32) * np.geomspace(1e-6, 1e5, 12, dtype=np.float32)[:, None]
    rows[3] = 0
    rows[4, : width // 2] = 0
    rows[5, 1] = -1e4
    before = rows.copy()
    ours = round_trip(torch.from_numpy(rows), fmt, block).numpy()
    np.testing.assert_array_equal(ours, brute(rows, fmt, block))
    np.testing.assert_array_equal(rows, before)
    assert (ours[3] == 0).all()


@pytest.mark.parametrize("fmt", ROUND, ids=lambda fmt: fmt.name)
def test_values_halfway_between_two_steps(fmt: NumericFormat) -> None:
    # The largest value is qmax, so the scale is 1 and every value below is its own scaled value.
    grid = {
        INT8: np.arange(-127, 128) / 2,
        INT4: np.arange(-14, 15) / 2,
        FP8_E4M3: np.array([17.0, 19.0, 18.5, 2**-10, 3 * 2**-10, 432.0, 2.375, -17.0, 30.99]),
        FP4_E2M1: np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0]),
    }[fmt]
    row = np.concatenate([grid, [fmt.qmax]]).astype(np.float32)[None]
    ours = round_trip(torch.from_numpy(row), fmt, 0).numpy()
    np.testing.assert_array_equal(np.abs(ours), np.abs(brute(row, fmt, 0)))
    np.testing.assert_array_equal(ours[0, :-1], ROUND[fmt](row[0, :-1]))
    assert ours[0, -1] == fmt.qmax


def test_the_largest_magnitude_survives() -> None:
    rows = torch.tensor([[3.7, -11.3, 0.1]])
    for fmt in ROUND:
        assert round_trip(rows, fmt, 0)[0, 1] == pytest.approx(-11.3, rel=1e-6)


def test_the_sums_are_per_candidate_in_their_documented_order() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((9, 150)).astype(np.float32)
    errors = candidate_errors(torch.from_numpy(rows)).numpy()
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(errors[0], [np.abs(exact).sum(), (exact**2).sum()], rtol=1e-12)
    assert [block for _, block in DYNAMIC_CANDIDATES] == [0] * 4 + [ERROR_BLOCK] * 4
    for index, (fmt, block) in enumerate(DYNAMIC_CANDIDATES, start=1):
        off = (brute(rows, fmt, block) - rows).astype(np.float64)
        np.testing.assert_allclose(errors[index], [np.abs(off).sum(), (off**2).sum()], rtol=1e-9)
