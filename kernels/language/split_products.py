"""Matrix products of float32 operands at float32's accuracy, from products of bfloat16.

A float32 number is the sum of three bfloat16 numbers, a float16 number of two (normal ones; the third term of a float32
below 2⁻¹⁰⁹ may be lost). Products of bfloat16 are exact in the float32 sum, so the terms' products lose nothing but the
rounding of the sum. It runs on every tensor core, AMD's too, where TF32 does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language.casts import to_bf16, widen
from qtool.kernels.language.dots import dot_bf16


@triton.jit
def dot_split_left(a, b, acc, TERMS: tl.constexpr):
    """acc + a · b for float32 a [I, K] taken as TERMS (1…3) bfloat16 terms, bfloat16 b [K, J], float32 acc [I, J]."""
    for term in tl.static_range(TERMS):
        high = to_bf16(a)
        acc = dot_bf16(high, b, acc)
        if term + 1 < TERMS:
            a = a - widen(high)
    return acc


@triton.jit
def dot_split_right(a, b, acc, TERMS: tl.constexpr):
    """acc + a · b for bfloat16 a [I, K], float32 b [K, J] taken as TERMS (1…3) bfloat16 terms, float32 acc [I, J]."""
    for term in tl.static_range(TERMS):
        high = to_bf16(b)
        acc = dot_bf16(a, high, acc)
        if term + 1 < TERMS:
            b = b - widen(high)
    return acc


@triton.jit
def dot_split(a, b, acc, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """acc + a · b for float32 a [I, K] and b [K, J] taken as LEFT and RIGHT bfloat16 terms; LEFT × RIGHT products."""
    for term in tl.static_range(RIGHT):
        high = to_bf16(b)
        acc = dot_split_left(a, high, acc, LEFT)
        if term + 1 < RIGHT:
            b = b - widen(high)
    return acc
