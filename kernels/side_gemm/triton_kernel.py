"""The side product on a GPU: added to an output tile, made by a skinny projection, and QUAD's whole input in one.

Tiles of rows are [ROWS, ...]; the projection's columns are padded from RANK to the power of two PADDED ≥ 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import dot_bf16, to_bf16, widen
from qtool.kernels.language.split_products import dot_split, dot_split_left
from qtool.kernels.quantize_activation.triton_kernel import code_step, magnitude_bits, to_codes

FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def add_side(
    acc, side, up, at_n, at_m, columns, rows, RANK: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """acc + up · sideᵀ for a GEMM's float32 tile acc [N, M]: call it in the epilogue, after the scales.

    Args:
        acc: float32 [N, M].
        side: [rows, RANK], up: [columns, RANK], both contiguous and both bfloat16 or both float16.
        at_n, at_m: the tile's columns [N] and rows [M] of the output; those beyond `columns` and `rows` are not read.
        RANK: 1…128; PADDED: the next power of two, at least 16.
    """
    across = tl.arange(0, PADDED)
    inside = across[None, :] < RANK
    ups = tl.load(
        up + at_n[:, None].to(tl.int64) * RANK + across[None, :], mask=(at_n[:, None] < columns) & inside, other=0.0
    )
    sides = tl.load(
        side + at_m[:, None].to(tl.int64) * RANK + across[None, :], mask=(at_m[:, None] < rows) & inside, other=0.0
    )
    return dot_bf16(ups, tl.trans(sides), acc)


@triton.jit
def rounded_to(values, like):
    """Float32 values rounded to the element type of the pointer `like`; float16 saturates, NaN stays NaN."""
    if like.dtype.element_ty == tl.bfloat16:
        return to_bf16(values)
    elif like.dtype.element_ty == tl.float16:
        values = tl.where(values > FLOAT16_MAX, FLOAT16_MAX, values)
        return tl.where(values < -FLOAT16_MAX, -FLOAT16_MAX, values).to(tl.float16)
    else:
        return values


@triton.jit
def side_add_kernel(
    y, side, up, rows, columns, y_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """y [rows, columns] += side · upᵀ, summed in float32 and rounded to y's type."""
    at_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at_m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    places = y + at_m[:, None].to(tl.int64) * y_stride + at_n[None, :]
    inside = (at_m[:, None] < rows) & (at_n[None, :] < columns)
    before = widen(tl.load(places, mask=inside, other=0.0))
    product = add_side(tl.zeros((COLUMNS, ROWS), tl.float32), side, up, at_n, at_m, columns, rows, RANK, PADDED)
    tl.store(places, rounded_to(before + tl.trans(product), y), mask=inside)


@triton.jit
def load_rows(x, at_m, rows, x_stride, at_k, columns):
    """A float32 tile of x [rows, columns], zero outside."""
    inside = (at_m[:, None] < rows) & (at_k[None, :] < columns)
    return widen(tl.load(x + at_m[:, None].to(tl.int64) * x_stride + at_k[None, :], mask=inside, other=0.0))


@triton.jit
def load_directions(down, at_k, columns, RANK: tl.constexpr, PADDED: tl.constexpr):
    """A tile of the directions [columns, RANK] as stored, zero outside."""
    across = tl.arange(0, PADDED)
    inside = (at_k[:, None] < columns) & (across[None, :] < RANK)
    return tl.load(down + at_k[:, None] * RANK + across[None, :], mask=inside, other=0.0)


