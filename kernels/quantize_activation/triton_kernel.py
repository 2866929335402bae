"""Rows to codes on a GPU: one program a row, which it holds in registers from the load to the store.

A row is a tile [ROWS, WIDTH] read row by row, so that a Hadamard transform is one product (blocks of WIDTH) or two.
No program sees another row: a row's codes do not depend on the rows beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import to_bf16, to_e4m3, to_int8, widen
from qtool.kernels.language.split_products import dot_split_left, dot_split_right

SMALLEST_RANGE = tl.constexpr(2.0**-120)
PACK_TILE = tl.constexpr(128)


@triton.jit
def as_stored(values, pointers):
    """Float32 values rounded to the pointers' element type."""
    if pointers.dtype.element_ty == tl.bfloat16:
        return to_bf16(values)
    else:
        return values.to(pointers.dtype.element_ty)


@triton.jit
def magnitude_bits(values):
    """|values| as int32 whose order is the numbers' order, infinity above them and NaN above it."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def code_step(limit, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """(usable, multiplier or divisor, scale) of ranges `limit`: see the folder's docstring."""
    if INTEGER:
        usable = (limit > SMALLEST_RANGE) & (limit < float("inf"))
        by = tl.div_rn(tl.zeros_like(limit) + LARGEST, tl.where(usable, limit, 1.0))
        scale = tl.div_rn(limit, tl.zeros_like(limit) + LARGEST)
    else:
        usable = limit > SMALLEST_RANGE
        scale = tl.where(usable, tl.div_rn(limit, tl.zeros_like(limit) + LARGEST), 1.0)
        by = scale
    return usable, by, scale


