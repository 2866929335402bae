"""Factors for `smooth` from statistics: SmoothQuant's, AWQ's, and the search for their exponent.

Everything here is a function of arrays. `amax` of activations are maxima over tokens, per channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.transforms.transformed_source import Float64Array

ALPHAS: tuple[float, ...] = tuple(step / 20 for step in range(1, 20))
SMALLEST = 1e-5


def weight_amax(weights: Sequence[FloatArray | Float64Array]) -> Float64Array:
    """max |W| over the rows of all linears [N_i, C] that read one site: [C]."""
    amax: Float64Array = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0).astype(np.float64)
    return amax


def smoothquant_factors(amax: Float64Array, weights: Float64Array, alpha: float) -> Float64Array:
    """SmoothQuant: amax^α / weights^(1 − α), scaled to a geometric mean of 1.

    Args:
        amax: of the site's activations, [C].
        weights: `weight_amax` of its readers, [C].
        alpha: 0 leaves the difficulty to the activations, 1 moves all of it to the weights.

    Returns:
        Factors [C]; 1 for a channel on which activations or weights are zero throughout.
    """
    dead = (amax <= 0) | (weights <= 0)
    log = alpha * np.log(np.maximum(amax, SMALLEST)) - (1 - alpha) * np.log(np.maximum(weights, SMALLEST))
    return _normal(np.where(dead, 0.0, log), ~dead)


def awq_factors(mean_magnitude: Float64Array, ratio: float) -> Float64Array:
    """AWQ: mean |x|^ratio over √(largest × smallest), [C]; 1 for a channel that is always zero.

    Args:
        mean_magnitude: mean |x| of each channel, [C].
        ratio: 0 gives all ones.
    """
    dead = mean_magnitude <= 0
    log = np.where(dead, 0.0, ratio * np.log(np.maximum(mean_magnitude, SMALLEST)))
    alive = log[~dead]
    middle = (alive.max() + alive.min()) / 2 if alive.size else 0.0
    factors: Float64Array = np.where(dead, 1.0, np.exp(log - middle))
    return factors


def tie_heads(values: Float64Array, *, repeats: int, head_dim: int) -> Float64Array:
    """Statistics or factors [H × head_dim], raised to the largest of each group of `repeats` query heads."""
    groups = values.reshape(-1, repeats, head_dim)
    tied: Float64Array = np.broadcast_to(groups.max(axis=1, keepdims=True), groups.shape).reshape(-1)
    return tied


@dataclass(frozen=True)
class Search:
    """What a grid search found.

    Attributes:
        exponent: the best one; None: no factors are better than any.
        factors: its factors [C], all 1 for None.
        loss: its loss.
        losses: (exponent, loss) of all that were tried, the unscaled site first.
    """

    exponent: float | None
    factors: Float64Array
    loss: float
    losses: tuple[tuple[float | None, float], ...]


def search_exponent(
    factors_of: Callable[[float], Float64Array],
    loss: Callable[[Float64Array], float],
    exponents: Sequence[float] = ALPHAS,
) -> Search:
    """The exponent whose factors lose least, or none; the first of equals.

    Args:
        factors_of: exponent to factors [C]: `smoothquant_factors` or `awq_factors` on a site's statistics.
        loss: of factors [C]; a NaN never wins.
        exponents: the grid.
    """
    identity = np.ones_like(factors_of(exponents[0]))
    best = Search(None, identity, loss(identity), ())
    losses: list[tuple[float | None, float]] = [(None, best.loss)]
    for exponent in exponents:
        factors = factors_of(exponent)
        value = loss(factors)
        losses.append((exponent, value))
        if value < best.loss or (np.isnan(best.loss) and not np.isnan(value)):
            best = Search(exponent, factors, value, ())
    return replace(best, losses=tuple(losses))


def _normal(log: Float64Array, alive: npt.NDArray[np.bool_]) -> Float64Array:
    middle = log[alive].mean() if alive.any() else 0.0
    factors: Float64Array = np.where(alive, np.exp(log - middle), 1.0)
    return factors