@triton.jit
def projected(
    x, down, at_m, rows, x_stride, columns, begin, end,
    WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """x · down over columns begin…end: float32 [ROWS, PADDED]. TERMS hold x exactly; two hold 16-bit directions."""
    side = tl.zeros((at_m.shape[0], PADDED), tl.float32)
    for start in range(begin, end, WIDTH):
        at_k = start + tl.arange(0, WIDTH)
        directions = load_directions(down, at_k, columns, RANK, PADDED)
        if TERMS == 0:  # x is stored as the directions are
            inside = (at_m[:, None] < rows) & (at_k[None, :] < columns)
            tile = tl.load(x + at_m[:, None].to(tl.int64) * x_stride + at_k[None, :], mask=inside, other=0.0)
            side = dot_bf16(tile, directions, side)
        else:
            tile = load_rows(x, at_m, rows, x_stride, at_k, columns)
            side = dot_split(tile, widen(directions), side, TERMS, 2)
    return side


@triton.jit
def spanned(side, directions, acc, SAME: tl.constexpr):
    """acc + side · directions [PADDED, WIDTH], exact products; with SAME both are of one 16-bit type."""
    if SAME:
        return dot_bf16(side, directions, acc)
    else:
        return dot_split(widen(side), widen(directions), acc, 3, 2)


@triton.jit
def remainder(
    x, down, side, signs, matrix, at_m, rows, x_stride, at_k, columns, shrink,
    WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, SAME: tl.constexpr, ROTATE: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """((x − side · downᵀ) ∘ signs) M of one tile of columns: float32 [ROWS, WIDTH].

    `side` [ROWS, PADDED] is as stored; with SAME it has the directions' type. M is blocks on the diagonal of
    matrix [WIDTH, WIDTH].
    """
    directions = tl.trans(load_directions(down, at_k, columns, RANK, PADDED))
    zeros = tl.zeros((at_m.shape[0], WIDTH), tl.float32)
    values = load_rows(x, at_m, rows, x_stride, at_k, columns) - spanned(side, directions, zeros, SAME)
    if ROTATE:
        if SIGNED:
            values = values * tl.load(signs + at_k, mask=at_k < columns, other=0.0)[None, :]
        values = dot_split_left(values, matrix, zeros, 3) * shrink
    return values


@triton.jit
def store_tile(result, codes, at_m, rows, start, columns, code_columns, WIDTH: tl.constexpr, HALVES: tl.constexpr):
    """Store codes [ROWS, WIDTH] of the columns from `start` on; with HALVES, WIDTH is the packed tile."""
    line = codes + at_m[:, None].to(tl.int64) * code_columns
    if HALVES:
        half: tl.constexpr = WIDTH // 2
        low, high = tl.split(tl.permute(tl.reshape(result, (result.shape[0], 2, half)), (0, 2, 1)))
        packed = ((low & 15) | (high << 4)).to(tl.uint8, bitcast=True)
        tl.store(line + start // 2 + tl.arange(0, half)[None, :], packed, mask=at_m[:, None] < rows)
    else:
        at_k = start + tl.arange(0, WIDTH)
        tl.store(line + at_k[None, :], result, mask=(at_m[:, None] < rows) & (at_k[None, :] < columns))


@triton.jit
def quantize_groups(
    values, codes, scales, sums, at_m, rows, start, columns, code_columns, groups, clip,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, HALVES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and sums of the groups of one tile of columns."""
    count: tl.constexpr = WIDTH // GROUP
    values = tl.reshape(values, (values.shape[0], count, GROUP))
    limit = tl.max(magnitude_bits(values), 2).to(tl.float32, bitcast=True) * clip
    usable, by, scale = code_step(limit, LARGEST, INTEGER)
    group = start // GROUP + tl.arange(0, count)
    line = at_m[:, None].to(tl.int64) * groups + group[None, :]
    inside = (at_m[:, None] < rows) & (group[None, :] < groups)
    tl.store(scales + line, scale, mask=inside)
    result = to_codes(values, usable[:, :, None], by[:, :, None], LARGEST, INTEGER)
    if SUMS:
        tl.store(sums + line, tl.sum(result.to(tl.int32), 2), mask=inside)
    result = tl.reshape(result, (values.shape[0], WIDTH))
    store_tile(result, codes, at_m, rows, start, columns, code_columns, WIDTH, HALVES)


@triton.jit
def partial_side_kernel(
    x, down, partial, rows, x_stride, columns, slice_columns,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """partial [slices, rows, PADDED] = x · down over each slice of columns; one slice is the whole product."""
    at_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * slice_columns
    end = tl.minimum(begin + slice_columns, columns)
    side = projected(x, down, at_m, rows, x_stride, columns, begin, end, WIDTH, RANK, PADDED, TERMS)
    across = tl.arange(0, PADDED)[None, :]
    line = (tl.program_id(1).to(tl.int64) * rows + at_m[:, None]) * PADDED + across
    tl.store(partial + line, side, mask=at_m[:, None] < rows)


@triton.jit
def gathered(partial, at_m, rows, slices, PADDED: tl.constexpr):
    """The partial products added in the slices' order: float32 [ROWS, PADDED]."""
    across = tl.arange(0, PADDED)[None, :]
    side = tl.zeros((at_m.shape[0], PADDED), tl.float32)
    for one in range(0, slices):
        line = (one * rows + at_m[:, None]).to(tl.int64) * PADDED + across
        side += tl.load(partial + line, mask=at_m[:, None] < rows, other=0.0)
    return side


@triton.jit
def store_side(side, sides, at_m, rows, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Round a side [ROWS, PADDED] to the type of `sides` [rows, RANK], store it there, and return it rounded."""
    stored = rounded_to(side, sides)
    across = tl.arange(0, PADDED)[None, :]
    inside = (at_m[:, None] < rows) & (across < RANK)
    tl.store(sides + at_m[:, None].to(tl.int64) * RANK + across, stored, mask=inside)
    return stored


@triton.jit
def gather_side_kernel(
    partial, sides, rows, slices, ROWS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """sides [rows, RANK] = the partial products added up."""
    at_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    store_side(gathered(partial, at_m, rows, slices, PADDED), sides, at_m, rows, RANK, PADDED)


@triton.jit
def remainder_kernel(
    x, down, partial, sides, signs, right, codes, scales, sums, maxima,
    rows, x_stride, columns, slice_columns, slices, code_columns, groups, clip, shrink,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TERMS: tl.constexpr,
    SAME: tl.constexpr, ROTATE: tl.constexpr, SIGNED: tl.constexpr, PHASE: tl.constexpr, GROUP: tl.constexpr,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, HALVES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """QUAD's input: the side of ROWS rows and the codes of what it leaves.

    Phase "all" does one tile of rows from the product to the codes, going over its columns two or three times. For few
    rows, slices of columns work side by side: after `partial_side_kernel`, phase "ranges" adds up the side and, with
    groups, makes the codes, without them each slice's maxima [slices, rows] (int32 bits); phase "codes" then has them.

    Args:
        sums: int32 [rows, groups]; phase "codes" adds to it atomically.
    """
    at_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    across = tl.arange(0, PADDED)[None, :]
    begin = tl.program_id(1) * slice_columns
    end = tl.minimum(begin + slice_columns, columns)
    if PHASE == "all":
        side = projected(x, down, at_m, rows, x_stride, columns, begin, end, WIDTH, RANK, PADDED, TERMS)
        side = store_side(side, sides, at_m, rows, RANK, PADDED)
    elif PHASE == "ranges":
        side = rounded_to(gathered(partial, at_m, rows, slices, PADDED), sides)
        first = (tl.program_id(1) == 0) & (at_m[:, None] < rows) & (across < RANK)
        tl.store(sides + at_m[:, None].to(tl.int64) * RANK + across, side, mask=first)
    else:
        inside = (at_m[:, None] < rows) & (across < RANK)
        side = tl.load(sides + at_m[:, None].to(tl.int64) * RANK + across, mask=inside, other=0.0)
    if ROTATE:
        line = tl.arange(0, WIDTH)
        matrix = tl.load(right + line[:, None] * WIDTH + line[None, :])
    else:
        matrix = 0
    if PHASE != "codes":
        largest = tl.zeros((ROWS,), tl.int32)
        for start in range(begin, end, WIDTH):
            at_k = start + tl.arange(0, WIDTH)
            values = remainder(
                x, down, side, signs, matrix, at_m, rows, x_stride, at_k, columns, shrink,
                WIDTH, RANK, PADDED, SAME, ROTATE, SIGNED,
            )  # fmt: skip
            if GROUP:
                quantize_groups(
                    values, codes, scales, sums, at_m, rows, start, columns, code_columns, groups, clip,
                    WIDTH, GROUP, LARGEST, INTEGER, HALVES, SUMS,
                )  # fmt: skip
            else:
                largest = tl.maximum(largest, tl.max(magnitude_bits(values), 1))
        if PHASE == "ranges" and not GROUP:
            tl.store(maxima + tl.program_id(1).to(tl.int64) * rows + at_m, largest, mask=at_m < rows)
    if not GROUP and PHASE != "ranges":
        if PHASE == "codes":
            largest = tl.zeros((ROWS,), tl.int32)
            for one in range(0, slices):
                place = maxima + (one * rows + at_m).to(tl.int64)
                largest = tl.maximum(largest, tl.load(place, mask=at_m < rows, other=0))
        usable, by, scale = code_step(largest.to(tl.float32, bitcast=True) * clip, LARGEST, INTEGER)
        tl.store(scales + at_m, scale, mask=(at_m < rows) & (tl.program_id(1) == 0))
        total = tl.zeros((ROWS,), tl.int32)
        for start in range(begin, end, WIDTH):
            at_k = start + tl.arange(0, WIDTH)
            values = remainder(
                x, down, side, signs, matrix, at_m, rows, x_stride, at_k, columns, shrink,
                WIDTH, RANK, PADDED, SAME, ROTATE, SIGNED,
            )  # fmt: skip
            result = to_codes(values, usable[:, None], by[:, None], LARGEST, INTEGER)
            if SUMS:
                total += tl.sum(result.to(tl.int32), 1)
            store_tile(result, codes, at_m, rows, start, columns, code_columns, WIDTH, HALVES)
        if SUMS:
            tl.atomic_add(sums + at_m, total, mask=at_m < rows)
