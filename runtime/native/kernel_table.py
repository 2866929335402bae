"""Which kernel multiplies which weights by which activations, from a checkpoint's tensors to a kernel's layout.

`TABLE` is the whole choice; what it leaves out is dequantized (`linear.Dequantized`), with the reason in the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qtool.kernels.dequantize_weight import dequantize_weight, widen_to_e4m3
from qtool.kernels.integer_gemm import second_level_scales
from qtool.kernels.pack import Encoding, HalvesInt4, pack_int4
from qtool.quantize.artifacts.granularity import PerTensor, PerToken, group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.runtime.native.products import (
    EightBitProduct,
    Int4FloatProduct,
    Int4Fp8Product,
    Int4Weight,
    IntegerProduct,
    Product,
)

LARGEST_SIDE = 128
LARGEST_INT8 = 127


class NoKernelError(Exception):
    """Why no kernel multiplies a weight."""


def product_of(weight: QuantizedTensor) -> Product:
    """A weight in the layout of the kernel that multiplies it, on the weight's device.

    Raises:
        NoKernelError: when the table has no such row, or the row's kernel cannot take this weight.
    """
    scheme = weight.scheme
    act = scheme.input
    make = TABLE.get((scheme.weight.format.name, None if act is None else act.format.name))
    if make is None:
        raise NoKernelError(f"no kernel multiplies {scheme}")
    if act is not None and act.scale != "float":
        raise NoKernelError(f"no kernel reads activations with {act.scale} scales")
    if side_width(weight) > LARGEST_SIDE:
        raise NoKernelError(f"side products of rank {side_width(weight)} have no kernel")
    return make(weight)


def side_width(weight: QuantizedTensor) -> int:
    """Columns of the widest 16-bit product beside the codes."""
    side = 0 if weight.side is None else weight.side.shape[1]
    return max(side, 0 if weight.low_rank is None else weight.low_rank.up.shape[1])


def _integer(weight: QuantizedTensor) -> Product:
    assert weight.scheme.input is not None
    op = "w4a4_gemm" if weight.scheme.input.format.name == "int4" else "w4a8_gemm"
    return IntegerProduct(weight=_int4(weight, integers=True), op=op)


def _int8(weight: QuantizedTensor) -> Product:
    if weight.zero_point is not None:
        raise NoKernelError("no kernel for 8-bit weights with zero points")
    _one_scale_a_row(weight)
    codes = (weight.codes ^ 128).view(torch.int8)
    return EightBitProduct(codes=codes.contiguous(), scale=weight.scale[:, 0].contiguous(), op="w8a8_gemm")


def _fp8(weight: QuantizedTensor) -> Product:
    _one_scale_a_row(weight)
    return EightBitProduct(codes=weight.codes.contiguous(), scale=weight.scale[:, 0].contiguous(), op="fp8_gemm")


def _int4_fp8(weight: QuantizedTensor) -> Product:
    _one_scale_a_token(weight)
    if weight.zero_point is not None:
        raise NoKernelError("no kernel for 4-bit weights with zero points beside FP8 activations")
    if int(weight.codes.min()) == 0:
        raise NoKernelError("4-bit weights of −8 have no code beside FP8 activations")
    return Int4Fp8Product(weight=_int4(weight, integers=False, encoding="sign_magnitude"))


def _fp4_fp8(weight: QuantizedTensor) -> Product:
    """E2M1 under powers of two is E4M3, without rounding: 8 bits a weight, for a kernel of 8-bit weights."""
    _one_scale_a_token(weight)
    group = group_size_of(weight.scheme.weight.granularity)
    try:
        codes, scale = widen_to_e4m3(weight.codes, weight.scale, group_size=group, zero_code=0, e2m1=True)
    except ValueError:
        raise NoKernelError("no kernel for E2M1 weights in groups whose scales are no powers of two apart") from None
    return EightBitProduct(codes=codes, scale=scale[:, 0].contiguous(), op="fp8_gemm")


TABLE: Mapping[tuple[str, str | None], Callable[[QuantizedTensor], Product]] = {
    ("int4", "int8"): _integer,
    ("int4", "int4"): _integer,
    ("int4", None): lambda weight: Int4FloatProduct(weight=_int4(weight, integers=False)),
    ("int4", "fp8_e4m3"): _int4_fp8,
    ("int8", "int8"): _int8,
    ("fp8_e4m3", "fp8_e4m3"): _fp8,
    ("fp4_e2m1", "fp8_e4m3"): _fp4_fp8,
}


def reads_sums(weight: QuantizedTensor) -> bool:
    """Whether a linear's kernel takes zero points off by its activations' sums."""
    act = weight.scheme.input
    return act is not None and act.format.kind == "int" and weight.zero_point is not None


def _int4(weight: QuantizedTensor, *, integers: bool, encoding: Encoding = "twos_complement") -> Int4Weight:
    columns = weight.codes.shape[1]
    halves = HalvesInt4.from_canonical(pack_int4(weight.codes), columns, encoding)
    zeros = weight.zero_point
    group = group_size_of(weight.scheme.weight.granularity) or 0
    if weight.scale.shape[1] == 1:
        zero_row = None if zeros is None else zeros[:, 0].contiguous()
        return Int4Weight(
            halves=halves, scale=weight.scale[:, 0].contiguous(), integers=None, zero_point=zero_row, group=0
        )
    if integers and (found := _second_level(weight)) is not None:
        return Int4Weight(halves=halves, scale=found[0], integers=found[1], zero_point=zeros, group=group)
    half = weight.scale.to(torch.float16)
    scale = half if torch.equal(half.to(torch.float32), weight.scale) else weight.scale
    return Int4Weight(
        halves=halves, scale=scale.T.contiguous().T, integers=None, zero_point=zeros, group=group
    )


def _second_level(weight: QuantizedTensor) -> tuple[Tensor, Tensor] | None:
    """The scales as a row's scale times integers, with which (code − zero point) × integer is an int8; None if not."""
    found = second_level_scales(weight.scale, weight.scale_factor if weight.scheme.weight.scale == "integer" else None)
    if found is None or weight.zero_point is None:
        return found
    group = group_size_of(weight.scheme.weight.granularity)
    int8 = dequantize_weight(weight.codes, found[1].float(), weight.zero_point, group_size=group, zero_code=0)
    return found if bool((int8.abs() <= LARGEST_INT8).all()) else None


def _one_scale_a_row(weight: QuantizedTensor) -> None:
    if weight.scale.shape[1] > 1:
        raise NoKernelError("no kernel for 8-bit weights in groups")
    _one_scale_a_token(weight)


def _one_scale_a_token(weight: QuantizedTensor) -> None:
    act = weight.scheme.input
    if act is not None and not isinstance(act.granularity, PerToken | PerTensor):
        raise NoKernelError(f"{weight.scheme.weight.format.name} weights have no kernel for activations in groups")
