"""Matrix products of one tile, the same compiled and interpreted.

The interpreter multiplies integers without a fast library, half floats in float16 and bfloat16 by their bits; it is
given float32 there, in which a tile's integer sum (up to 1024 products of int8) is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language.casts import widen
from qtool.kernels.language.interpreted import INTERPRETED

EXACT_PRODUCTS = tl.constexpr(1024)  # 1024 × 128 × 128 = 2²⁴


@triton.jit
def dot_int8(a, b, acc):
    """acc + a · b for int8 a [I, K] and b [K, J] and an int32 sum [I, J]; exact."""
    if INTERPRETED:
        tl.static_assert(a.shape[1] <= EXACT_PRODUCTS)
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee").to(tl.int32)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def dot_e4m3(a, b, acc):
    """acc + a · b for E4M3 a [I, K] and b [K, J] and a float32 sum [I, J].

    The products are exact; a GPU adds them in its own order, on Hopper with fewer than 24 bits.
    """
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def dot_bf16(a, b, acc):
    """acc + a · b for bfloat16 (or float16) a [I, K] and b [K, J] and a float32 sum [I, J]; the products are exact."""
    if INTERPRETED:
        return tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)
