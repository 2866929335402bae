"""Expected errors from a histogram against quantizing the data."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, INT4, INT8, NumericFormat
from qtool.quantize.artifacts.magnitudes import BINS, bin_of
from qtool.quantize.measure.analysis.magnitude_density import MagnitudeDensity
from qtool.quantize.measure.analysis.number_grid import number_grid
from qtool.quantize.measure.analysis.quantization_error import (
    absolute_error,
    best_range,
    clip_rate,
    squared_error,
    squared_error_unclipped,
)

Values = npt.NDArray[np.float32]
FORMATS = (INT8, INT4, FP8_E4M3, FP4_E2M1)
CASTS = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp4_e2m1": ml_dtypes.float4_e2m1fn}


def data(kind: str) -> Values:
    rng = np.random.default_rng(3)
    values = {"normal": rng.standard_normal(200_000), "laplace": rng.laplace(size=200_000) * 1e-3}[kind.split(",")[0]]
    if "spikes" in kind:
        values[::200] *= 300
    return values.astype(np.float32)


def density(values: Values) -> MagnitudeDensity:
    magnitudes = np.abs(values)
    return MagnitudeDensity(np.bincount(bin_of(magnitudes), minlength=BINS), float(magnitudes.max()))


def quantized(values: Values, fmt: NumericFormat, scale: float) -> npt.NDArray[np.float64]:
    units = np.clip(values.astype(np.float64) / scale, -fmt.qmax, fmt.qmax)
    on_grid = np.rint(units) if fmt.kind == "int" else units.astype(np.float32).astype(CASTS[fmt.name])
    return np.asarray(on_grid, dtype=np.float64) * scale


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("kind", ["normal", "laplace", "normal, spikes", "laplace, spikes"])
def test_as_if_quantized(kind: str, fmt: NumericFormat) -> None:
    values = data(kind)
    magnitudes, seen, grid = np.abs(values).astype(np.float64), density(values), number_grid(fmt)
    ranges = magnitudes.max() * np.geomspace(1.0, 1e-3, 8)
    scales = ranges / fmt.qmax
    errors = np.stack([quantized(values, fmt, scale) - values for scale in scales])
    # FP8 at the maximum errs by little but the few largest values' own errors, which stand anywhere between two codes.
    close = 0.1 if "spikes" in kind and fmt is FP8_E4M3 else 0.03
    assert squared_error(seen, grid, scales) == pytest.approx((errors**2).sum(axis=1), rel=close)
    assert absolute_error(seen, grid, scales) == pytest.approx(np.abs(errors).sum(axis=1), rel=0.02)
    clipped = [(magnitudes > width).mean() for width in ranges]
    assert clip_rate(seen, ranges) == pytest.approx(clipped, rel=0.02, abs=2e-5)


def test_grids() -> None:
    assert number_grid(FP4_E2M1).levels.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert number_grid(FP4_E2M1).cuts.tolist() == [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    assert number_grid(INT4).levels.tolist() == list(range(8))
    fp8 = number_grid(FP8_E4M3).levels
    assert (len(fp8), fp8[-1], fp8[1], fp8[8]) == (127, 448, 2**-9, 2**-6)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_no_range_tried_is_better_than_the_best(fmt: NumericFormat) -> None:
    values = data("normal, spikes")
    seen, grid, high = density(values), number_grid(fmt), float(np.abs(values).max())
    best = best_range(seen, grid, 0.5, high)
    tried = np.geomspace(0.5, high, 2000)
    least = squared_error(seen, grid, tried / fmt.qmax).min()
    assert squared_error(seen, grid, np.array([best]) / fmt.qmax)[0] <= least * 1.01


def test_int4_clips_a_normal_distribution_where_the_literature_says() -> None:
    """2.7 to 2.8 standard deviations for the 15 symmetric levels that stand for [-7, 7] steps."""
    values = data("normal")
    best = best_range(density(values), number_grid(INT4), 0.5, float(np.abs(values).max()))
    sweep = np.geomspace(1.5, 4.5, 200)
    brute = min(sweep, key=lambda width: float(((quantized(values, INT4, width / 7) - values) ** 2).sum()))
    assert best == pytest.approx(brute, rel=0.03)
    assert 2.3 < best < 3.1


def test_without_clipping_the_step_alone_counts() -> None:
    values = data("normal")
    scales = np.array([0.01, 0.1, 2.0])
    free = [float(((np.rint(values / scale) * scale - values) ** 2).sum()) for scale in scales]
    assert squared_error_unclipped(density(values), number_grid(INT4), scales) == pytest.approx(free, rel=0.03)


def test_nothing_and_zeros() -> None:
    nothing = MagnitudeDensity(np.zeros(BINS, dtype=np.int64), 0.0)
    zeros = density(np.zeros(5, dtype=np.float32))
    for seen in (nothing, zeros):
        for fmt in FORMATS:
            scales = np.array([0.0, 1.0])
            assert squared_error(seen, number_grid(fmt), scales) == pytest.approx(0, abs=1e-60)
            assert absolute_error(seen, number_grid(fmt), scales) == pytest.approx(0, abs=1e-30)
            assert clip_rate(seen, np.array([1.0])).tolist() == [0.0]
            assert best_range(seen, number_grid(fmt), 0.0, 0.0) == 0.0


def test_known_values_count_exactly() -> None:
    empty = np.zeros(BINS, dtype=np.int64)
    seen = MagnitudeDensity(empty, 7.3, np.array([7.3, 2.6]))
    assert (seen.count, seen.absolute, seen.square) == pytest.approx((2, 9.9, 7.3**2 + 2.6**2))
    scales = np.array([1.0, 7.3 / 7])
    codes = np.clip(np.rint(np.array([[7.3, 2.6]]) / scales[:, None]), 0, 7)
    errors = codes * scales[:, None] - [[7.3, 2.6]]
    assert squared_error(seen, number_grid(INT4), scales) == pytest.approx((errors**2).sum(axis=1))
    assert absolute_error(seen, number_grid(INT4), scales) == pytest.approx(np.abs(errors).sum(axis=1))
    assert clip_rate(seen, np.array([7.3, 7.0])).tolist() == [0.0, 0.5]


def test_nothing_lies_above_the_maximum() -> None:
    """A bin is 6 % wide; without the maximum the density would go on to the end of the last one."""
    seen = density(np.full(100, 1.01, dtype=np.float32))
    assert clip_rate(seen, np.array([1.01])) == pytest.approx(0, abs=1e-6)
    assert seen.absolute == pytest.approx(100 * 1.005, rel=1e-3)
