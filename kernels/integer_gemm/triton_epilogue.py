"""The end of a tile: the blocks that share it are added up, the sum is scaled, the bias added, the output written."""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import to_bf16, widen


@triton.jit
def finish(
    acc,
    rn,
    rm,
    y,
    x_scale,
    w_scale,
    bias,
    zero_point,
    x_sums,
    shared,
    M,
    N,
    y_stride,
    x_scale_stride,
    w_scale_stride,
    SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add up the blocks that share this tile, scale, add the bias, store y[m, n]; the last block to arrive does it.

    Args:
        acc: int32 or float32 [BLOCK_N, BLOCK_M], this block's sum × 2^SHIFT.
        shared: with SPLIT > 1 and an int32 sum, zeros for [tiles, BLOCK_N, BLOCK_M] sums and [tiles] counters after
            them, left zero; with a float32 sum a float32 buffer for [tiles, SPLIT, …] sums in front of the counters.
        zero_point, x_sums: a row's zero point and a token's sum, or None.
    """
    if SPLIT == 1:
        store_tile(
            acc, rn, rm, y, x_scale, w_scale, bias, zero_point, x_sums, M, N, y_stride, x_scale_stride, w_scale_stride,
            SHIFT,
        )  # fmt: skip
    else:
        BLOCK_N: tl.constexpr = acc.shape[0]
        BLOCK_M: tl.constexpr = acc.shape[1]
        AREA: tl.constexpr = BLOCK_N * BLOCK_M
        tile = tl.program_id(0)
        part = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        if acc.dtype == tl.int32:
            mine = shared + tile.to(tl.int64) * AREA + part
            arrived = shared + tl.num_programs(0).to(tl.int64) * AREA + tile
            tl.atomic_add(mine, acc, sem="relaxed")
        else:
            first = shared + tile.to(tl.int64) * (AREA * SPLIT) + part
            arrived = (shared + tl.num_programs(0).to(tl.int64) * (AREA * SPLIT) + tile).to(
                tl.pointer_type(tl.int32), bitcast=True
            )
            tl.store(first + tl.program_id(1) * AREA, acc)
        # Every thread's sums are out before one thread says so, and read after it has heard from all the others.
        tl.debug_barrier()
        before = tl.atomic_add(arrived, 1, sem="acq_rel")
        if before == SPLIT - 1:
            tl.debug_barrier()
            if acc.dtype == tl.int32:
                acc = tl.load(mine, cache_modifier=".cg")
                tl.store(mine, tl.zeros((BLOCK_N, BLOCK_M), tl.int32))
            else:
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for i in range(SPLIT):
                    acc += tl.load(first + i * AREA, cache_modifier=".cg")
            tl.store(arrived, 0)
            store_tile(
                acc, rn, rm, y, x_scale, w_scale, bias, zero_point, x_sums, M, N, y_stride, x_scale_stride,
                w_scale_stride, SHIFT,
            )  # fmt: skip


@triton.jit
def store_tile(
    acc,
    rn,
    rm,
    y,
    x_scale,
    w_scale,
    bias,
    zero_point,
    x_sums,
    M,
    N,
    y_stride,
    x_scale_stride,
    w_scale_stride,
    SHIFT: tl.constexpr,
):
    """y[m, n] from a whole sum [BLOCK_N, BLOCK_M]; arguments as in `finish`."""
    in_n = rn < N
    in_m = rm < M
    if acc.dtype == tl.int32:
        acc = acc >> SHIFT
        if zero_point is not None:
            zero = tl.load(zero_point + rn, mask=in_n, other=8).to(tl.int32) - 8
            acc -= zero[:, None] * tl.load(x_sums + rm, mask=in_m, other=0)[None, :]
        value = acc.to(tl.float32)
    else:
        value = acc * (1.0 / (1 << SHIFT))
    if w_scale is not None:
        value = value * tl.load(w_scale + rn * w_scale_stride, mask=in_n, other=0.0)[:, None]
    if x_scale is not None:
        value = value * tl.load(x_scale + rm * x_scale_stride, mask=in_m, other=0.0)[None, :]
    if bias is not None:
        value = value + widen(tl.load(bias + rn, mask=in_n, other=0.0))[:, None]
    value = to_bf16(value) if y.dtype.element_ty == tl.bfloat16 else value.to(y.dtype.element_ty)
    at = y + rm.to(tl.int64)[:, None] * y_stride + rn[None, :]
    tl.store(at, value.T, mask=in_m[:, None] & in_n[None, :])
