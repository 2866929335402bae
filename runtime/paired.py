"""The mean of a per-token quantity with an interval that knows tokens of one text are not independent.

Neighbouring tokens share their context, so the spread is taken over blocks of 64 consecutive tokens and, where
there are at least eight sequences, over whole sequences too; the larger standard error counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK_TOKENS = 64
MIN_BLOCKS = 8
NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True, kw_only=True)
class PairedMean:
    """A mean over tokens.

    Attributes:
        mean: over all tokens.
        standard_error: robust to correlation inside blocks; NaN with fewer than two blocks.
        blocks: how many blocks the interval rests on.
        low, high: two-sided 95 % interval (Student's t); infinite with fewer than MIN_BLOCKS blocks.
    """

    mean: float
    standard_error: float
    blocks: int
    low: float
    high: float


def paired_mean(values: npt.NDArray[np.floating]) -> PairedMean:
    """Mean and interval of per-token values [B, P]; for a paired test, of differences."""
    wide: npt.NDArray[np.float64] = values.astype(np.float64)
    mean = float(wide.mean())
    error, blocks = _clustered_error(wide, _block_labels(wide.shape))
    freedom = blocks - 1
    if wide.shape[0] >= MIN_BLOCKS:
        by_sequence, sequences = _clustered_error(wide, _sequence_labels(wide.shape))
        if by_sequence * student_quantile(sequences - 1) > error * student_quantile(freedom):
            error, freedom = by_sequence, sequences - 1
    half = error * student_quantile(freedom) if blocks >= MIN_BLOCKS else math.inf
    return PairedMean(mean=mean, standard_error=error, blocks=blocks, low=mean - half, high=mean + half)


def student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t, by the first terms of its expansion about the normal; within 0.5 % from 7 on."""
    if freedom < 1:
        return math.inf
    z = NORMAL_QUANTILE
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def _block_labels(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    sequences, positions = shape
    per_sequence = max(1, positions // BLOCK_TOKENS)  # a short remainder joins the last block
    inside = np.minimum(np.arange(positions) // BLOCK_TOKENS, per_sequence - 1)
    return np.arange(sequences)[:, None] * per_sequence + inside[None]


def _sequence_labels(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    return np.broadcast_to(np.arange(shape[0])[:, None], shape)


def _clustered_error(values: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> tuple[float, int]:
    sums = np.bincount(labels.ravel(), weights=(values - values.mean()).ravel())
    count = len(sums)
    if count < 2:
        return math.nan, count
    return float(np.sqrt(count / (count - 1) * np.square(sums).sum()) / values.size), count
