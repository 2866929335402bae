"""Inline assembly on a GPU is its plain form: every byte, in every lane of a register, beside changing neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qtool.kernels.kv_attention.codes import unpacked
from qtool.kernels.language import unpack_e4m3, unpack_x16, uses_assembly
from qtool.kernels.w4a8_gemm.triton_unpack import unpack_rescaled
from qtool.kernels.w4a16_gemm.unpack import unpack_16bit, unpack_16bit_zeros

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 128, 64
TILE = tl.constexpr(ROWS * WIDTH)


@triton.jit
def at(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.program_id(0) * ROWS * WIDTH + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def times_16(packed, low, high, ASM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place = at(ROWS, WIDTH)
    a, b = unpack_x16(tl.load(packed + place), ASM)
    tl.store(low + place, a)
    tl.store(high + place, b)


@triton.jit
def as_e4m3(packed, low, high, ASM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place = at(ROWS, WIDTH)
    a, b = unpack_e4m3(tl.load(packed + place), ASM)
    tl.store(low + place, a.to(tl.int8, bitcast=True))
    tl.store(high + place, b.to(tl.int8, bitcast=True))


@triton.jit
def rescaled(packed, scale, zero, low, high, ASM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place = at(ROWS, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.load(scale + row)
    z = tl.load(zero + row)
    # The high nibbles have other scales and zero points than the low ones.
    a, b = unpack_rescaled(tl.load(packed + place), s, 9 - s, z, 8 - z, ASM)
    tl.store(low + place, a)
    tl.store(high + place, b)


@triton.jit
def sixteen_bits(
    packed,
    zero,
    low,
    high,
    ZEROS: tl.constexpr,
    HALF: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    place = at(ROWS, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    z = tl.load(zero + row)
    if ZEROS:
        a, b = unpack_16bit_zeros(tl.load(packed + place), z, 15 - z, HALF, ASM)
    else:
        a, b = unpack_16bit(tl.load(packed + place), HALF, ASM)
    tl.store(low + place, a.to(tl.float32))
    tl.store(high + place, b.to(tl.float32))


@triton.jit
def cache_words(
    words,
    out,
    FORMAT: tl.constexpr,
    CODES: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    found = unpacked(tl.load(words + at(ROWS, WIDTH)), FORMAT, tl.bfloat16, ASM)
    wide: tl.constexpr = WIDTH * CODES
    tl.store(out + at(ROWS, wide), found.to(tl.float32))


def blocks(device: torch.device) -> Tensor:
    """Bytes [n × 128, 64]: every byte in every lane of a word, many times, each lane in an order of its own."""
    draw = torch.Generator().manual_seed(0)
    lanes = [torch.arange(256).repeat(512)[torch.randperm(256 * 512, generator=draw)] for _ in range(4)]
    return torch.stack(lanes, -1).to(torch.uint8).reshape(-1, WIDTH).to(device)


def both(kernel: Any, inputs: list[Tensor], rows: int, dtype: torch.dtype, **switches: Any) -> list[list[Tensor]]:
    """The two outputs by assembly and by plain operations."""
    found = []
    for assembly in (True, False):
        out = [torch.empty(rows, WIDTH, dtype=dtype, device=inputs[0].device) for _ in range(2)]
        kernel[(rows // ROWS,)](*inputs, *out, **switches, ASM=assembly, ROWS=ROWS, WIDTH=WIDTH)
        found.append(out)
    return found


def equal(found: list[list[Tensor]]) -> None:
    for assembly, plain in zip(*found, strict=True):
        assert torch.equal(assembly, plain)


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Two's-complement values."""
    wide = packed.to(torch.int16)
    return tuple(torch.where(each >= 8, each - 16, each) for each in (wide & 15, wide >> 4))  # type: ignore[return-value]


def test_this_gpu_takes_assembly(device: torch.device) -> None:
    assert uses_assembly(device) == (torch.version.hip is None)


def test_times_16(device: torch.device) -> None:
    packed = blocks(device)
    found = both(times_16, [packed], len(packed), torch.int8)
    equal(found)
    for got, wanted in zip(found[0], nibbles(packed), strict=True):
        assert torch.equal(got.to(torch.int16), wanted * 16)


def test_sign_magnitude_as_e4m3(device: torch.device) -> None:
    packed = blocks(device)
    found = both(as_e4m3, [packed], len(packed), torch.int8)
    equal(found)
    low = packed & 15
    magnitude = (low & 7).float() * 2.0**-9
    assert torch.equal(found[0][0].view(torch.float8_e4m3fn).float(), torch.where(low >= 8, -magnitude, magnitude))


def test_scales_and_zero_points(device: torch.device) -> None:
    packed = blocks(device)
    scales = (torch.arange(len(packed), device=device) % 8 + 1).to(torch.uint8)
    zeros = (torch.arange(len(packed), device=device) // 8 % 9).to(torch.uint8)
    found = both(rescaled, [packed, scales, zeros], len(packed), torch.int8)
    equal(found)
    wanted = (nibbles(packed)[0] + 8 - zeros[:, None].to(torch.int16)) * scales[:, None].to(torch.int16)
    assert torch.equal(found[0][0].to(torch.int16), wanted)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_sixteen_bits(half: bool, zeros: bool, device: torch.device) -> None:
    packed = blocks(device)
    zero = (torch.arange(len(packed), device=device) % 16).to(torch.uint8)
    found = both(sixteen_bits, [packed, zero], len(packed), torch.float32, ZEROS=zeros, HALF=half)
    equal(found)
    wanted = nibbles(packed)[0] + 8 - (zero[:, None].to(torch.int16) if zeros else 8)
    assert torch.equal(found[0][0], wanted.float())


@pytest.mark.parametrize(("form", "codes"), [("int8", 2), ("int4", 4), ("fp8_e4m3", 2)])
def test_cache_words(form: str, codes: int, device: torch.device) -> None:
    words = blocks(device).view(torch.int16).reshape(-1, WIDTH)
    words = words[: len(words) // ROWS * ROWS]
    found = []
    for assembly in (True, False):
        out = torch.empty(len(words), WIDTH * codes, device=device)
        cache_words[(len(words) // ROWS,)](
            words, out, FORMAT=form, CODES=codes, ASM=assembly, ROWS=ROWS, WIDTH=WIDTH
        )
        found.append(out)
    assert torch.equal(*found)
