"""The two nibbles of each byte as two tensors: in assembly four bytes at a time, or in plain operations.

A packed byte j of a K tile of 128 holds k = j in its low and k = j + 64 in its high nibble (kernels/pack/halves.py), so
the two tensors belong to two contiguous halves of the activations. `ASM` is `uses_assembly(device)`.
The assembly is checked against the plain form for every byte in every lane (tests/kernels/compiled/test_recipes.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Weights × 16 need no sign extension: two's complement in the upper nibble is the value already.
TIMES_16 = tl.constexpr(
    """{ .reg .b32 t; shl.b32 t, $2, 4;
    and.b32 $0, t, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }"""
)
# Sign and magnitude in E4M3's own places: the byte s0000mmm reads as ±mmm × 2⁻⁹. The table 0xEA is (a & b) | c.
E4M3 = tl.constexpr(
    """{ .reg .b32 t, u; shl.b32 t, $2, 4; shr.u32 u, $2, 4;
    and.b32 t, t, 0x80808080; lop3.b32 $0, $2, 0x07070707, t, 0xEA;
    and.b32 u, u, 0x07070707; lop3.b32 $1, $2, 0x80808080, u, 0xEA; }"""
)


@triton.jit
def unpack_x16(packed, ASM: tl.constexpr):
    """Two's-complement nibbles to int8 (low, high), each the value × 16; shift the int32 sum right by 4 at the end.

    A sum of products with int8 is safe to K = 131071.
    """
    packed = packed.to(tl.int8, bitcast=True)
    if ASM:
        low, high = tl.inline_asm_elementwise(
            TIMES_16, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low = packed << 4
        high = packed & -16
    return low, high


@triton.jit
def unpack_e4m3(packed, ASM: tl.constexpr):
    """Sign-magnitude nibbles to E4M3 (low, high), each the value × 2⁻⁹, exactly; values −7…7."""
    packed = packed.to(tl.int8, bitcast=True)
    if ASM:
        low, high = tl.inline_asm_elementwise(E4M3, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = ((packed << 4) & -128) | (packed & 7)
        high = (packed & -128) | ((packed >> 4) & 7)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
