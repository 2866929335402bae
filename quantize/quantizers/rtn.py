"""Round to nearest: the weight's own grid, no data."""

from __future__ import annotations

from torch import Tensor

from qtool.quantize.artifacts.recipe import QuantizerOptions
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.quantizers.numerics import choose_grid, encode
from qtool.quantize.quantizers.outcome import Outcome


def rtn(weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, options: QuantizerOptions) -> Outcome:
    """Round a weight [N, K] float32 to the nearest codes; the Hessian is not looked at."""
    grid = choose_grid(weight, scheme, mse_clip=options.mse_clip)
    return Outcome(codes=encode(weight, grid, scheme), grid=grid)
