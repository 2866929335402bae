"""4-bit weights × E4M3 on tensor cores: acc[N, M] = W · Xᵀ, the weights going from shared memory through registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.float_gemm import TILE_K, GroupScales, Tiling, workspace_of_product
from qtool.kernels.language import dot_e4m3, to_bf16, unpack_e4m3, uses_assembly, widen
from qtool.kernels.language.ordered_sum import ordered_sum, part_of_k, tile_place
from qtool.kernels.language.tile_groups import tile_groups
from qtool.kernels.pack import HalvesInt4

E4M3_UNIT = tl.constexpr(512.0)  # a nibble's E4M3 number is its value × 2⁻⁹


@triton.jit
def w4afp8_gemm_kernel(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    y,
    sums,
    arrivals,
    M,
    N,
    K,
    groups,
    x_row,
    x_scale_row,
    w_row,
    w_scale_row,
    w_scale_group,
    y_row,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    TWO_SUMS: tl.constexpr,
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
    zero = tl.zeros((BN, BM), tl.float32)
    acc = zero
    other = zero
    if GROUP > 0:
        ahead = tile_groups(pws, first, groups, w_scale_group, GROUP, BK)
    for t in range(first, last):
        if GROUP > 0:
            # A tile ahead: nothing else hides the way to memory.
            scales = ahead
            ahead = tile_groups(pws, t + 1, groups, w_scale_group, GROUP, BK)
        for at in tl.static_range(0, HALF, SPAN):
            low, high = unpack_e4m3(tl.load(pw + at), ASM)
            if WHOLE_K:
                xl = tl.load(px + at, mask=in_m[:, None], other=0.0)
                xh = tl.load(px + HALF + at, mask=in_m[:, None], other=0.0)
            else:
                left = K - t * BK - at
                xl = tl.load(px + at, mask=in_m[:, None] & (rh < left)[None, :], other=0.0)
                xh = tl.load(px + HALF + at, mask=in_m[:, None] & (rh < left - HALF)[None, :], other=0.0)
            if TWO_SUMS:
                acc = dot_e4m3(low, xl.T, acc)
                other = dot_e4m3(high, xh.T, other)
            elif GROUP == 0:
                acc += dot_e4m3(high, xh.T, dot_e4m3(low, xl.T, zero))
            elif GROUP >= BK:
                part = dot_e4m3(high, xh.T, dot_e4m3(low, xl.T, zero))
                acc += part * widen(scales[0])[:, None]
            else:
                acc += dot_e4m3(low, xl.T, zero) * widen(scales[at // GROUP])[:, None]
                acc += dot_e4m3(high, xh.T, zero) * widen(scales[(at + HALF) // GROUP])[:, None]
        px += BK
        pw += HALF
    if TWO_SUMS:
        acc += other
    inside = (rn < N)[:, None] & in_m[None, :]
    place = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN
    acc, stores = ordered_sum(acc, sums, arrivals, place, inside, PARTS)
    acc *= E4M3_UNIT
    if GROUP == 0:
        acc *= widen(tl.load(pws))[:, None]
    acc *= tl.load(x_scale + row_m * x_scale_row, mask=in_m, other=0.0)[None, :]
    if BIAS:
        acc += widen(tl.load(bias + row_n))[:, None]
    out = to_bf16(acc) if y.dtype.element_ty == tl.bfloat16 else acc.to(y.dtype.element_ty)
    tl.store(y + (row_m * y_row)[None, :] + rn[:, None], out, mask=inside & stores)


def launch(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: HalvesInt4,
    scales: GroupScales,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tiling: Tiling,
    longest_sum: int,
) -> Tensor:
    """Run the kernel; operands as the public function has checked them."""
    (m, k), n = x_codes.shape, weight.packed.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x_codes.device)
    tiles, space = workspace_of_product(x_codes.device, m, n, tiling)
    w4afp8_gemm_kernel[(tiles, tiling.parts)](
        x_codes,
        x_scale,
        weight.packed,
        scales.values,
        y if bias is None else bias.contiguous(),
        y,
        space.sums,
        space.arrivals,
        m,
        n,
        k,
        scales.values.shape[1],
        x_codes.stride(0),
        x_scale.stride(0),
        weight.packed.stride(0),
        scales.values.stride(0),
        scales.values.stride(1),
        y.stride(0),
        GROUP=scales.size,
        BIAS=bias is not None,
        TWO_SUMS=not scales.size and triton.cdiv(k, TILE_K * tiling.parts) * TILE_K <= longest_sum,
        WHOLE_K=k % TILE_K == 0,
        ASM=uses_assembly(x_codes.device),
        PARTS=tiling.parts,
        BM=tiling.tile_m,
        BN=tiling.tile_n,
        BK=TILE_K,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return y
