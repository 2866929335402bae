"""What every quantizer returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qtool.quantize.quantizers.numerics import Grid


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One weight's codes and how they came about.

    Attributes:
        codes: [N, K], see QuantizedTensor.
        grid: scales and zero points.
        damp: the damping that was used, as a fraction of mean(diag H); None for quantizers without a Hessian.
        escalations: how often the damping had to be multiplied by ten.
    """

    codes: Tensor
    grid: Grid
    damp: float | None = None
    escalations: int = 0

    def rows(self, start: int, stop: int) -> Outcome:
        """The outcome of output channels start…stop − 1."""
        grid = self.grid.rows(start, stop)
        return Outcome(codes=self.codes[start:stop], grid=grid, damp=self.damp, escalations=self.escalations)
