"""Casts that are exact, or rounded to nearest with ties to even, compiled and interpreted alike.

Triton's interpreter cuts float32 to bfloat16 instead of rounding it, loses carries on the way to E4M3, reads E4M3's NaN
as 480 and bfloat16's subnormal numbers as 0, wraps floats beyond an integer's range, and computes on a bfloat16's bits
as if they were an integer. Interpreted, the casts below therefore work on the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language.interpreted import INTERPRETED

# 1.5 × 2²³: a float32 of this size counts in ones, so adding it rounds to an integer held in the low bits.
ONES = tl.constexpr(12582912.0)
# 2¹⁴: a float32 of this size counts in 2⁻⁹, the unit of E4M3's subnormal numbers.
E4M3_UNITS = tl.constexpr(16384.0)
E4M3_SMALLEST_NORMAL = tl.constexpr(0.015625)
E4M3_BIAS = tl.constexpr(2.0**120)
E4M3_LARGEST = tl.constexpr(448.0)


@triton.jit
def widen(x):
    """A loaded bfloat16, float16, float32 or E4M3 tensor as float32, exactly. Do it before any arithmetic."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif INTERPRETED and x.dtype == tl.float8e4nv:
        code = x.to(tl.uint8, bitcast=True).to(tl.uint32)
        # The fields in float32's places, with E4M3's bias of 7 instead of 127; subnormal numbers come right too.
        value = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True) * E4M3_BIAS
        return tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    else:
        return x.to(tl.float32)


@triton.jit
def to_bf16(x):
    """Float32 to bfloat16, to nearest, ties to even; NaN stays NaN."""
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def to_e4m3(x):
    """Float32 to E4M3 (float8e4nv), to nearest, ties to even, saturating at ±448; NaN stays NaN."""
    x = tl.where(x > E4M3_LARGEST, E4M3_LARGEST, x)
    x = tl.where(x < -E4M3_LARGEST, -E4M3_LARGEST, x)
    if INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Three bits of mantissa are kept, and the exponent's bias goes from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        tiny = tl.abs(x) + E4M3_UNITS
        tiny = tiny.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(tl.abs(x) < E4M3_SMALLEST_NORMAL, tiny, normal)
        code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def to_int8(x):
    """Float32 to int8, to nearest, ties to even, saturating at ±127 (never −128). NaN gives an unspecified code."""
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return (x + ONES).to(tl.int32, bitcast=True).to(tl.int8)
