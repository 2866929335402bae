"""int4 weights × int8 activations, both exact integers: one kernel from the packed bytes to the biased output.

    y[m, n] = Σ_s w_s[n] · x_s[m] · Σ_j∈s (w[n, j] − z_s[n]) · x[m, j] + bias[n]

The weights are bytes of two (kernels/pack, halves layout). What may change along K, by groups of a multiple of 64
columns: the weights' scales, as floats or as second-level integers 1…16 under one float a row, their zero points, the
activations' scales, and Runtime Smooth's factors. Integer scales and factors keep the whole sum int32: bit-equal to the
reference, the same for every batch and tiling. Float ones are multiplied in a segment at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import checked
from qtool.kernels.integer_gemm.tilings import Tiling
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a8_gemm.product import int4_weight_product

__all__ = ["w4a8_gemm"]


def w4a8_gemm(
    x_codes: Tensor,
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
        x_codes: int8 [M, K].
        x_scale: float32 [M], [M, 1] or one number; or [M, ceil(K / x_group_size)].
        weight: [N, K] in two's complement.
        w_scale: float32 [N], [N, 1] or one number; or float32, float16 or bfloat16 [N, ceil(K / w_group_size)]. What
            has groups is read fastest with a group's rows side by side in memory (`scale.T.contiguous().T`).
        bias: float [N].
        out_dtype: bfloat16, float16 or float32.
        w_group_scale: uint8 [N, ceil(K / w_group_size)] integers 1…16 beside one w_scale a row (`second_level_scales`).
        w_group_size: columns of a group of weights, 0 for none.
        zero_point: uint8 [N] or [N, ceil(K / w_group_size)] codes of zero; 8 without. With w_group_scale,
            (code − zero_point) × integer must fit int8; up to 8 it always does.
        x_sums: int32 [M], each token's sum of codes, as quantize_activation returns it, found here when left out. Read
            for a zero point a row where nothing else changes along K; other zero points are taken off in the loop.
        tile_factors: float32 or int32 [ceil(K / x_group_size)], or the same for each token, multiplied to the sums of
            their columns (kernels/runtime_smooth). Integers up to that package's `largest_integer_factor` keep the
            sum int32; its largest weight is 8 here (15 with zero points, 128 with w_group_scale): shifts come first.
        x_group_size: columns of one of x_scale's or tile_factors' numbers, 0 for none.
        out: the output [M, N] to write, rows contiguous.
        tiling: None for the configured one.

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
    return int4_weight_product("w4a8_gemm", operands, out_dtype, out, tiling)
