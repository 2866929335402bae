"""The Triton kernel for int4 weights in halves layout times int8, or int4, activations: acc[n, m] = W · Xᵀ.

Weights come first because Hopper then takes them straight from registers after unpacking, and because few tokens fill
the second side of a matrix instruction better. A K tile has 128 columns: the low nibbles are its first 64, the high
nibbles its last 64, each multiplied with contiguous activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.integer_gemm.operands import Operands, strides
from qtool.kernels.integer_gemm.tilings import Tiling
from qtool.kernels.integer_gemm.triton_epilogue import finish
from qtool.kernels.integer_gemm.triton_tiles import load_factor, load_group, load_pair, load_tokens, tile_of
from qtool.kernels.integer_gemm.workspace import shared_sums
from qtool.kernels.language import dot_int8, unpack_x16, uses_assembly, widen
from qtool.kernels.w4a8_gemm.triton_unpack import unpack_rescaled


# A number of tokens is no reason to compile again.
@triton.jit(do_not_specialize=["M"])
def int4_weight_gemm(
    x,
    x_scale,
    x_factors,
    x_sums,
    w,
    w_scale,
    w_groups,
    zero_point,
    bias,
    y,
    shared,
    M,
    N,
    K,
    x_stride,
    x_scale_stride,
    x_factors_stride_m,
    x_factors_stride_g,
    w_stride,
    w_scale_stride,
    w_groups_stride_n,
    w_groups_stride_g,
    zero_stride_n,
    zero_stride_g,
    y_stride,
    X_INT4: tl.constexpr,
    X_GROUP: tl.constexpr,
    X_SHARED: tl.constexpr,
    W_GROUP: tl.constexpr,
    INTEGER_GROUPS: tl.constexpr,
    FLOAT_SUM: tl.constexpr,
    ZERO_IN_LOOP: tl.constexpr,
    ZERO_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    """One tile of y, or one SPLIT-th of its K.

    Args:
        x_factors, w_groups: per token, per row, and columns of K; their group sizes are multiples of 64, 0 without.
        X_SHARED: all tokens have the factors of the first.
        INTEGER_GROUPS: w_groups are second-level integers, multiplied to the unpacked weights.
        FLOAT_SUM: segments are added in float32.
        ZERO_IN_LOOP: zero points are taken off the unpacked weights; else off the sum, with x_sums.
        ZERO_GROUP: columns of one zero point, 0 for one a row.
        EVEN_K: K is a multiple of 128.
    """
    # Unpacked nibbles are values × 16, except where the unpacking multiplies them or takes zero points off.
    RESCALED: tl.constexpr = INTEGER_GROUPS or ZERO_IN_LOOP
    SHIFT: tl.constexpr = (0 if RESCALED else 4) + (4 if X_INT4 else 0)
    FLOAT_GROUPS: tl.constexpr = W_GROUP > 0 and not INTEGER_GROUPS
    # What multiplies the sum of a whole or a half K tile; the sum of all of them otherwise runs through.
    FACTORS: tl.constexpr = X_GROUP > 0 or FLOAT_GROUPS
    HALVES_APART: tl.constexpr = X_GROUP % 128 != 0 or (FLOAT_GROUPS and W_GROUP % 128 != 0)
    # Integer factors want the room that the shift frees.
    SHIFT_EARLY: tl.constexpr = FACTORS and not FLOAT_SUM

    n_tile, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    rn = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rm < M
    row = tl.minimum(rn, N - 1).to(tl.int64)
    token = rm.to(tl.int64)

    k_tiles = tl.cdiv(K, 128)
    each = tl.cdiv(k_tiles, SPLIT)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, k_tiles)

    half = tl.arange(0, 64)
    pw = w + row[:, None] * w_stride + first.to(tl.int64) * 64 + half[None, :]
    px = x + token[:, None] * x_stride + first.to(tl.int64) * (64 if X_INT4 else 128) + half[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if FLOAT_SUM else tl.int32)

    # Scales and zero points stream from memory beside the weights, but too narrow for the compiler to fetch ahead.
    if W_GROUP > 0:
        s_low, s_high = load_pair(w_groups, row, w_groups_stride_n, w_groups_stride_g, first, K, W_GROUP)
    if ZERO_IN_LOOP:
        z_low, z_high = load_pair(zero_point, row, zero_stride_n, zero_stride_g, first, K, ZERO_GROUP)
    for tile in range(first, last):
        packed = tl.load(pw)
        x_low, x_high = load_tokens(px, inside, K - tile * 128, X_INT4, EVEN_K, ASM)
        low_scale = None
        high_scale = None
        low_zero = None
        high_zero = None
        if W_GROUP > 0:
            low_scale = s_low
            high_scale = s_high
            s_low, s_high = load_pair(w_groups, row, w_groups_stride_n, w_groups_stride_g, tile + 1, K, W_GROUP)
        if ZERO_IN_LOOP:
            low_zero = z_low
            high_zero = z_high
            if ZERO_GROUP > 0:
                z_low, z_high = load_pair(zero_point, row, zero_stride_n, zero_stride_g, tile + 1, K, ZERO_GROUP)
        if INTEGER_GROUPS:
            low, high = unpack_rescaled(packed, low_scale, high_scale, low_zero, high_zero, ASM)
        elif ZERO_IN_LOOP:
            low, high = unpack_rescaled(packed, None, None, low_zero, high_zero, ASM)
        else:
            low, high = unpack_x16(packed, ASM)

        if FACTORS:
            part = dot_int8(low, x_low.T, tl.zeros((BLOCK_N, BLOCK_M), tl.int32))
            for side in tl.static_range(2):
                if side == 1:
                    part = dot_int8(high, x_high.T, part)
                if HALVES_APART or side == 1:
                    scaled = part >> SHIFT if SHIFT_EARLY else part.to(tl.float32)
                    if FLOAT_GROUPS:
                        scale = low_scale if side == 0 else high_scale
                        scaled *= widen(scale)[:, None]
                    if X_GROUP > 0 and X_SHARED:
                        factor = load_factor(x_factors, x_factors_stride_g, 2 * tile + side, K, X_GROUP)
                        scaled *= factor.to(scaled.dtype)
                    elif X_GROUP > 0:
                        factor = load_group(
                            x_factors, token, inside, x_factors_stride_m, x_factors_stride_g, 2 * tile + side, K,
                            X_GROUP, EVEN_K,
                        )  # fmt: skip
                        scaled *= factor.to(scaled.dtype)[None, :]
                    acc += scaled
                    part = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        else:
            acc = dot_int8(low, x_low.T, acc)
            acc = dot_int8(high, x_high.T, acc)
        pw += 64
        px += 64 if X_INT4 else 128

    finish(
        acc, rn, rm, y, x_scale, w_scale, bias,
        None if ZERO_IN_LOOP else zero_point, x_sums, shared, M, N, y_stride, x_scale_stride, w_scale_stride,
        0 if SHIFT_EARLY else SHIFT, SPLIT,
    )  # fmt: skip


def multiply(operands: Operands, y: Tensor, tiling: Tiling) -> None:
    """y [M, N] = operands, by this kernel; `Operands.unsupported` is empty and y's rows are contiguous."""
    m, n, k = operands.shape
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    zero, factors, groups = operands.zero_point, operands.x_factors, operands.w_groups
    int4_weight_gemm[(tiles, tiling.split_k)](
        operands.x,
        operands.x_scale,
        factors,
        operands.x_sums,
        operands.w,
        operands.w_scale,
        groups,
        zero,
        operands.bias,
        y,
        shared_sums(operands, tiling, tiles),
        m,
        n,
        k,
        operands.x.stride(0),
        *strides(operands.x_scale, 1),
        *strides(factors, 2),
        operands.w.stride(0),
        *strides(operands.w_scale, 1),
        *strides(groups, 2),
        *strides(zero, 2),
        y.stride(0),
        X_INT4=operands.x.dtype == torch.uint8,
        X_GROUP=operands.x_group_size,
        X_SHARED=factors is not None and (m == 1 or factors.stride(0) == 0),
        W_GROUP=operands.w_group_size if groups is not None else 0,
        INTEGER_GROUPS=operands.integer_groups,
        FLOAT_SUM=operands.float_sum,
        ZERO_IN_LOOP=operands.zero_in_loop,
        ZERO_GROUP=operands.w_group_size if zero is not None and zero.dim() == 2 else 0,
        EVEN_K=k % 128 == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        SPLIT=tiling.split_k,
        ASM=uses_assembly(y.device),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        # An integer sum ends in the reference's own float operations, one by one.
        enable_fp_fusion=operands.float_sum,
    )
