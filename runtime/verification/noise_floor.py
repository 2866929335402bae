"""How far a model is from itself, and what that allows another runtime of it.

Rounding activations to 8 bits is chaotic: a relative change of 1e-6 at the embedding flips a few roundings, and the
blocks amplify them to a KL of about 4e-3 nats. No two correct runtimes agree better, so the whole model is judged
by multiples of that distance, measured on the same tokens. A model without rounded activations has a floor of
about zero; the small absolute terms then allow for float32 arithmetic in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qtool.runtime.evaluate import DoubleArray, Evaluation

FACTOR = 3.0
KL_MARGIN = 1e-6
LOSS_MARGIN = 1e-4
SPREAD_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Between two runs over the same tokens.

    Attributes:
        kl_nats: mean KL; NaN where only losses are known.
        loss_mean: mean difference of the losses, nats.
        loss_rms: root of the mean squared difference.
        loss_error: loss_rms / sqrt(tokens), the standard error of loss_mean.
    """

    kl_nats: float
    loss_mean: float
    loss_rms: float
    loss_error: float

    @classmethod
    def between(
        cls, losses: npt.NDArray[np.floating], others: npt.NDArray[np.floating], kl: npt.NDArray[np.floating] | None
    ) -> Distance:
        """From per-token losses of any equal shape, and per-token KL where it is known."""
        difference = losses.astype(np.float64) - others
        rms = float(np.sqrt(np.square(difference).mean()))
        return cls(
            kl_nats=float("nan") if kl is None else float(kl.mean(dtype=np.float64)),
            loss_mean=float(difference.mean()),
            loss_rms=rms,
            loss_error=rms / float(np.sqrt(difference.size)),
        )


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """The largest distances seen between the reference and itself with noise."""

    kl_nats: float
    loss_mean: float
    loss_rms: float
    loss_error: float

    @classmethod
    def of(cls, runs: Sequence[Evaluation], *, sequences: int, positions: int) -> NoiseFloor:
        """From noisy runs evaluated against the quiet one, over the first sequences and positions."""
        distances = []
        for run in runs:
            assert run.kl is not None and run.reference_losses is not None
            part = (slice(0, sequences), slice(0, positions))
            distances.append(Distance.between(run.losses[part], run.reference_losses[part], run.kl[part]))
        return cls(
            kl_nats=max(d.kl_nats for d in distances),
            loss_mean=max(abs(d.loss_mean) for d in distances),
            loss_rms=max(d.loss_rms for d in distances),
            loss_error=max(d.loss_error for d in distances),
        )

    def to_array(self) -> DoubleArray:
        """[4] float64."""
        return np.array([self.kl_nats, self.loss_mean, self.loss_rms, self.loss_error], dtype=np.float64)

    @classmethod
    def from_array(cls, array: DoubleArray) -> NoiseFloor:
        """The inverse of `to_array`; another shape, or a number that is not finite, raises ValueError."""
        if array.shape != (4,) or not np.isfinite(array).all():
            raise ValueError("a noise floor is four finite numbers")
        kl, mean, rms, error = (float(value) for value in array)
        return cls(kl_nats=kl, loss_mean=mean, loss_rms=rms, loss_error=error)

    @property
    def limits(self) -> dict[str, float]:
        """What a correct runtime stays below, by the names of Distance (loss_mean: its magnitude)."""
        return {
            "kl_nats": FACTOR * self.kl_nats + KL_MARGIN,
            "loss_mean": FACTOR * (self.loss_mean + self.loss_error) + LOSS_MARGIN,
            "loss_rms": FACTOR * self.loss_rms + SPREAD_MARGIN,
        }
