"""A linear layer that computes what its scheme says: the input to codes and back, the dequantized weight, float32.

This is the one place where a scheme becomes arithmetic in torch; calibration and the reference runtime both run it.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.nn.functional import linear

from qtool.kernels.quantize_activation import (
    fake_quantize_fp8,
    fake_quantize_fp8_static,
    fake_quantize_int8,
    fake_quantize_int8_static,
)
from qtool.quantize.artifacts.checkpoint import QuantizedTensor
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.scheme import TensorScheme

_STATIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int": fake_quantize_int8_static,
    "float": fake_quantize_fp8_static,
}


class InputQuantizer:
    """What a scheme does to a linear's input, [..., K] to [..., K].

    Linears that read one tensor may share one quantizer: the result is remembered for as long as that tensor lives,
    so q, k and v quantize theirs once. Inputs must therefore not be changed in place between two calls.
    """

    def __init__(self, scheme: TensorScheme | None, scale: Tensor | None) -> None:
        self._scheme = scheme
        self._scale = scale
        self._input: ReferenceType[Tensor] | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The values that the integer or FP8 GEMM really multiplies."""
        if self._scheme is None:
            return x
        if self._result is None or self._input is None or self._input() is not x:
            self._result = self._quantize(x, self._scheme)
            self._input = ref(x, self._forget)
        return self._result

    def _forget(self, gone: ReferenceType[Tensor]) -> None:
        if gone is self._input:
            self._input = self._result = None

    def _quantize(self, x: Tensor, scheme: TensorScheme) -> Tensor:
        if not scheme.dynamic:
            assert self._scale is not None
            return _STATIC[scheme.format.kind](x, self._scale)
        if scheme.format.kind == "float":
            return fake_quantize_fp8(x)
        return fake_quantize_int8(x, group_size=group_size_of(scheme.granularity))


def input_quantizer(weight: QuantizedTensor) -> InputQuantizer:
    """The input quantizer of one linear."""
    return InputQuantizer(weight.scheme.input, weight.input_scale)


class QuantizedLinear(nn.Module):
    """y = Q(x) Ŵᵀ + bias with Ŵ dequantized, in float32.

    Args:
        weight: codes and scales.
        bias: [N] or None.
        quantize: shared with the other linears that read the same input, or None for an own one.
    """

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, quantize: InputQuantizer | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quantize = quantize or input_quantizer(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        return linear(self.quantize(x), self.weight, self.bias)