@triton.jit
def to_codes(values, usable, by, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Integer codes as int8, or E4M3; `usable` and `by` broadcast against the values."""
    if INTEGER:
        scaled = tl.where(usable, values * by, 0.0)
        return to_int8(tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST))
    else:
        return to_e4m3(tl.div_rn(values, tl.zeros_like(values) + by))


@triton.jit
def store_codes(codes, base, places, columns, HALVES: tl.constexpr, TOTAL: tl.constexpr):
    """Store a row's codes at `base`: one by one at `places`, or all TOTAL of them as halves."""
    if HALVES:
        tiles: tl.constexpr = TOTAL // PACK_TILE
        low, high = tl.split(tl.permute(tl.reshape(codes, (tiles, 2, PACK_TILE // 2)), (0, 2, 1)))
        packed = (low & 15) | (high << 4)
        tile = tl.arange(0, tiles)[:, None]
        byte = tile * (PACK_TILE // 2) + tl.arange(0, PACK_TILE // 2)[None, :]
        tl.store(base + byte, packed.to(tl.uint8, bitcast=True), mask=tile * PACK_TILE < columns)
    else:
        tl.store(base + places, codes, mask=places < columns)


@triton.jit
def normalized(values, gain, residual, places, columns, epsilon, GAIN: tl.constexpr, RESIDUAL: tl.constexpr):
    """RMSNorm of a row; `residual` points at its row, which takes the sum."""
    inside = places < columns
    if RESIDUAL:
        total = values + widen(tl.load(residual + places, mask=inside, other=0.0))
        rounded = as_stored(total, residual)
        tl.store(residual + places, rounded, mask=inside)
        values = widen(rounded)
    mean_square = tl.div_rn(tl.sum(tl.sum(values * values, 1), 0), columns * 1.0)
    values = values * tl.div_rn(mean_square * 0 + 1.0, tl.sqrt_rn(mean_square + epsilon))
    if GAIN:
        values = values * widen(tl.load(gain + places, mask=inside, other=0.0))
    return values


@triton.jit
def rotated(values, signs, left, right, places, columns, shrink, ROWS: tl.constexpr, WIDTH: tl.constexpr,
            WHOLE: tl.constexpr, SIGNED: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """(values ∘ signs) M of a tile [ROWS, WIDTH]; TERMS bfloat16 terms hold the values exactly."""
    if SIGNED:
        values = values * widen(tl.load(signs + places, mask=places < columns, other=0.0))
    across = tl.arange(0, WIDTH)
    right_matrix = tl.load(right + across[:, None] * WIDTH + across[None, :])
    zeros = tl.zeros((ROWS, WIDTH), tl.float32)
    if WHOLE:
        down = tl.arange(0, ROWS)
        left_matrix = tl.load(left + down[:, None] * ROWS + down[None, :])
        values = dot_split_right(left_matrix, values, zeros, TERMS)
        values = dot_split_left(values, right_matrix, zeros, 3)
    else:
        values = dot_split_left(values, right_matrix, zeros, TERMS)
    return values * shrink


@triton.jit
def quantize_tile(
    values, codes, scales, sums, places, columns, groups, clip,
    TOTAL: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, HALVES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Quantize a row's tile of TOTAL values that lie at `places`; the pointers are the row's own."""
    if GROUP:
        values = tl.reshape(values, (TOTAL // GROUP, GROUP))
        group = tl.arange(0, TOTAL // GROUP)
        places = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        limit = tl.max(magnitude_bits(values), 1).to(tl.float32, bitcast=True) * clip
        usable, by, scale = code_step(limit, LARGEST, INTEGER)
        tl.store(scales + group, scale, mask=group < groups)
        result = to_codes(values, usable[:, None], by[:, None], LARGEST, INTEGER)
        if SUMS:
            tl.store(sums + group, tl.sum(result.to(tl.int32), 1), mask=group < groups)
    else:
        limit = tl.max(tl.max(magnitude_bits(values), 1), 0).to(tl.float32, bitcast=True) * clip
        usable, by, scale = code_step(limit, LARGEST, INTEGER)
        tl.store(scales, scale)
        result = to_codes(values, usable, by, LARGEST, INTEGER)
        if SUMS:
            tl.store(sums, tl.sum(tl.sum(result.to(tl.int32), 1), 0))
    store_codes(result, codes, places, columns, HALVES, TOTAL)


@triton.jit
def quantize_rows_kernel(
    x, up, gain, residual, signs, left, right, codes, scales, sums, kept,
    x_stride, up_stride, residual_stride, columns, code_columns, groups, epsilon, clip, shrink,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, GAIN: tl.constexpr, RESIDUAL: tl.constexpr,
    HADAMARD: tl.constexpr, SIGNED: tl.constexpr, TERMS: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr,
    INTEGER: tl.constexpr, HALVES: tl.constexpr, SUMS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Codes, scales and sums of one row.

    Args:
        x, up: [M, columns] with row strides; up with SOURCE "silu".
        gain: [columns]; residual: [M, columns] read and written; both with SOURCE "norm".
        signs: [columns]; left, right: factor matrices; shrink: 1 / √block; with HADAMARD "blocks" or "whole".
        codes: [M, code_columns]; scales, sums: [M, groups]; kept: [M, columns], the values that were quantized.
        GROUP: columns per scale, a power of two up to ROWS × WIDTH; 0 for the whole row.
        LARGEST: the largest code; 0 makes no codes.
    """
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = places < columns
    values = widen(tl.load(x + row * x_stride + places, mask=inside, other=0.0))
    if SOURCE == "norm":
        values = normalized(values, gain, residual + row * residual_stride, places, columns, epsilon, GAIN, RESIDUAL)
    elif SOURCE == "silu":
        times = widen(tl.load(up + row * up_stride + places, mask=inside, other=0.0))
        values = values / (1.0 + tl.exp(-values)) * times
    if HADAMARD != "none":
        values = rotated(
            values, signs, left, right, places, columns, shrink, ROWS, WIDTH, HADAMARD == "whole", SIGNED, TERMS
        )
    if KEPT:
        tl.store(kept + row * columns + places, as_stored(values, kept), mask=inside)
    if LARGEST > 0:
        quantize_tile(
            values, codes + row * code_columns, scales + row * groups, sums + row * groups,
            places, columns, groups, clip, ROWS * WIDTH, GROUP, LARGEST, INTEGER, HALVES, SUMS,
        )  # fmt: skip
