"""The shared jit helpers, interpreted: every cast, unpacking and product against torch or plain integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from qtool.kernels.language import (
    INTERPRETED,
    dot_bf16,
    dot_e4m3,
    dot_int8,
    to_bf16,
    to_e4m3,
    to_int8,
    unpack_e4m3,
    unpack_x16,
    uses_assembly,
    widen,
)

BLOCK = 1024


@triton.jit
def cast(x, y, n, TO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = widen(tl.load(x + at, mask=at < n, other=0.0))
    if TO == 0:
        value = to_bf16(value)
    elif TO == 1:
        value = to_e4m3(value)
    elif TO == 2:
        value = to_int8(value)
    tl.store(y + at, value, mask=at < n)


@triton.jit
def unpack(w, low, high, HOW: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    packed = tl.load(w + at)
    if HOW == 0:
        a, b = unpack_x16(packed, False)
    else:
        a, b = unpack_e4m3(packed, False)
    tl.store(low + at, a)
    tl.store(high + at, b)


@triton.jit
def product(a, b, y, HOW: tl.constexpr, N: tl.constexpr, K: tl.constexpr, M: tl.constexpr):
    rn, rk, rm = tl.arange(0, N), tl.arange(0, K), tl.arange(0, M)
    left, right = tl.load(a + rn[:, None] * K + rk[None, :]), tl.load(b + rm[:, None] * K + rk[None, :])
    if HOW == 0:
        acc = dot_int8(left, right.T, tl.full((N, M), 7, tl.int32))
    elif HOW == 1:
        acc = dot_e4m3(left, right.T, tl.full((N, M), 7, tl.float32))
    else:
        acc = dot_bf16(left, right.T, tl.full((N, M), 7, tl.float32))
    tl.store(y + rn[:, None] * M + rm[None, :], acc)


def floats() -> torch.Tensor:
    """Float32 of every size beside the numbers half-way between neighbours of each small type."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator, dtype=torch.int64).to(torch.int32)
    every = torch.arange(0x10000, dtype=torch.int32) << 16
    half = every | 0x8000
    sized = torch.randn(20000, generator=generator) * 2.0 ** torch.randint(-14, 10, (20000,), generator=generator)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (e4m3[1:] + e4m3[:-1]) / 2
    beyond = torch.tensor([448.0, 464.0, 465.0, 1e30, float("inf"), float("nan")])
    near = torch.cat((between, between.nextafter(torch.tensor(0.0)), between.nextafter(torch.tensor(9e9)), beyond))
    words = torch.cat((bits, every, half)).view(torch.float32)
    return torch.cat((words, sized, near, -near))


def run_cast(x: torch.Tensor, to: int, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), TO=to, BLOCK=BLOCK)
    return y


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_to_bf16_rounds_as_torch_does(guarded: Any) -> None:
    x = floats()
    same(run_cast(guarded(x), 0, torch.bfloat16).float(), x.to(torch.bfloat16).float())


def test_to_e4m3_rounds_as_torch_does_and_saturates(guarded: Any) -> None:
    x = floats()
    got = run_cast(guarded(x), 1, torch.float8_e4m3fn)
    same(got.float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_to_int8_rounds_half_to_even_and_saturates_at_127(guarded: Any) -> None:
    x = torch.cat((torch.arange(-600, 601) / 4.0, torch.tensor([1e9, -1e9, float("inf"), -float("inf")])))
    assert torch.equal(run_cast(guarded(x), 2, torch.int8), x.round().clamp(-127, 127).to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_widen_is_exact_for_every_number(dtype: torch.dtype, guarded: Any) -> None:
    count = 1 << (8 * dtype.itemsize)
    bits = torch.arange(count, dtype=torch.int32).to(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    x = bits.view(dtype)
    same(run_cast(guarded(x), 3, torch.float32), x.float())


EVERY_BYTE = torch.arange(256, dtype=torch.uint8).view(16, 16)
LOW, HIGH = (EVERY_BYTE & 15).int(), (EVERY_BYTE >> 4).int()


def signed(nibble: torch.Tensor) -> torch.Tensor:
    return (nibble ^ 8) - 8


def sign_magnitude(nibble: torch.Tensor) -> torch.Tensor:
    return torch.where(nibble >= 8, -(nibble & 7), nibble & 7) * 2.0**-9


@pytest.mark.parametrize(
    ("how", "dtype", "value"),
    [
        (0, torch.int8, lambda n: signed(n) * 16),
        (1, torch.float8_e4m3fn, sign_magnitude),
    ],
    ids=["x16", "e4m3"],
)
def test_both_nibbles_of_every_byte(how: int, dtype: torch.dtype, value: Any, guarded: Any) -> None:
    low, high = torch.empty(16, 16, dtype=dtype), torch.empty(16, 16, dtype=dtype)
    unpack[(1,)](guarded(EVERY_BYTE), low, high, HOW=how, COLUMNS=16)
    assert torch.equal(low.float(), value(LOW).float())
    assert torch.equal(high.float(), value(HIGH).float())


@pytest.mark.parametrize(("how", "dtype"), [(0, torch.int8), (1, torch.float8_e4m3fn), (2, torch.bfloat16)])
def test_a_tile_product_is_exact(how: int, dtype: torch.dtype, guarded: Any) -> None:
    generator = torch.Generator().manual_seed(how)
    a = torch.randint(-8, 8, (16, 1024), generator=generator).to(dtype)
    b = torch.randint(-8, 8, (16, 1024), generator=generator).to(dtype)
    if dtype is torch.int8:
        a[0], b[0] = -128, -128
    y = torch.empty(16, 16, dtype=torch.int32 if how == 0 else torch.float32)
    product[(1,)](guarded(a), guarded(b), y, HOW=how, N=16, K=1024, M=16)
    assert torch.equal(y.double(), 7 + a.double() @ b.double().T)


def test_no_assembly_under_the_interpreter() -> None:
    assert INTERPRETED
    assert not uses_assembly(torch.device("cuda"))
