"""The FP8 product on tensor cores: acc[N, M] = W · Xᵀ, so that few tokens still fill a warp group's 64 rows.

With many tokens and block scales acc[M, N] = X · Wᵀ is better: the tokens' factors then lie along a thread's few rows
and not along its many columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.float_gemm import TILE_K, Tiling, workspace_of_product
from qtool.kernels.fp8_gemm.scales import ActivationScale, WeightScale
from qtool.kernels.language import dot_e4m3, to_bf16, widen
from qtool.kernels.language.ordered_sum import ordered_sum, part_of_k, tile_place


@triton.jit
def fp8_gemm_kernel(
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
    x_row,
    x_scale_row,
    x_scale_block,
    w_row,
    w_scale_row,
    w_scale_block,
    y_row,
    X_BLOCKS: tl.constexpr,
    W_BLOCKS: tl.constexpr,
    W_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    WHOLE_K: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of y, or one part of its K: a grid of (tiles, PARTS)."""
    # Where a vector along M or N lies in the sum.
    ALONG_M: tl.constexpr = 0 if WEIGHTS_FIRST else 1
    ALONG_N: tl.constexpr = 1 if WEIGHTS_FIRST else 0
    n_tile, m_tile = tile_place(tl.cdiv(M, BM), tl.cdiv(N, BN), 8)
    rm = m_tile * BM + tl.arange(0, BM)
    rn = n_tile * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    in_m = rm < M
    # Rows beyond N repeat the last one and are not stored: no mask on the larger operand.
    row_n = tl.minimum(rn, N - 1).to(tl.int64)
    row_m = rm.to(tl.int64)
    first, last = part_of_k(tl.cdiv(K, BK), PARTS)
    px = x + row_m[:, None] * x_row + (first * BK + rk)[None, :]
    pw = w + row_n[:, None] * w_row + (first * BK + rk)[None, :]
    pxs = x_scale + row_m * x_scale_row
    if W_ROWS == 1:
        pws = w_scale + row_n * w_scale_row
    else:
        tl.static_assert(W_ROWS % BN == 0, "a tile of weights has one block scale")
        pws = w_scale + (n_tile * BN // W_ROWS).to(tl.int64) * w_scale_row
    zero = tl.zeros((BN, BM) if WEIGHTS_FIRST else (BM, BN), tl.float32)
    acc = zero
    for t in range(first, last):
        if WHOLE_K:
            wt = tl.load(pw)
            xt = tl.load(px, mask=in_m[:, None], other=0.0)
        else:
            in_k = (t * BK + rk < K)[None, :]
            wt = tl.load(pw, mask=in_k, other=0.0)
            xt = tl.load(px, mask=in_m[:, None] & in_k, other=0.0)
        if PROMOTE:
            part = dot_e4m3(wt, xt.T, zero) if WEIGHTS_FIRST else dot_e4m3(xt, wt.T, zero)
            if W_BLOCKS and W_ROWS == 1:
                part *= tl.expand_dims(tl.load(pws + t * w_scale_block), ALONG_N)
            if X_BLOCKS:
                factor = tl.load(pxs + t * x_scale_block, mask=in_m, other=0.0)
                if W_BLOCKS and W_ROWS > 1:
                    factor *= tl.load(pws + t * w_scale_block)
                part *= tl.expand_dims(factor, ALONG_M)
            elif W_BLOCKS and W_ROWS > 1:
                part *= tl.load(pws + t * w_scale_block)
            acc += part
        else:
            acc = dot_e4m3(wt, xt.T, acc) if WEIGHTS_FIRST else dot_e4m3(xt, wt.T, acc)
        px += BK
        pw += BK
    inside = tl.expand_dims(rn < N, ALONG_N) & tl.expand_dims(in_m, ALONG_M)
    place = tl.expand_dims(tl.arange(0, BN), ALONG_N) + tl.expand_dims(tl.arange(0, BM), ALONG_M) * BN
    acc, stores = ordered_sum(acc, sums, arrivals, place, inside, PARTS)
    if not W_BLOCKS:
        acc *= tl.expand_dims(tl.load(pws), ALONG_N)
    if not X_BLOCKS:
        acc *= tl.expand_dims(tl.load(pxs, mask=in_m, other=0.0), ALONG_M)
    if BIAS:
        acc += tl.expand_dims(widen(tl.load(bias + row_n)), ALONG_N)
    out = to_bf16(acc) if y.dtype.element_ty == tl.bfloat16 else acc.to(y.dtype.element_ty)
    tl.store(y + tl.expand_dims(row_m * y_row, ALONG_M) + tl.expand_dims(rn, ALONG_N), out, mask=inside & stores)


def launch(
    x_codes: Tensor,
    x_scale: ActivationScale,
    w_codes: Tensor,
    w_scale: WeightScale,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tiling: Tiling,
    longest_sum: int,
) -> Tensor:
    """Run the kernel; operands as the public function has checked them."""
    (m, k), n = x_codes.shape, w_codes.shape[0]
    y = torch.empty(m, n, dtype=out_dtype, device=x_codes.device)
    tiles, space = workspace_of_product(x_codes.device, m, n, tiling)
    xs, ws = x_scale.values, w_scale.values
    fp8_gemm_kernel[(tiles, tiling.parts)](
        x_codes,
        xs,
        w_codes,
        ws,
        y if bias is None else bias.contiguous(),
        y,
        space.sums,
        space.arrivals,
        m,
        n,
        k,
        x_codes.stride(0),
        xs.stride(0),
        xs.stride(1),
        w_codes.stride(0),
        ws.stride(0),
        ws.stride(1),
        y.stride(0),
        X_BLOCKS=x_scale.blocks,
        W_BLOCKS=w_scale.blocks,
        W_ROWS=w_scale.rows,
        BIAS=bias is not None,
        PROMOTE=x_scale.blocks or w_scale.blocks or longest_sum < triton.cdiv(k, TILE_K * tiling.parts) * TILE_K,
        WEIGHTS_FIRST=tiling.weights_first,
        WHOLE_K=k % TILE_K == 0,
        PARTS=tiling.parts,
        BM=tiling.tile_m,
        BN=tiling.tile_n,
        BK=TILE_K,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return y
