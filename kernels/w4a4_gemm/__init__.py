"""int4 weights × int4 activations, both unpacked to int8 inside the kernel.

No faster than w4a8_gemm in arithmetic: Hopper has no int4 tensor cores (its int4 instruction is emulated), and the
A100's are not worth a second layout. It reads half the activations, and Runtime Smooth is made for its codes.
The mathematics, the arguments and the kernel are w4a8_gemm's, with packed activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import checked
from qtool.kernels.integer_gemm.tilings import Tiling
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a8_gemm.product import int4_weight_product

__all__ = ["w4a4_gemm"]


def w4a4_gemm(
    x_codes: HalvesInt4,
    x_scale: Tensor,
    weight: HalvesInt4,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    w_group_scale: Tensor | None = None,
    w_group_size: int = 0,
    zero_point: Tensor | None = None,
    x_sums: Tensor | None = None,
    tile_factors: Tensor | None = None,
    x_group_size: int = 0,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """y = (x_codes × x_scale) · (weight × w_scale)ᵀ + bias.

    Args:
        x_codes: [M, K] in two's complement halves, padding zero.
        x_scale, weight, w_scale, bias, out_dtype, w_group_scale, w_group_size, zero_point, x_sums, tile_factors,
            x_group_size, out, tiling: as in `w4a8_gemm`.

    Returns:
        [M, N]. Scales that are not finite propagate; a token whose scale and codes are zero gives the bias.

    Raises:
        ValueError: when shapes or types do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    operands = checked(
        x_codes,
        x_scale,
        weight,
        w_scale,
        bias=bias,
        w_group_scale=w_group_scale,
        w_group_size=w_group_size,
        zero_point=zero_point,
        x_sums=x_sums,
        tile_factors=tile_factors,
        x_group_size=x_group_size,
    )
    return int4_weight_product("w4a4_gemm", operands, out_dtype, out, tiling)
