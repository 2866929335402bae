"""Weights in the layouts of the kernels that multiply them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtool.kernels.dequantize_weight import dequantize_weight
from qtool.kernels.fp8_gemm import fp8_gemm
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a4_gemm import w4a4_gemm
from qtool.kernels.w4a8_gemm import w4a8_gemm
from qtool.kernels.w4a16_gemm import w4a16_gemm
from qtool.kernels.w4afp8_gemm import w4afp8_gemm
from qtool.kernels.w8a8_gemm import w8a8_gemm
from qtool.runtime.native.prepared import Prepared

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
INT4_ZERO = 8


class Product(Protocol):
    """A weight in its kernel's layout."""

    @property
    def op(self) -> str:
        """The kernel's name."""
        ...

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x · Ŵᵀ + bias: [M, N] of out_dtype."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """What the codes of these rows stand for, [len(ids), K] float32: a tied head's embedding."""
        ...


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """4-bit weights in the kernels' layout.

    Attributes:
        halves: [N, K].
        scale: float32 [N], or float16 or float32 [N, G] with the rows side by side.
        integers: second-level scales uint8 [N, G] under `scale` [N], or None.
        zero_point: uint8 [N] or [N, G], or None.
        group: columns of a group, 0 for one scale a row.
    """

    halves: HalvesInt4
    scale: Tensor
    integers: Tensor | None
    zero_point: Tensor | None
    group: int

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        found = HalvesInt4(self.halves.packed[ids], self.halves.columns, self.halves.encoding)
        scale = self.scale[ids].to(torch.float32)
        scale = scale[:, None] if scale.dim() == 1 else scale
        if self.integers is not None:
            scale = scale * self.integers[ids].to(torch.float32)
        zeros = None if self.zero_point is None else self.zero_point[ids].reshape(scale.shape)
        codes = (found.values() + INT4_ZERO).to(torch.uint8)
        return dequantize_weight(codes, scale, zeros, group_size=self.group or None, zero_code=INT4_ZERO)


@dataclass(frozen=True, kw_only=True)
class IntegerProduct:
    """W4A8 and W4A4."""

    weight: Int4Weight
    op: str

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product."""
        assert x.codes is not None and x.scale is not None
        weight = self.weight
        codes = HalvesInt4(x.codes, x.columns) if x.codes.dtype == torch.uint8 else x.codes
        gemm: Callable[..., Tensor] = w4a4_gemm if self.op == "w4a4_gemm" else w4a8_gemm
        return gemm(
            codes,
            x.scale,
            weight.halves,
            weight.scale,
            bias,
            out_dtype,
            w_group_scale=weight.integers,
            w_group_size=weight.group,
            zero_point=weight.zero_point,
            x_sums=x.sums,
            tile_factors=x.factors,
            x_group_size=x.group,
        )

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self.weight.rows(ids)


@dataclass(frozen=True, kw_only=True)
class Int4FloatProduct:
    """W4A16."""

    weight: Int4Weight
    op: str = "w4a16_gemm"

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product; float32 activations are rounded to bfloat16."""
        assert x.values is not None
        values = x.values if x.values.dtype in SIXTEEN_BITS else x.values.to(torch.bfloat16)
        weight = self.weight
        group = weight.group or None
        return w4a16_gemm(values, weight.halves, weight.scale, weight.zero_point, bias, out_dtype, group_size=group)

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self.weight.rows(ids)


@dataclass(frozen=True, kw_only=True)
class Int4Fp8Product:
    """W4A8 with E4M3 activations."""

    weight: Int4Weight
    op: str = "w4afp8_gemm"

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product."""
        assert x.codes is not None and x.scale is not None
        weight, scale = self.weight, x.scale.expand(len(x.codes))
        group = weight.group or None
        return w4afp8_gemm(x.codes, scale, weight.halves, weight.scale, bias, out_dtype, group_size=group)

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self.weight.rows(ids)


@dataclass(frozen=True, kw_only=True)
class EightBitProduct:
    """W8A8, and E4M3 on both sides: codes int8 or E4M3 [N, K] with one float32 scale a row [N]."""

    codes: Tensor
    scale: Tensor
    op: str

    def __call__(self, x: Prepared, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See Product."""
        assert x.codes is not None and x.scale is not None
        gemm: Callable[..., Tensor] = w8a8_gemm if self.op == "w8a8_gemm" else fp8_gemm
        return gemm(x.codes, x.scale, self.codes, self.scale, bias, out_dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See Product."""
        return self.codes[ids].to(torch.float32) * self.scale[ids, None]
