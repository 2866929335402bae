"""Nibbles less their zero points, times second-level scales: each half of a K tile with its own, four at a time."""

from __future__ import annotations

import triton
import triton.language as tl

# nibble ^ 8 is the code u; u·s + (128 − z·s) = (u − z)·s + 128 stays inside its byte when (u − z)·s is an int8; ^ 128
# ends it. The table 0x6A is (a & b) ^ c. A register's four scales, and four offsets, are a row's: the first is read.
RESCALED = tl.constexpr(
    """{ .reg .b32 u, v; shr.u32 v, $2, 4;
    lop3.b32 u, $2, 0x0F0F0F0F, 0x08080808, 0x6A; lop3.b32 v, v, 0x0F0F0F0F, 0x08080808, 0x6A;
    mad.lo.u32 u, u, $3, $11; mad.lo.u32 v, v, $7, $15;
    xor.b32 $0, u, 0x80808080; xor.b32 $1, v, 0x80808080; }"""
)
CONSTRAINTS = tl.constexpr("=r,=r,r" + ",r" * 16)
FOUR_128 = tl.constexpr(0x80808080 - (1 << 32))  # as int32


@triton.jit
def unpack_rescaled(packed, s_low, s_high, z_low, z_high, ASM: tl.constexpr):
    """(code − z) × s of two's-complement nibbles (code = nibble's value + 8): int8 (low, high) [rows, 64], exactly.

    Args:
        packed: bytes [rows, 64].
        s_low, s_high: uint8 [rows] scales of the low and of the high nibbles; None for 1.
        z_low, z_high: uint8 [rows] codes of zero; None for 8. (code − z) × s must be an int8 for the codes that occur.
    """
    shape: tl.constexpr = packed.shape
    s_low = _column(s_low, 1, shape)
    s_high = _column(s_high, 1, shape)
    z_low = _column(z_low, 8, shape)
    z_high = _column(z_high, 8, shape)
    if ASM:
        return tl.inline_asm_elementwise(
            RESCALED,
            CONSTRAINTS,
            [
                packed,
                tl.broadcast_to(s_low, shape),
                tl.broadcast_to(s_high, shape),
                tl.broadcast_to(FOUR_128 - 0x01010101 * z_low * s_low, shape),
                tl.broadcast_to(FOUR_128 - 0x01010101 * z_high * s_high, shape),
            ],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        packed = packed.to(tl.int8, bitcast=True)
        low = (((packed << 4) >> 4) + 8 - z_low.to(tl.int8)) * s_low.to(tl.int8)
        high = ((packed >> 4) + 8 - z_high.to(tl.int8)) * s_high.to(tl.int8)
        return low, high


@triton.jit
def _column(numbers, absent: tl.constexpr, shape: tl.constexpr):
    if numbers is None:
        return tl.full((shape[0], 1), absent, tl.int32)
    else:
        return numbers.to(tl.int32)[:, None]
