"""How a layer's massive activations grow while a model is trained (arXiv 2508.03616).

The ratio max|h| / median|h| over the training steps t follows
f(t) = A exp(−λ x) ln x + K with x = γ t + t₀: an early peak and a decay, or a logarithmic growth.

In u = t / longest step the curve is e^(−a u) (p ln(u + b) + q) + K: p, q and K are linear, so the fit searches only
over the decay a = λ γ, the shift b = t₀ / γ, and γ itself, which ties p to q and is kept within bounds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import lambertw

from qtool.errors import UsageError
from qtool.quantize.artifacts.site_statistics import Array
from qtool.quantize.measure.analysis.magnitude_density import Floats

FEWEST_POINTS = 6  # one more than the curve has parameters
# Bounds and starting points of ln a, ln b and ln γ, in units of the longest step; exp(a b) must not overflow.
_BOUNDS = (np.array([-12.0, -14.0, -6.0]), np.array([5.5, 1.0, 14.0]))
_STARTS = tuple(itertools.product((-5.0, 0.0, 2.5), (-7.0, -2.0), (0.0, 3.0, 7.0)))


@dataclass(frozen=True, kw_only=True)
class DynamicsFit:
    """The fitted curve amplitude · exp(−decay · x) · ln x + offset, x = rate · step + start.

    Attributes:
        amplitude, decay, rate, start, offset: A, λ, γ, t₀ and K; decay, rate and start are positive.
        r_squared: the share of the ratios' variance that the curve explains.
        peak_step: where the curve is largest, if that is inside the measured steps and not at their ends; else None.
    """

    amplitude: float
    decay: float
    rate: float
    start: float
    offset: float
    r_squared: float
    peak_step: float | None

    def at(self, steps: Array) -> Floats:
        """The curve at every step."""
        x = self.rate * np.asarray(steps, dtype=np.float64) + self.start
        return self.amplitude * np.exp(-self.decay * x) * np.log(x) + self.offset


def fit_dynamics(steps: Array, ratios: Array) -> DynamicsFit:
    """Fit one layer's curve by least squares, from several starting points; the same numbers give the same fit.

    Args:
        steps: training steps [n], not negative, not all equal, in any order.
        ratios: max|h| / median|h| at these steps [n].

    Raises:
        UsageError: fewer than FEWEST_POINTS different steps.
    """
    steps, ratios = np.asarray(steps, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    different = len(np.unique(steps))
    if different < FEWEST_POINTS:
        why = f"has {different} training steps; the curve has five parameters"
        raise UsageError("the series", why, f"give at least {FEWEST_POINTS} checkpoints")
    longest = float(steps.max())
    unit, size = steps / longest, float(np.abs(ratios).max()) or 1.0
    fits = [_fit_from(start, unit, ratios / size) for start in _STARTS]
    best = min(fits, key=lambda fit: float(fit.cost))
    a, b, rate = np.exp(best.x).tolist()
    amplitude, offset = (_linear(best.x, unit, ratios / size)[0] * size).tolist()
    decay, start = a / rate, b * rate
    fit = DynamicsFit(
        # The fitted columns are e^(−a u) (ln γ + ln(u + b)); x starts at t₀, not at 0.
        amplitude=amplitude * float(np.exp(decay * start)),
        decay=decay,
        rate=rate / longest,
        start=start,
        offset=offset,
        r_squared=0.0,
        peak_step=None,
    )
    return _judged(fit, steps, ratios)


def stationary_point(decay: float) -> float:
    """The x at which exp(−decay · x) ln x is largest: decay · x · ln x = 1, so x = exp(W(1 / decay))."""
    return float(np.exp(lambertw(1 / decay).real))


def _judged(fit: DynamicsFit, steps: Floats, ratios: Floats) -> DynamicsFit:
    """The fit with its R² and its peak."""
    spread = float(((ratios - ratios.mean()) ** 2).sum())
    left = float(((ratios - fit.at(steps)) ** 2).sum())
    peak = (stationary_point(fit.decay) - fit.start) / fit.rate
    inside = fit.amplitude > 0 and steps.min() < peak < steps.max()
    return DynamicsFit(
        amplitude=fit.amplitude,
        decay=fit.decay,
        rate=fit.rate,
        start=fit.start,
        offset=fit.offset,
        r_squared=1 - left / spread if spread > 0 else 1.0,
        peak_step=float(peak) if inside else None,
    )


def _fit_from(start: tuple[float, ...], unit: Floats, ratios: Floats) -> Any:
    return least_squares(lambda x: _linear(x, unit, ratios)[1], np.array(start), bounds=_BOUNDS, x_scale=1.0)


def _linear(logs: Floats, unit: Floats, ratios: Floats) -> tuple[Floats, Floats]:
    """The best amplitude and offset [2] for given ln a, ln b and ln γ, and what they leave over [n]."""
    a, b, _ = np.exp(logs)
    columns = np.stack([np.exp(-a * unit) * (logs[2] + np.log(unit + b)), np.ones_like(unit)], axis=1)
    solution, *_ = np.linalg.lstsq(columns, ratios, rcond=None)
    return solution, columns @ solution - ratios
