"""Runtime Smooth on a GPU: each token's size, each request's tile ranges, each row's codes.

Ranges are maxima of |x| as integers (`magnitude_bits`), merged by atomic maxima: any order gives the same bits, and NaN
stays on top.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import to_int8, widen
from qtool.kernels.quantize_activation.triton_kernel import magnitude_bits, store_codes

SMALLEST_FACTOR = tl.constexpr(2.0**-100)
SMALLEST_FACTOR_BITS = tl.constexpr((127 - 100) << 23)
LARGEST_CODE = tl.constexpr(7.0)
LARGEST_FINITE = tl.constexpr(3.4028234663852886e38)


@triton.jit
def token_levels_kernel(x, levels, x_stride, columns, BLOCK: tl.constexpr):
    """levels[m] = 1 / RMS of row m; 1 for a row of zeros or one whose mean square is not finite."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = widen(tl.load(x + row * x_stride + at, mask=at < columns, other=0.0))
        squares += values * values
    mean = tl.div_rn(tl.sum(squares, 0), columns * 1.0)
    usable = (mean > 0.0) & (mean <= LARGEST_FINITE)
    tl.store(levels + row, tl.where(usable, tl.div_rn(mean * 0 + 1.0, tl.sqrt_rn(tl.where(usable, mean, 1.0))), 1.0))


@triton.jit
def tile_ranges_kernel(
    x, levels, starts, ranges, x_stride, tiles, chunk,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LEVEL: tl.constexpr,
):  # fmt: skip
    """ranges[r, g] (int32 bits, zero before) = max |x| × level over request r's rows and tile g's columns.

    Program (g, r, c) takes `chunk` rows of its request. A request of one row is not levelled.
    """
    tile = tl.program_id(0)
    request = tl.program_id(1)
    first = tl.load(starts + request)
    end = tl.load(starts + request + 1)
    begin = first + tl.program_id(2) * chunk
    last = tl.minimum(begin + chunk, end)
    columns = tile * GROUP + tl.arange(0, GROUP)
    found = tl.zeros((ROWS, GROUP), tl.int32)
    for start in range(begin, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < last
        values = widen(
            tl.load(x + rows[:, None].to(tl.int64) * x_stride + columns[None, :], mask=inside[:, None], other=0.0)
        )
        if LEVEL:
            level = tl.load(levels + rows, mask=inside, other=1.0)
            values = values * tl.where(end - first > 1, level, 1.0)[:, None]
        found = tl.maximum(found, magnitude_bits(values))
    if begin < end:
        tl.atomic_max(ranges + request.to(tl.int64) * tiles + tile, tl.max(tl.max(found, 1), 0))


@triton.jit
def smoothed_codes_kernel(
    x, factors, request, codes, token_range, x_stride, columns, code_columns, tiles, clip,
    GROUP: tl.constexpr, TILES: tl.constexpr, HALVES: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One row's codes under its request's factors [R, tiles], and its range a_t. TILES × GROUP holds the row.

    With SINGLE the row is all of its request: its tiles' ranges are the factors, and are written.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    places = tile[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = widen(tl.load(x + row * x_stride + places, mask=places < columns, other=0.0))
    line = tl.load(request + row).to(tl.int64) * tiles
    largest_of_tile = tl.max(magnitude_bits(values), 1)
    if SINGLE:
        # As integers, so that NaN stays.
        factor = tl.maximum(largest_of_tile, SMALLEST_FACTOR_BITS).to(tl.float32, bitcast=True)
        tl.store(factors + line + tile, factor, mask=tile < tiles)
    else:
        factor = tl.load(factors + line + tile, mask=tile < tiles, other=1.0)
    relative = tl.div_rn(largest_of_tile.to(tl.float32, bitcast=True), factor)
    largest = tl.max(magnitude_bits(relative), 0).to(tl.float32, bitcast=True) * clip
    tl.store(token_range + row, largest)
    whole = factor * largest
    usable = (whole > SMALLEST_FACTOR) & (whole <= LARGEST_FINITE)
    by = tl.where(usable, tl.div_rn(tl.zeros_like(whole) + LARGEST_CODE, tl.where(usable, whole, 1.0)), 0.0)
    scaled = tl.where(usable[:, None], values * by[:, None], 0.0)
    result = to_int8(tl.minimum(tl.maximum(scaled, -LARGEST_CODE), LARGEST_CODE))
    store_codes(result, codes + row * code_columns, places, columns, HALVES, TILES * GROUP)
