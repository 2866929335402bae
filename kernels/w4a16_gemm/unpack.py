"""The two nibbles of each byte as bfloat16 or float16 integers, less a zero point of the row's.

A nibble ^ 8 is the canonical code 0 … 15; below the byte 0x43 it makes the bfloat16 128 + code, below 0x64 the float16
1024 + code, and one addition takes 128 or 1024 and the zero point off, exactly. The assembly is checked for every byte
and zero point in every lane (tests/kernels/compiled/test_nibbles_to_16_bits.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

# All eight nibbles ^ 8, then a 0x43 or 0x64 beside each: {top}. {one}: 1 in both halves; {low01} … {high23}: what goes
# onto the low and the high nibbles of bytes 0, 1 and 2, 3. The lookup table 0x6A is (a & b) ^ c; prmt 0x4140 makes
# halves of the bytes 0 and 1 of its first operand, with byte 0 of its second above each.
PATTERN = """{{ .reg .b32 a, b, t, u, top, one, e, f, g, h; mov.b32 top, {top}; mov.b32 one, {one};
    mov.b32 e, {low01}; mov.b32 f, {low23}; mov.b32 g, {high01}; mov.b32 h, {high23};
    lop3.b32 t, $4, 0x0F0F0F0F, 0x08080808, 0x6A;
    prmt.b32 a, t, top, 0x4140; prmt.b32 b, t, top, 0x4342;
    fma.rn.{kind} $0, a, one, e; fma.rn.{kind} $1, b, one, f;
    shr.u32 u, $4, 4; lop3.b32 u, u, 0x0F0F0F0F, 0x08080808, 0x6A;
    prmt.b32 a, u, top, 0x4140; prmt.b32 b, u, top, 0x4342;
    fma.rn.{kind} $2, a, one, g; fma.rn.{kind} $3, b, one, h; }}"""
BF16 = {"kind": "bf16x2", "top": "0x43", "one": "0x3F803F80"}
FP16 = {"kind": "f16x2", "top": "0x64", "one": "0x3C003C00"}
# −136 or −1032 without zero points; with them each byte's own number, in the operands after it.
PLACES = ("low01", "low23", "high01", "high23")
OWN = dict(zip(PLACES, ("$5", "$6", "$7", "$8"), strict=True))
BF16_SYMMETRIC = tl.constexpr(PATTERN.format(**BF16, **dict.fromkeys(PLACES, "0xC308C308")))
FP16_SYMMETRIC = tl.constexpr(PATTERN.format(**FP16, **dict.fromkeys(PLACES, "0xE408E408")))
BF16_ZEROS = tl.constexpr(PATTERN.format(**BF16, **OWN))
FP16_ZEROS = tl.constexpr(PATTERN.format(**FP16, **OWN))


@triton.jit
def unpack_16bit(packed, FLOAT16: tl.constexpr, ASM: tl.constexpr):
    """Two's-complement nibbles −8 … 7 as float16 or bfloat16 (low, high)."""
    packed = packed.to(tl.int8, bitcast=True)
    kind: tl.constexpr = tl.float16 if FLOAT16 else tl.bfloat16
    if ASM and FLOAT16:
        low, high = tl.inline_asm_elementwise(
            FP16_SYMMETRIC, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    elif ASM:
        low, high = tl.inline_asm_elementwise(
            BF16_SYMMETRIC, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        # Through float32: the interpreter casts small integers to bfloat16 only from there.
        low = ((packed << 4) >> 4).to(tl.float32).to(kind)
        high = (packed >> 4).to(tl.float32).to(kind)
    return low, high


@triton.jit
def unpack_16bit_zeros(packed, low_zero, high_zero, FLOAT16: tl.constexpr, ASM: tl.constexpr):
    """Code − zero point, −15 … 15, as float16 or bfloat16 (low, high).

    Args:
        packed: bytes [N, J] of two's-complement nibbles.
        low_zero, high_zero: uint8 [N], the zero points of the rows' low and of their high nibbles; the same tensor
            when one group holds both.
        FLOAT16: float16, else bfloat16.
        ASM: `uses_assembly(device)`.
    """
    packed = packed.to(tl.int8, bitcast=True)
    kind: tl.constexpr = tl.float16 if FLOAT16 else tl.bfloat16
    if ASM:
        base: tl.constexpr = -1024.0 if FLOAT16 else -128.0
        below = tl.broadcast_to((base - low_zero.to(tl.float32)).to(kind)[:, None], packed.shape)
        above = tl.broadcast_to((base - high_zero.to(tl.float32)).to(kind)[:, None], packed.shape)
        if FLOAT16:
            low, high = tl.inline_asm_elementwise(
                FP16_ZEROS,
                "=r,=r,=r,=r,r,r,r,r,r",
                [packed, below, above],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                BF16_ZEROS,
                "=r,=r,=r,=r,r,r,r,r,r",
                [packed, below, above],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
    else:
        low = (((packed << 4) >> 4).to(tl.float32) + (8.0 - low_zero.to(tl.float32))[:, None]).to(kind)
        high = ((packed >> 4).to(tl.float32) + (8.0 - high_zero.to(tl.float32))[:, None]).to(kind)
    return low, high
