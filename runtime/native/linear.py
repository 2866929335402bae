"""Linears on rows that are prepared once for all of them: a product of codes, and the 16-bit products beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtool.kernels.side_gemm import add_side_output, side_rows
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.runtime.native.kernel_table import NoKernelError, product_of
from qtool.runtime.native.prepared import Prepared
from qtool.runtime.native.products import Product


@dataclass(frozen=True, kw_only=True)
class FloatWeight:
    """A product in float.

    Attributes:
        weight: [N, K] of the activations' dtype.
    """

    weight: Tensor
    op: str = "float"

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product."""
        assert x.values is not None
        return linear(x.values, self.weight, bias).to(out_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self.weight[ids].to(torch.float32)


class Dequantized:
    """A scheme without a kernel, in float32 as calibration computed it: its transform and codes included."""

    op = "dequantized"

    def __init__(self, weight: QuantizedTensor) -> None:
        self._linear = QuantizedLinear(weight, None)

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product."""
        assert x.values is not None
        y: Tensor = self._linear(x.values.to(torch.float32))
        return (y if bias is None else y + bias.to(torch.float32)).to(out_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self._linear.weight[ids]


@dataclass(frozen=True, kw_only=True)
class NativeLinear:
    """y = product + side(x) W_sideᵀ + (main(x) Vᵀ) Uᵀ + bias, [M, N].

    Attributes:
        name: of the module, or of the modules merged.
        product: with its weight's layout.
        bias: [N] or None.
        side: W_side [N, r] float16, or None.
        down, up: Vᵀ [K, r] and U [N, r] float16, or None.
        out_dtype: of y.
        reason: why no kernel multiplies it, "" where one does.
    """

    name: str
    product: Product
    bias: Tensor | None
    out_dtype: torch.dtype
    side: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    reason: str = ""

    def __call__(self, x: Prepared) -> Tensor:
        """[M, N]."""
        y = self.product(x, self.bias, self.out_dtype)
        if self.side is not None and x.side is not None:
            add_side_output(y, x.side, self.side)
        if self.down is not None and self.up is not None:
            assert x.values is not None
            add_side_output(y, side_rows(x.values, self.down), self.up)
        return y


def float_linear(name: str, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> NativeLinear:
    """A linear that stayed in float; its weight is on the device, in the activations' dtype."""
    return NativeLinear(name=name, product=FloatWeight(weight=weight), bias=bias, out_dtype=out_dtype)


def quantized_linear(
    name: str, weight: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> NativeLinear:
    """A quantized linear, in its kernel's layout or dequantized; its weight is on the device."""
    try:
        product = product_of(weight)
    except NoKernelError as error:
        product = Dequantized(weight)
        return NativeLinear(name=name, product=product, bias=bias, out_dtype=out_dtype, reason=str(error))
    low = weight.low_rank
    return NativeLinear(
        name=name,
        product=product,
        bias=bias,
        out_dtype=out_dtype,
        side=None if weight.side is None else weight.side.to(torch.float16),
        down=None if low is None else low.down.T.to(torch.float16).contiguous(),
        up=None if low is None else low.up.to(torch.float16).contiguous(),
    )


def on_device(weight: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    """The same weight with every tensor on a device."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    transform, low = weight.transform, weight.low_rank
    if transform is not None:
        tensors = {name: tensor.to(device) for name, tensor in transform.to_tensors().items()}
        transform = type(transform).from_tensors(transform.header(), tensors)
    return replace(
        weight,
        codes=weight.codes.to(device),
        scale=weight.scale.to(device),
        zero_point=moved(weight.zero_point),
        input_scale=moved(weight.input_scale),
        side=moved(weight.side),
        scale_factor=moved(weight.scale_factor),
        transform=transform,
        low_rank=None if low is None else replace(low, up=low.up.to(device), down=low.down.to(device)),
    )
