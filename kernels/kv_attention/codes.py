"""Codes of a cache as tiles for the tensor cores, two bytes at a time.

Both operands of a 16-bit product hold neighbours in one register: of keys two channels, of values two tokens. A cache
loaded as 16-bit words gives that for free in either direction; each word holds two bytes, the codes of 2 or 4 channels.
To take the first code of every word, then the second, and so on, is an order that costs nothing (`channels`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.kernels.language import to_bf16, widen

# A register holds the words of two neighbours. 128 + the low seven bits, less 128 or, for a negative code, 256.
INT8_CODES = tl.constexpr(
    """{ .reg .b32 t, m, n, one; mov.b32 one, 0x3F803F80; shr.u32 t, $2, 8;
    lop3.b32 m, $2, 0x007F007F, 0x43004300, 0xEA; lop3.b32 n, $2, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $0, m, one, n;
    lop3.b32 m, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 n, t, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $1, m, one, n; }"""
)
# Code ^ 8 is code + 8, and 128 more comes with the exponent: see BIAS. The table 0x6A is (a & b) ^ c.
INT4_CODES = tl.constexpr(
    """{ .reg .b32 t; lop3.b32 $0, $4, 0x000F000F, 0x43084308, 0x6A;
    shr.u32 t, $4, 4; lop3.b32 $1, t, 0x000F000F, 0x43084308, 0x6A;
    shr.u32 t, $4, 8; lop3.b32 $2, t, 0x000F000F, 0x43084308, 0x6A;
    shr.u32 t, $4, 12; lop3.b32 $3, t, 0x000F000F, 0x43084308, 0x6A; }"""
)
# What tiles of int4 hold above the codes. To take it off each code costs as much as unpacking it; it is taken off the
# sums, whose float32 has the bits to spare.
BIAS = tl.constexpr(136.0)
# E4M3's exponent and mantissa in bfloat16's places count 2¹²⁰ too little; subnormal ones come out right as well.
E4M3_CODES = tl.constexpr(
    """{ .reg .b32 t, m, up, zero; mov.b32 up, 0x7B807B80; mov.b32 zero, 0x80008000;
    shl.b32 t, $2, 8; and.b32 t, t, 0x80008000; shl.b32 m, $2, 4; lop3.b32 m, m, 0x07F007F0, t, 0xEA;
    fma.rn.bf16x2 $0, m, up, zero;
    and.b32 t, $2, 0x80008000; shr.u32 m, $2, 4; lop3.b32 m, m, 0x07F007F0, t, 0xEA;
    fma.rn.bf16x2 $1, m, up, zero; }"""
)


@triton.jit
def channels(C: tl.constexpr, FORMAT: tl.constexpr):
    """The channel of each column of a tile of codes, [c] padded to a power of two; C or more where there is none."""
    words: tl.constexpr = C // 4 if FORMAT == "int4" else C // 2
    padded: tl.constexpr = triton.next_power_of_2(words)
    if FORMAT == "int4":
        i = tl.arange(0, padded * 4)
        word, code = i % padded, i // padded
        # Low nibbles belong to the first half of the channels, high ones to the second.
        channel = 2 * word + code // 2 + code % 2 * (C // 2)
    else:
        i = tl.arange(0, padded * 2)
        word, code = i % padded, i // padded
        channel = 2 * word + code
    return tl.where(word < words, channel, C)


@triton.jit
def e4m3_value(byte):
    """A byte's E4M3 value in float32 (480 for NaN, which a cache's scale holds already)."""
    bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def unpacked(words, FORMAT: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Words [T, w] to their codes, exactly, one column a code in the order of `channels`; of int4 `BIAS` more."""
    rows: tl.constexpr = words.shape[0]
    width: tl.constexpr = words.shape[1]
    if FORMAT == "int4":
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                INT4_CODES, "=r,=r,=r,=r,r", [words], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=2
            )
        else:
            wide = words.to(tl.int32)
            a = ((wide << 28) >> 28).to(tl.float32) + BIAS
            b = ((wide << 24) >> 28).to(tl.float32) + BIAS
            c = ((wide << 20) >> 28).to(tl.float32) + BIAS
            d = ((wide << 16) >> 28).to(tl.float32) + BIAS
        found = tl.permute(tl.join(tl.join(a.to(dtype), b.to(dtype)), tl.join(c.to(dtype), d.to(dtype))), (0, 3, 2, 1))
        return tl.reshape(found, (rows, 4 * width))
    else:
        if ASM and FORMAT == "int8":
            a, b = tl.inline_asm_elementwise(
                INT8_CODES, "=r,=r,r", [words], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2
            )
        elif ASM:
            a, b = tl.inline_asm_elementwise(
                E4M3_CODES, "=r,=r,r", [words], dtype=(tl.bfloat16,) * 2, is_pure=True, pack=2
            )
        elif FORMAT == "int8":
            wide = words.to(tl.int32)
            a = ((wide << 24) >> 24).to(tl.float32)
            b = (wide >> 8).to(tl.float32)
        else:
            wide = words.to(tl.int32)
            a = e4m3_value(wide & 0xFF)
            b = e4m3_value((wide >> 8) & 0xFF)
        return tl.reshape(tl.permute(tl.join(a.to(dtype), b.to(dtype)), (0, 2, 1)), (rows, 2 * width))


