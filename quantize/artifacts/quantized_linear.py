"""A linear layer that computes what its scheme says: the input transformed, to codes and back, the dequantized weight,
and the 16-bit products beside it, in float32.

This is the one place where a scheme becomes arithmetic in torch; calibration and the reference runtime both run it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import linear

from qtool.kernels.quantize_activation import (
    fake_quantize_fp8,
    fake_quantize_fp8_static,
    fake_quantize_int4,
    fake_quantize_int8,
    fake_quantize_int8_static,
    fake_quantize_mxfp4,
    fake_quantize_mxfp8,
    fake_quantize_nvfp4,
)
from qtool.kernels.runtime_smooth import RangeRule
from qtool.kernels.side_gemm import side_output
from qtool.quantize.artifacts.granularity import PerTokenSmoothed, PerTokenSmoothedAsPublished, group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.transforms.once_per_input import OncePerInput
from qtool.quantize.transforms.runtime_smooth import PUBLISHED, ROBUST, smooth_request
from qtool.quantize.transforms.site_transform import Parts

_STATIC: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int8": fake_quantize_int8_static,
    "fp8_e4m3": fake_quantize_fp8_static,
}
# By element and scale.
_DYNAMIC: dict[str, Callable[[Tensor, TensorScheme], Tensor]] = {
    "int8 float": lambda x, scheme: fake_quantize_int8(x, group_size=group_size_of(scheme.granularity)),
    "int4 float": lambda x, scheme: _int4(x, scheme),
    "fp8_e4m3 float": lambda x, scheme: fake_quantize_fp8(x, group_size=group_size_of(scheme.granularity)),
    "fp8_e4m3 e8m0": lambda x, scheme: fake_quantize_mxfp8(x),
    "fp4_e2m1 e8m0": lambda x, scheme: fake_quantize_mxfp4(x),
    "fp4_e2m1 e4m3": lambda x, scheme: fake_quantize_nvfp4(x),
}


SMOOTH_RULES: dict[str, RangeRule] = {PerTokenSmoothed.name: ROBUST, PerTokenSmoothedAsPublished.name: PUBLISHED}


def _int4(x: Tensor, scheme: TensorScheme) -> Tensor:
    group = group_size_of(scheme.granularity)
    rule = SMOOTH_RULES.get(scheme.granularity.name)
    if rule is None or group is None:
        return fake_quantize_int4(x, group_size=group, clip=scheme.clip)
    return smooth_request(x, group, rule, clip=scheme.clip)


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
        return _DYNAMIC[f"{scheme.format.name} {scheme.scale}"](x, scheme)
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
