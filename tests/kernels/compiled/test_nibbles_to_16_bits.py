"""W4A16's inline assembly on 32-bit words: every byte and every zero point in every lane beside changing neighbours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.kernels.compile_check.registers import run_recipe

pytest.importorskip("triton")
from qtool.kernels.w4a16_gemm import unpack

GENERATOR = torch.Generator().manual_seed(0)
# Every byte with every zero point, 16 times over in an order of each lane's own.
PAIRS = torch.arange(4096).repeat(16)
LANES = torch.stack([PAIRS[torch.randperm(len(PAIRS), generator=GENERATOR)] for _ in range(4)], -1)
BYTES, ZEROS = LANES & 255, LANES >> 8
WORDS = (BYTES << 8 * torch.arange(4)).sum(-1)
CODES = ((BYTES & 15) ^ 8, (BYTES >> 4) ^ 8)
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def halves(words: tuple[Tensor, Tensor], kind: torch.dtype) -> Tensor:
    """The four numbers in two words, lowest first."""
    bits = torch.stack([word >> shift & 0xFFFF for word in words for shift in (0, 16)], -1)
    return bits.to(torch.int16).view(kind).double()


def pairs_of(numbers: Tensor, kind: torch.dtype) -> list[Tensor]:
    """Four numbers as two words."""
    bits = numbers.to(kind).view(torch.int16).long() & 0xFFFF
    return [bits[:, 0] | bits[:, 1] << 16, bits[:, 2] | bits[:, 3] << 16]


@pytest.mark.parametrize("kind", KINDS)
def test_without_zero_points(kind: str) -> None:
    recipe = {"bfloat16": unpack.BF16_SYMMETRIC.value, "float16": unpack.FP16_SYMMETRIC.value}[kind]
    a, b, c, d = run_recipe(recipe, [WORDS], 4)
    assert torch.equal(halves((a, b), KINDS[kind]), (CODES[0] - 8).double())
    assert torch.equal(halves((c, d), KINDS[kind]), (CODES[1] - 8).double())


@pytest.mark.parametrize("kind", KINDS)
def test_with_zero_points_of_every_byte(kind: str) -> None:
    recipe = {"bfloat16": unpack.BF16_ZEROS.value, "float16": unpack.FP16_ZEROS.value}[kind]
    base = {"bfloat16": -128, "float16": -1024}[kind]
    low, high = ZEROS, 15 - ZEROS
    offsets = [word for zeros in (low, high) for word in pairs_of(base - zeros, KINDS[kind])]
    a, b, c, d = run_recipe(recipe, [WORDS, *offsets], 4)
    assert torch.equal(halves((a, b), KINDS[kind]), (CODES[0] - low).double())
    assert torch.equal(halves((c, d), KINDS[kind]), (CODES[1] - high).double())
