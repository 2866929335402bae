"""The softmax of decode attention, tile by tile and part by part, in powers of two; G query heads, T tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import widen
from qtool.kernels.language.interpreted import INTERPRETED


@triton.jit
def dot(a, b, acc):
    """acc + a · b of two 16-bit or two float32 tiles; the sum in float32."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def capped(x, outer, SOFTCAP: tl.constexpr):
    """Scores as they are, or outer × tanh(x)."""
    if SOFTCAP:
        # tanh(10) is 1 in float32. A comparison keeps NaN, a minimum may not.
        x = tl.where(x > 10.0, 10.0, tl.where(x < -10.0, -10.0, x))
        x = outer * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0))
    return x


@triton.jit
def shares_of(scores, top):
    """A tile's shares [G, T] against the largest score so far, what earlier ones fade by [G], and that score."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    return tl.exp2(scores - higher[:, None]), tl.exp2(top - higher), higher


@triton.jit
def add_parts(acc, top, total, sums, arrivals, part, count, block, MOST_PARTS: tl.constexpr):
    """Leave this part's output, maximum and sum; the last of `count` parts to arrive takes all of them, in order.

    Args:
        acc: float32 [G, c], the part's shares times its values.
        top, total: float32 [G], its largest score and the sum of its shares.
        sums, arrivals: the workspace, in `tl.num_programs(0)` slots a block.
        part, count: this one, and how many the sequence has.
        block: of the workspace.
        MOST_PARTS: count is at most one more.

    Returns:
        acc, top, total of the whole sequence, and whether this program is to store them.
    """
    width: tl.constexpr = acc.shape[0]
    lanes: tl.constexpr = acc.shape[1]
    size: tl.constexpr = (lanes + 2) * width
    g = tl.arange(0, width)
    place = g[:, None] * lanes + tl.arange(0, lanes)[None, :]
    first = sums + block * tl.num_programs(0) * size
    tops = first + lanes * width
    totals = tops + width
    last = count == 1
    if count > 1:
        tl.store(first + part * size + place, acc)
        tl.store(tops + part * size + g, top)
        tl.store(totals + part * size + g, total)
        # One thread counts for all of the block: the others' stores must come before.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + block, 1, sem="acq_rel", scope="gpu") == count - 1
        if last:
            tl.store(arrivals + block, 0)
            # Past the first-level cache, which other multiprocessors' stores do not reach.
            slot = tl.arange(0, triton.next_power_of_2(MOST_PARTS + 1))[:, None]
            there = slot < count
            every = slot * size + g[None, :]
            found = tl.load(tops + every, mask=there, other=-float("inf"), cache_modifier=".cg")
            top = tl.max(found, axis=0)
            weight = tl.exp2(found - top[None, :])
            total = tl.sum(tl.load(totals + every, mask=there, other=0.0, cache_modifier=".cg") * weight, axis=0)
            acc = tl.zeros((width, lanes), tl.float32)
            for i in range(0, count):
                fade = tl.exp2(tl.load(tops + i * size + g, cache_modifier=".cg") - top)
                acc += tl.load(first + i * size + place, cache_modifier=".cg") * fade[:, None]
    return acc, top, total, last
