"""What belongs to the groups of columns that one K tile holds: scales and zero points, a vector along N for each group.

A tile of BK columns holds BK / GROUP groups, or a part of one. Group g of the tile is element g of the tuple.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_groups(at, t, groups, stride, GROUP: tl.constexpr, BK: tl.constexpr):
    """The values of tile t's groups, as loaded; 0 beyond the last group, where the columns are padding.

    Args:
        at: pointers to group 0 of each row [BN].
        t: the tile along K; may lie beyond the last, so that a loop can load one tile ahead.
        groups, stride: how many a row has, and the distance between two.
        GROUP: its columns: 32, 64, or a multiple of BK.
    """
    # The mask of all rows at once, in the pointers' own shape.
    first = t * BK // GROUP + tl.zeros(at.shape, tl.int32)
    if GROUP >= BK:
        return (tl.load(at + first * stride, mask=first < groups, other=0),)
    elif GROUP * 2 == BK:
        return (
            tl.load(at + first * stride, mask=first < groups, other=0),
            tl.load(at + (first + 1) * stride, mask=first + 1 < groups, other=0),
        )
    else:
        tl.static_assert(GROUP * 4 == BK)
        return (
            tl.load(at + first * stride, mask=first < groups, other=0),
            tl.load(at + (first + 1) * stride, mask=first + 1 < groups, other=0),
            tl.load(at + (first + 2) * stride, mask=first + 2 < groups, other=0),
            tl.load(at + (first + 3) * stride, mask=first + 3 < groups, other=0),
        )
