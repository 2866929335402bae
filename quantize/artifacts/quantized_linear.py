"""A linear layer that computes what its scheme says: the input transformed, to codes and back, the dequantized weight,
and the 16-bit products beside it, in float32.

This is the one place where a scheme becomes arithmetic in torch; calibration and the reference runtime both run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor, nn
from torch.nn.functional import linear

from qtool.kernels.quantize_activation import (
    fake_quantize_fp8,
    fake_quantize_fp8_static,
    fake_quantize_int4,
    fake_quantize_int8,
    fake_quantize_int8_static,
)
from qtool.kernels.side_gemm import side_output
from qtool.quantize.artifacts.checkpoint import QuantizedTensor
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.transforms.site_transform import Parts

Result = TypeVar("Result")

_STATIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int8": fake_quantize_int8_static,
    "fp8_e4m3": fake_quantize_fp8_static,
}
_DYNAMIC: dict[str, Callable[[Tensor, TensorScheme], Tensor]] = {
    "int8": lambda x, scheme: fake_quantize_int8(x, group_size=group_size_of(scheme.granularity)),
    "int4": lambda x, scheme: fake_quantize_int4(x, group_size=group_size_of(scheme.granularity), clip=scheme.clip),
    "fp8_e4m3": lambda x, scheme: fake_quantize_fp8(x),
}


class OncePerInput(Generic[Result]):
    """A function of a tensor whose last result is remembered for as long as that tensor lives.

    Linears that read one tensor share one such function, so q, k and v transform and quantize theirs once. Inputs must
    therefore not be changed in place between two calls, and a result must not be the input itself.
    """

    def __init__(self, compute: Callable[[Tensor], Result]) -> None:
        self._compute = compute
        self._input: ReferenceType[Tensor] | None = None
        self._result: Result | None = None

    def __call__(self, x: Tensor) -> Result:
        if self._result is None or self._input is None or self._input() is not x:
            self._result = self._compute(x)
            self._input = ref(x, self._forget)
        return self._result

    def _forget(self, gone: ReferenceType[Tensor]) -> None:
        if gone is self._input:
            self._input = self._result = None


# A site's transform of its input, [..., K] to the main part [..., K'] and the side part [..., r] or None.
InputTransform = OncePerInput[Parts]


class InputQuantizer:
    """What a scheme does to a linear's input, [..., K] to [..., K]: the values that the low-bit GEMM multiplies."""

    def __init__(self, scheme: TensorScheme | None, scale: Tensor | None) -> None:
        self._remembered = None if scheme is None else OncePerInput(lambda x: _quantize(x, scheme, scale))

    def __call__(self, x: Tensor) -> Tensor:
        return x if self._remembered is None else self._remembered(x)


def _quantize(x: Tensor, scheme: TensorScheme, scale: Tensor | None) -> Tensor:
    if scheme.dynamic:
        return _DYNAMIC[scheme.format.name](x, scheme)
    assert scale is not None
    return _STATIC[scheme.format.name](x, scale)


def input_quantizer(weight: QuantizedTensor) -> InputQuantizer:
    """The input quantizer of one linear."""
    return InputQuantizer(weight.scheme.input, weight.input_scale)


class QuantizedLinear(nn.Module):
    """y = Q(main(x)) Ŵᵀ + side(x) W_sideᵀ + (main(x) Vᵀ) Uᵀ + bias with Ŵ dequantized, in float32.

    Args:
        weight: codes and scales, with their transform and side products where they have them.
        bias: [N] or None.
        quantize: shared with the other linears that read the same input, or None for an own one.
        transform: likewise.
    """

    def __init__(
        self,
        weight: QuantizedTensor,
        bias: Tensor | None,
        quantize: InputQuantizer | None = None,
        transform: InputTransform | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.quantize = quantize or input_quantizer(weight)
        self.transform = transform
        if transform is None and weight.transform is not None:
            self.transform = InputTransform(weight.transform.input)
        self.side, self.low_rank = weight.side, weight.low_rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        main, side = (x, None) if self.transform is None else self.transform(x)
        y = linear(self.quantize(main), self.weight, self.bias)
        if side is not None and self.side is not None:
            y = y + side_output(side, self.side)
        if self.low_rank is not None:
            y = y + side_output(main @ self.low_rank.down.T, self.low_rank.up)
        return y
