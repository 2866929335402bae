"""The fitted curve of massive activations over training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qtool.errors import UsageError
from qtool.quantize.measure.analysis.training_dynamics import DynamicsFit, fit_dynamics, stationary_point

STEPS = np.concatenate([2.0 ** np.arange(10), np.arange(1000.0, 144_000, 3000)])


def curve(amplitude: float, decay: float, rate: float, start: float, offset: float) -> npt.NDArray[np.float64]:
    x = rate * STEPS + start
    return amplitude * np.exp(-decay * x) * np.log(x) + offset


PEAKED = {
    "sharp": (500.0, 0.5, 3e-4, 0.5, 20.0),
    "broad": (500.0, 0.1, 3e-4, 1.2, 20.0),
    "early": (800.0, 0.02, 1e-3, 1.5, 100.0),
}


@pytest.mark.parametrize("name", PEAKED)
def test_a_noisy_peak_is_found(name: str) -> None:
    exact = curve(*PEAKED[name])
    noisy = exact + np.random.default_rng(1).standard_normal(len(STEPS)) * 0.01 * np.ptp(exact)
    fit = fit_dynamics(STEPS, noisy)
    assert fit.r_squared > 0.98
    assert np.abs(fit.at(STEPS) - exact).max() < 0.03 * np.ptp(exact)
    _, decay, rate, start, _ = PEAKED[name]
    assert fit.peak_step == pytest.approx((stationary_point(decay) - start) / rate, rel=0.1)
    assert fit_dynamics(STEPS[::-1], noisy[::-1]).peak_step == pytest.approx(fit.peak_step, rel=1e-3)


def test_without_noise_the_parameters_come_back() -> None:
    fit = fit_dynamics(STEPS, curve(*PEAKED["broad"]))
    assert (fit.amplitude, fit.decay, fit.rate, fit.start, fit.offset) == pytest.approx(PEAKED["broad"], rel=0.02)
    assert fit.r_squared == pytest.approx(1)


def test_growth_that_does_not_turn_has_no_peak() -> None:
    exact = curve(300.0, 1e-6, 1e-2, 1.5, 100.0)
    fit = fit_dynamics(STEPS, exact + np.random.default_rng(1).standard_normal(len(STEPS)) * 5)
    assert fit.r_squared > 0.98
    assert fit.peak_step is None


def test_a_trough_is_no_peak() -> None:
    fit = fit_dynamics(STEPS, 1000 - curve(*PEAKED["sharp"]))
    assert fit.r_squared > 0.98
    assert fit.peak_step is None


def test_the_stationary_point_is_where_the_slope_is_zero() -> None:
    assert stationary_point(0.1) == pytest.approx(5.7289, abs=1e-4)
    for decay in (1e-3, 0.1, 2.0, 50.0):
        x = stationary_point(decay)
        assert decay * x * np.log(x) == pytest.approx(1)
        fit = DynamicsFit(amplitude=1, decay=decay, rate=1, start=0, offset=0, r_squared=1, peak_step=None)
        around = fit.at(x * np.array([0.99, 1.0, 1.01]))
        assert around[1] == around.max()


def test_awkward_series() -> None:
    constant = fit_dynamics(STEPS, np.full(len(STEPS), 7.0))
    assert constant.at(STEPS) == pytest.approx(np.full(len(STEPS), 7.0))
    assert np.isfinite([constant.amplitude, constant.r_squared]).all()
    noise = fit_dynamics(STEPS, np.random.default_rng(0).standard_normal(len(STEPS)))
    assert np.isfinite(noise.at(STEPS)).all() and 0 <= noise.r_squared < 0.6
    with pytest.raises(UsageError, match="6 checkpoints"):
        fit_dynamics(np.array([1, 2, 3, 4, 5, 5]), np.arange(6))
