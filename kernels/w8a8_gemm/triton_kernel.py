"""The Triton kernel for int8 × int8: acc[n, m] = W · Xᵀ, both loaded along K, which Hopper's int8 units insist on."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.integer_gemm.operands import Operands, strides
from qtool.kernels.integer_gemm.tilings import Tiling
from qtool.kernels.integer_gemm.triton_epilogue import finish
from qtool.kernels.integer_gemm.triton_tiles import tile_of
from qtool.kernels.integer_gemm.workspace import shared_sums
from qtool.kernels.language import dot_int8


# A number of tokens is no reason to compile again.
@triton.jit(do_not_specialize=["M"])
def int8_gemm(
    x,
    x_scale,
    w,
    w_scale,
    bias,
    y,
    shared,
    M,
    N,
    K,
    x_stride,
    x_scale_stride,
    w_stride,
    w_scale_stride,
    y_stride,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of y, or one SPLIT-th of its K. EVEN_K: K is a multiple of 128."""
    n_tile, m_tile = tile_of(M, N, BLOCK_M, BLOCK_N)
    rn = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rm = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rm < M)[:, None]
    row = tl.minimum(rn, N - 1).to(tl.int64)

    k_tiles = tl.cdiv(K, 128)
    each = tl.cdiv(k_tiles, SPLIT)
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, k_tiles)

    column = tl.arange(0, 128)[None, :]
    pw = w + row[:, None] * w_stride + first.to(tl.int64) * 128 + column
    px = x + rm.to(tl.int64)[:, None] * x_stride + first.to(tl.int64) * 128 + column
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for tile in range(first, last):
        if EVEN_K:
            w_tile = tl.load(pw)
            x_tile = tl.load(px, mask=inside, other=0)
        else:
            left = column < K - tile * 128
            w_tile = tl.load(pw, mask=left, other=0)
            x_tile = tl.load(px, mask=inside & left, other=0)
        acc = dot_int8(w_tile, x_tile.T, acc)
        pw += 128
        px += 128

    finish(
        acc, rn, rm, y, x_scale, w_scale, bias, None, None, shared, M, N, y_stride, x_scale_stride, w_scale_stride,
        0, SPLIT,
    )  # fmt: skip


def multiply(operands: Operands, y: Tensor, tiling: Tiling) -> None:
    """y [M, N] = operands, by this kernel; y's rows are contiguous."""
    m, n, k = operands.shape
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    int8_gemm[(tiles, tiling.split_k)](
        operands.x,
        operands.x_scale,
        operands.w,
        operands.w_scale,
        operands.bias,
        y,
        shared_sums(operands, tiling, tiles),
        m,
        n,
        k,
        operands.x.stride(0),
        *strides(operands.x_scale, 1),
        operands.w.stride(0),
        *strides(operands.w_scale, 1),
        y.stride(0),
        EVEN_K=k % 128 == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        SPLIT=tiling.split_k,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        # The sum ends in the reference's own float operations, one by one.
        enable_fp_fusion=False,
    )
