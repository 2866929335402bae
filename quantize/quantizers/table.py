"""The quantizers by the name a recipe calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qtool.quantize.artifacts.rule import QuantizerOptions
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.quantizers.gptq import gptq
from qtool.quantize.quantizers.outcome import Outcome
from qtool.quantize.quantizers.rtn import rtn


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """One row of the table.

    Attributes:
        quantize: (weight [N, K], Hessian [K, K] or None, scheme, options) to codes and grid; rows are independent,
            but for the one factor that NVFP4 scales have.
        needs_hessian: False for quantizers that look at no data.
    """

    quantize: Callable[[Tensor, Tensor | None, TensorScheme, QuantizerOptions], Outcome]
    needs_hessian: bool


START = {"rtn": rtn, "gptq": gptq}

QUANTIZERS: dict[str, Quantizer] = {
    "rtn": Quantizer(quantize=rtn, needs_hessian=False),
    "gptq": Quantizer(quantize=gptq, needs_hessian=True),
    # Where it starts; a block is refined when all its linears are there.
    "autoround": Quantizer(quantize=lambda *given: START[given[-1].start](*given), needs_hessian=True),
}
