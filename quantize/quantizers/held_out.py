"""How a quantized model does on text that nothing was fitted to, and what a change to it has changed there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """Of the same sequences every time.

    Attributes:
        kl_nats: mean KL(float || quantized) of every sequence, per token.
        losses: mean cross entropy of every sequence, nats per token.
    """

    kl_nats: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def mean_kl(self) -> float:
        return fmean(self.kl_nats)

    @property
    def mean_loss(self) -> float:
        return fmean(self.losses)

    def against(self, before: HeldOutScores) -> Change:
        """What has changed: the KL, or where that moves by no more than its error, the cross entropy."""
        kl = _change("KL", self.kl_nats, before.kl_nats)
        if abs(kl.mean) > (kl.error or 0.0):
            return kl
        return _change(f"{kl}, loss", self.losses, before.losses)


@dataclass(frozen=True)
class Change:
    """The mean of paired differences over sequences and its standard error; one pair has none, and counts as it is."""

    what: str
    mean: float
    error: float | None

    @property
    def better(self) -> bool:
        return self.mean < 0

    @property
    def proven(self) -> bool:
        """Better by more than the noise."""
        return self.mean < -(self.error or 0.0)

    def __str__(self) -> str:
        error = "on one sequence" if self.error is None else f"± {self.error:.4f} nats"
        return f"{self.what} {self.mean:+.4f} {error}"


def _change(what: str, now: Sequence[float], before: Sequence[float]) -> Change:
    differences = [a - b for a, b in zip(now, before, strict=True)]
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else None
    return Change(what, fmean(differences), error)
