"""The assembly that unpacks a cache's words: every word beside a changing neighbour, as the plain form does it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.kernels.compile_check.registers import run_recipe

pytest.importorskip("triton")
from qtool.kernels.kv_attention import codes

NEIGHBOURS = torch.randint(0, 1 << 16, (1 << 16,), generator=torch.Generator().manual_seed(0))
EVERY = torch.arange(1 << 16)
WORDS = torch.cat((EVERY | NEIGHBOURS << 16, NEIGHBOURS | EVERY << 16))


def halves(word: Tensor) -> Tensor:
    """Both 16-bit halves of a register, [n, 2]."""
    return torch.stack((word & 0xFFFF, word >> 16), dim=1)


def values(word: Tensor) -> Tensor:
    """Both bfloat16 values of a register, [n, 2] float32."""
    return halves(word).to(torch.int16).view(torch.bfloat16).float()


def signed(code: Tensor, bits: int) -> Tensor:
    return torch.where(code >= 1 << (bits - 1), code - (1 << bits), code).float()


def test_int8_codes() -> None:
    for place, word in enumerate(run_recipe(codes.INT8_CODES.value, [WORDS], 2)):
        assert torch.equal(values(word), signed(halves(WORDS) >> 8 * place & 0xFF, 8))


def test_int4_codes_and_their_bias() -> None:
    for place, word in enumerate(run_recipe(codes.INT4_CODES.value, [WORDS], 4)):
        assert torch.equal(values(word), signed(halves(WORDS) >> 4 * place & 0xF, 4) + codes.BIAS.value)


def test_e4m3_codes() -> None:
    for place, word in enumerate(run_recipe(codes.E4M3_CODES.value, [WORDS], 2)):
        code = halves(WORDS) >> 8 * place & 0xFF
        number = code % 128 != 127
        expected = code.to(torch.uint8).view(torch.float8_e4m3fn).float()
        assert torch.equal(values(word)[number], expected[number])
        assert torch.equal(values(word)[~number].abs(), torch.full_like(expected[~number], 480.0))
