"""Which tile of y a block computes, and its loads of what changes along K."""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import unpack_x16

TOKEN_TILES_A_GROUP = tl.constexpr(8)


@triton.jit
def tile_of(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(n, m) of this block's tile; neighbours share weights, then tokens, while those are in the L2 cache."""
    n_tiles = tl.cdiv(N, BLOCK_N)
    m_tiles = tl.cdiv(M, BLOCK_M)
    block = tl.program_id(0)
    group = block // (TOKEN_TILES_A_GROUP * n_tiles)
    first = group * TOKEN_TILES_A_GROUP
    size = tl.minimum(m_tiles - first, TOKEN_TILES_A_GROUP)
    inside = block % (TOKEN_TILES_A_GROUP * n_tiles)
    return inside // size, first + inside % size


@triton.jit
def load_tokens(at, inside, left, PACKED: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr):
    """Both halves of a K tile of activations, int8 [BLOCK_M, 64] each; nibbles × 16 when they are packed.

    Args:
        at: pointers to the first half, or to the packed bytes, [BLOCK_M, 64].
        inside: which rows are tokens [BLOCK_M].
        left: columns from the start of this tile to the end of K.
    """
    if PACKED:
        low, high = unpack_x16(tl.load(at, mask=inside[:, None], other=0), ASM)
    elif EVEN_K:
        low = tl.load(at, mask=inside[:, None], other=0)
        high = tl.load(at + 64, mask=inside[:, None], other=0)
    else:
        column = tl.arange(0, 64)[None, :]
        low = tl.load(at, mask=inside[:, None] & (column < left), other=0)
        high = tl.load(at + 64, mask=inside[:, None] & (column + 64 < left), other=0)
    return low, high


@triton.jit
def load_group(at, row, inside, row_stride, group_stride, half_tile, K, GROUP: tl.constexpr, EVEN_K: tl.constexpr):
    """One number a row for the group that the 64-column half tile `half_tile` lies in; 0 for a group beyond K.

    Args:
        at: [rows, groups] with any strides.
        row: int64 [rows]; inside: which of them to read, or None for all.
        GROUP: columns of a group, a multiple of 64; 0 for one number a row.
    """
    place = at + row * row_stride
    if GROUP > 0:
        group = half_tile // (GROUP // 64)
        place += group * group_stride  # far below 2³¹: one number stands for 64 columns at least
    if GROUP == 0 or EVEN_K:
        if inside is None:
            return tl.load(place)
        else:
            return tl.load(place, mask=inside, other=0)
    else:
        there = group * GROUP < K
        if inside is None:
            return tl.load(place, mask=there, other=0)
        else:
            return tl.load(place, mask=inside & there, other=0)


@triton.jit
def load_pair(at, row, row_stride, group_stride, tile, K, GROUP: tl.constexpr):
    """A row's numbers for both halves of a K tile, 0 for groups beyond K; arguments as in `load_group`."""
    low = load_group(at, row, None, row_stride, group_stride, 2 * tile, K, GROUP, False)
    if GROUP % 128 == 0:
        return low, low
    else:
        return low, load_group(at, row, None, row_stride, group_stride, 2 * tile + 1, K, GROUP, False)


@triton.jit
def load_factor(at, group_stride, half_tile, K, GROUP: tl.constexpr):
    """The factor that all tokens share in a half tile, 0 beyond K."""
    group = half_tile // (GROUP // 64)
    return tl.load(at + group * group_stride, mask=group * GROUP < K, other=0)