@triton.jit
def as_type(x, dtype: tl.constexpr):
    """A float32 tile in `dtype`, to nearest."""
    if dtype == tl.bfloat16:
        return to_bf16(x)
    else:
        return x.to(dtype)


@triton.jit
def exact_tile(exact, place, inside, FORMAT: tl.constexpr, C: tl.constexpr):
    """Tokens kept in 16 bits at `place` [T], whose channels stand in the order that codes of FORMAT have: [T, c]."""
    rows: tl.constexpr = place.shape[0]
    halves: tl.constexpr = 2 if FORMAT == "int4" else 1
    width: tl.constexpr = triton.next_power_of_2(C // halves)
    # Read as they lie, then put in order: the order's own addresses would be two bytes each.
    c = tl.arange(0, width)[None, None, :]
    half = tl.arange(0, halves)[None, :, None]
    there = inside[:, None, None] & (c < C // halves)
    found = tl.load(exact + place[:, None, None] * C + half * (C // halves) + c, mask=there, other=0.0)
    found = tl.permute(tl.reshape(found, (rows, halves, width // 2, 2)), (0, 3, 1, 2))
    return tl.reshape(found, (rows, halves * width))


@triton.jit
def code_terms(scale, offset, place, there, FORMAT: tl.constexpr, OFFSET: tl.constexpr):
    """What turns codes counted from the middle one into values: x = step × code + shift, float32, shaped as `place`."""
    step = widen(tl.load(scale + place, mask=there, other=0.0))
    # An infinite scale stands for a token that is lost, whatever its codes.
    step = tl.where(tl.abs(step) == float("inf"), float("nan"), step)
    shift = tl.zeros_like(step)
    if OFFSET:
        middle: tl.constexpr = 8.0 if FORMAT == "int4" else 128.0
        shift = widen(tl.load(offset + place, mask=there, other=0.0)) + middle * step
    return step, shift


@triton.jit
def code_tile(codes, place, inside, FORMAT: tl.constexpr, C: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Codes of the tokens at `place` [T], counted from the middle one, exactly: [T, c]; of int4 `BIAS` more."""
    words: tl.constexpr = C // 4 if FORMAT == "int4" else C // 2
    w = tl.arange(0, triton.next_power_of_2(words))[None, :]
    found = tl.load(codes + place[:, None] * words + w, mask=inside[:, None] & (w < words), other=0)
    return unpacked(found, FORMAT, dtype, ASM)


@triton.jit
def value_tile(
    codes,
    scale,
    offset,
    place,
    inside,
    FORMAT: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    C: tl.constexpr,
    dtype: tl.constexpr,
    ASM: tl.constexpr,
):
    """What the codes of the tokens at `place` [T] stand for, with a scale for each group of channels: [T, c]."""
    rows: tl.constexpr = place.shape[0]
    found = widen(code_tile(codes, place, inside, FORMAT, C, dtype, ASM))
    width: tl.constexpr = found.shape[1]
    halves: tl.constexpr = 2 if FORMAT == "int4" else 1
    owned: tl.constexpr = C // halves // GROUP
    # Of a column's place (byte of the word, half, word) the group is the half and the word's upper part.
    groups: tl.constexpr = width // halves // GROUP
    group = tl.arange(0, groups)[None, None, :]
    number = place[:, None, None] * (C // GROUP) + tl.arange(0, halves)[None, :, None] * owned + group
    step, shift = code_terms(scale, offset, number, inside[:, None, None] & (group < owned), FORMAT, OFFSET)
    found = tl.reshape(found, (rows, 2, halves, groups, GROUP // 2))
    if FORMAT == "int4":
        found -= BIAS
    found = found * step[:, None, :, :, None] + shift[:, None, :, :, None]
    return as_type(tl.reshape(found, (rows, width)), dtype)
