"""Predicted output errors of random linears against measured ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr

from qtool.quantize.artifacts.formats import INT4, INT8, NumericFormat
from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.prediction import predict_output_error, spread_error
from qtool.quantize.measure.analysis.quantization_error import static_mse

Floats = npt.NDArray[np.float64]
SiteOf = Callable[..., SiteStatistics]
TOKENS, WIDTH, OUTPUTS = 192, 64, 48


def round_trip(values: Floats, largest: Floats, qmax: float) -> Floats:
    scale = largest / qmax
    return np.clip(np.rint(values / scale), -qmax, qmax) * scale


def predicted_and_measured(seed: int, fmt: NumericFormat, outliers: float, site_of: SiteOf) -> tuple[float, float]:
    """One linear with `outliers` times larger channels, W per output channel, A static per tensor."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(WIDTH) + 0.04 * rng.standard_normal((WIDTH, WIDTH))
    values = rng.standard_normal((TOKENS, WIDTH)) @ mixing
    values[:, rng.permutation(WIDTH)[:2]] *= outliers
    values = values.astype(np.float32).astype(np.float64)
    weight = rng.standard_normal((OUTPUTS, WIDTH)) / 8
    quantized = round_trip(weight, np.abs(weight).max(axis=1, keepdims=True), fmt.qmax)
    output = values @ weight.T
    read, written = (site_of(part.astype(np.float32)[None]) for part in (values, output))
    mse = float(static_mse(read, fmt, np.array([read.amax]))[0])
    wrong = round_trip(values, np.array(read.amax), fmt.qmax) @ quantized.T - output
    measured = float((wrong**2).sum() / (output**2).sum())
    return predict_output_error(weight, quantized - weight, read, written, mse), measured


@pytest.mark.parametrize("seed", range(4))
def test_w8a8_of_normal_data(seed: int, site_of: SiteOf) -> None:
    predicted, measured = predicted_and_measured(seed, INT8, 1.0, site_of)
    assert predicted == pytest.approx(measured, rel=0.1)


def test_w4a4_ranks_layers_of_different_outliers(site_of: SiteOf) -> None:
    strengths = np.geomspace(1, 40, 20)
    pairs = [predicted_and_measured(seed, INT4, strength, site_of) for seed, strength in enumerate(strengths)]
    predicted, measured = np.array(pairs).T
    assert spearmanr(predicted, measured).statistic > 0.95
    assert predicted == pytest.approx(measured, rel=0.2)


def test_weights_alone_and_an_output_of_zeros(site_of: SiteOf) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 64, 8)).astype(np.float32)
    weight = rng.standard_normal((4, 8))
    output = site_of((values @ weight.T).astype(np.float32))
    off = 0.1 * weight
    # A weight that is a tenth too large everywhere makes the output a tenth too large; channels are not quite white.
    assert predict_output_error(weight, off, site_of(values), output, 0.0) == pytest.approx(0.01, rel=0.3)
    nothing = site_of(np.zeros((1, 64, 4), dtype=np.float32))
    assert predict_output_error(weight, off, site_of(values), nothing, 1.0) == 0.0


def test_error_is_spread_like_water() -> None:
    moments = np.array([5.0, 0.5, 2.0, 0.0])
    for mean in (0.0, 0.3, 0.875, 1.5):
        error = spread_error(moments, mean)
        assert error.mean() == pytest.approx(mean)
        assert (error <= moments).all()
        unfilled = error[error < moments - 1e-12]
        assert np.ptp(unfilled) < 1e-12
        assert error.max() == pytest.approx(unfilled.max())
    assert spread_error(moments, 99.0).tolist() == moments.tolist()
    assert spread_error(np.zeros(3), 0.0).tolist() == [0.0] * 3
