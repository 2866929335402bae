"""Float sums of a K that was cut into parts, added in the order of K: the same bits whatever the order of arrival."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of_k(k_tiles, PARTS: tl.constexpr):
    """The first tile along K of this program's part (axis 1 of the grid), and the one past its last."""
    part = tl.program_id(1)
    return part * k_tiles // PARTS, (part + 1) * k_tiles // PARTS


@triton.jit
def ordered_sum(acc, sums, arrivals, place, inside, PARTS: tl.constexpr):
    """Leave this part's sum; the last of a tile's parts to arrive takes all of them, first to last.

    Args:
        acc: float32 [I, J], the sum of part program_id(1) of tile program_id(0).
        sums, arrivals: the workspace.
        place: of each element inside the tile, int32 [I, J], below I × J.
        inside: the elements that will be stored, [I, J].
        PARTS: programs on axis 1 of the grid.

    Returns:
        The tile's sum, and whether this program is to store it.
    """
    if PARTS == 1:
        return acc, True
    else:
        size: tl.constexpr = acc.shape[0] * acc.shape[1]
        tile = tl.program_id(0)
        first = sums + tile.to(tl.int64) * (PARTS * size) + place
        tl.store(first + tl.program_id(1) * size, acc, mask=inside)
        # One thread counts for all of the block: the others' stores must come before.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel", scope="gpu") == PARTS - 1
        total = tl.zeros(acc.shape, tl.float32)
        # Four parts' loads under way at once.
        for part in tl.range(0, tl.where(last, PARTS, 0), loop_unroll_factor=4):
            # Past the first-level cache, which other multiprocessors' stores do not reach.
            total += tl.load(first + part * size, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(arrivals + tile, 0, mask=last)
        return total, last


@triton.jit
def tile_place(m_tiles, n_tiles, GROUP: tl.constexpr):
    """The tile (along N, along M) of program_id(0): GROUP tiles of N share their activations before M moves on."""
    tile = tl.program_id(0)
    whole = GROUP * m_tiles
    first = tile // whole * GROUP
    width = tl.minimum(n_tiles - first, GROUP)
    return first + tile % whole % width, tile % whole // width
