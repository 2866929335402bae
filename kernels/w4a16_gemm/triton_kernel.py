"""4-bit weights × bfloat16 or float16 on tensor cores.

With few tokens acc[M, N] = X · Wᵀ (mma.sync from 16 rows on, Ampere's form); with many, acc[N, M] = W · Xᵀ, in which
Hopper's wgmma takes the unpacked weights from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.float_gemm import TILE_K, GroupScales, Tiling, workspace_of_product
from qtool.kernels.language import dot_bf16, to_bf16, uses_assembly, widen
from qtool.kernels.language.ordered_sum import ordered_sum, part_of_k, tile_place
from qtool.kernels.language.tile_groups import tile_groups
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a16_gemm.unpack import unpack_16bit, unpack_16bit_zeros


@triton.jit
def product(w, x, acc, WEIGHTS_FIRST: tl.constexpr):
    """acc + w · xᵀ or acc + x · wᵀ of tiles [N, K] and [M, K]."""
    return dot_bf16(w, x.T, acc) if WEIGHTS_FIRST else dot_bf16(x, w.T, acc)


@triton.jit
def w4a16_gemm_kernel(
    x,
    w,
    w_scale,
    w_zero,
    bias,
    y,
    sums,
    arrivals,
    M,
    N,
    K,
    groups,
    x_row,
    w_row,
    w_scale_row,
    w_scale_group,
    w_zero_row,
    w_zero_group,
    y_row,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    WHOLE_K: tl.constexpr,
    ASM: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of y, or one part of its K: a grid of (tiles, PARTS)."""
    HALF: tl.constexpr = BK // 2
    # Columns of bytes unpacked at once: no more than a group has.
    SPAN: tl.constexpr = GROUP if GROUP == 32 else HALF
    # The tile's groups are this wide; low nibbles begin at column `at` of the tile, high ones at HALF + at.
    WIDTH: tl.constexpr = GROUP if GROUP > 0 and GROUP < BK else BK
    FLOAT16: tl.constexpr = x.dtype.element_ty == tl.float16
    # Where a vector along M or N lies in the sum.
    ALONG_M: tl.constexpr = 0 if WEIGHTS_FIRST else 1
    ALONG_N: tl.constexpr = 1 if WEIGHTS_FIRST else 0
    n_tile, m_tile = tile_place(tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    rm = m_tile * BM + tl.arange(0, BM)
    rn = n_tile * BN + tl.arange(0, BN)
    rh = tl.arange(0, SPAN)
    in_m = rm < M
    # Rows beyond N repeat the last one and are not stored: no mask on the weights.
    row_n = tl.minimum(rn, N - 1).to(tl.int64)
    row_m = rm.to(tl.int64)
    first, last = part_of_k(tl.cdiv(K, BK), PARTS)
    px = x + row_m[:, None] * x_row + (first * BK + rh)[None, :]
    pw = w + row_n[:, None] * w_row + (first * HALF + rh)[None, :]
    pws = w_scale + row_n * w_scale_row
    pwz = w_zero + row_n * w_zero_row
    zero = tl.zeros((BN, BM) if WEIGHTS_FIRST else (BM, BN), tl.float32)
    acc = zero
    if GROUP > 0:
        scales_ahead = tile_groups(pws, first, groups, w_scale_group, GROUP, BK)
        if ZEROS:
            zeros_ahead = tile_groups(pwz, first, groups, w_zero_group, GROUP, BK)
    elif ZEROS:
        row_zero = tl.load(pwz)
    for t in range(first, last):
        if GROUP > 0:
            # A tile ahead: nothing else hides the way to memory.
            scales = scales_ahead
            scales_ahead = tile_groups(pws, t + 1, groups, w_scale_group, GROUP, BK)
            if ZEROS:
                zeros = zeros_ahead
                zeros_ahead = tile_groups(pwz, t + 1, groups, w_zero_group, GROUP, BK)
        for at in tl.static_range(0, HALF, SPAN):
            packed = tl.load(pw + at)
            if not ZEROS:
                low, high = unpack_16bit(packed, FLOAT16, ASM)
            elif GROUP == 0:
                low, high = unpack_16bit_zeros(packed, row_zero, row_zero, FLOAT16, ASM)
            else:
                low, high = unpack_16bit_zeros(packed, zeros[at // WIDTH], zeros[(HALF + at) // WIDTH], FLOAT16, ASM)
            if WHOLE_K:
                xl = tl.load(px + at, mask=in_m[:, None], other=0.0)
                xh = tl.load(px + HALF + at, mask=in_m[:, None], other=0.0)
            else:
                left = K - t * BK - at
                xl = tl.load(px + at, mask=in_m[:, None] & (rh < left)[None, :], other=0.0)
                xh = tl.load(px + HALF + at, mask=in_m[:, None] & (rh < left - HALF)[None, :], other=0.0)
            if GROUP == 0:
                acc = product(high, xh, product(low, xl, acc, WEIGHTS_FIRST), WEIGHTS_FIRST)
            elif GROUP >= BK:
                part = product(high, xh, product(low, xl, zero, WEIGHTS_FIRST), WEIGHTS_FIRST)
                acc += part * tl.expand_dims(widen(scales[0]), ALONG_N)
            else:
                part = product(low, xl, zero, WEIGHTS_FIRST)
                acc += part * tl.expand_dims(widen(scales[at // WIDTH]), ALONG_N)
                part = product(high, xh, zero, WEIGHTS_FIRST)
                acc += part * tl.expand_dims(widen(scales[(HALF + at) // WIDTH]), ALONG_N)
        px += BK
        pw += HALF
    inside = tl.expand_dims(rn < N, ALONG_N) & tl.expand_dims(in_m, ALONG_M)
    place = tl.expand_dims(tl.arange(0, BN), ALONG_N) + tl.expand_dims(tl.arange(0, BM), ALONG_M) * BN
    acc, stores = ordered_sum(acc, sums, arrivals, place, inside, PARTS)
    if GROUP == 0:
        acc *= tl.expand_dims(widen(tl.load(pws)), ALONG_N)
    if BIAS:
        acc += tl.expand_dims(widen(tl.load(bias + row_n)), ALONG_N)
    out = to_bf16(acc) if y.dtype.element_ty == tl.bfloat16 else acc.to(y.dtype.element_ty)
    tl.store(y + tl.expand_dims(row_m * y_row, ALONG_M) + tl.expand_dims(rn, ALONG_N), out, mask=inside & stores)


def launch(
    x: Tensor,
    weight: HalvesInt4,
    scales: GroupScales,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tiling: Tiling,
) -> Tensor:
    """Run the kernel; operands as the public function has checked them."""
    (m, k), n = x.shape, weight.packed.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    tiles, space = workspace_of_product(x.device, m, n, tiling)
    zeros = weight.packed if zero_point is None else zero_point
    w4a16_gemm_kernel[(tiles, tiling.parts)](
        x,
        weight.packed,
        scales.values,
        zeros,
        y if bias is None else bias.contiguous(),
        y,
        space.sums,
        space.arrivals,
        m,
        n,
        k,
        scales.values.shape[1],
        x.stride(0),
        weight.packed.stride(0),
        scales.values.stride(0),
        scales.values.stride(1),
        zeros.stride(0),
        zeros.stride(1),
        y.stride(0),
        GROUP=scales.size,
        ZEROS=zero_point is not None,
        BIAS=bias is not None,
        WEIGHTS_FIRST=tiling.weights_first,
        WHOLE_K=k % TILE_K == 0,
        ASM=uses_assembly(x.device),
        PARTS=tiling.parts,
        BM=tiling.tile_m,
        BN=tiling.tile_n,
        BK=TILE_K,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return y
