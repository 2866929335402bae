"""The inline assembly that ships, run on 32-bit words: every byte value in every lane beside changing neighbours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.kernels.compile_check.registers import WORD, run_recipe

pytest.importorskip("triton")
from qtool.kernels.language import unpack
from qtool.kernels.w4a8_gemm import triton_unpack

KERNELS = Path(unpack.__file__).parents[1]


def every_byte_in_every_lane() -> Tensor:
    words = torch.randint(0, 1 << 32, (4, 64, 256), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    for lane in range(4):
        words[lane] = (words[lane] & (WORD ^ (0xFF << 8 * lane))) | (torch.arange(256) << 8 * lane)
    return words.flatten()


WORDS = every_byte_in_every_lane()


def lanes(word: Tensor, bits: int = 8) -> Tensor:
    """The parts of each word, lowest first, unsigned."""
    return torch.stack([word >> at & ((1 << bits) - 1) for at in range(0, 32, bits)], -1)


def signed(value: Tensor, bits: int) -> Tensor:
    return torch.where(value >= 1 << (bits - 1), value - (1 << bits), value)


NIBBLES = {"low": lanes(WORDS) & 15, "high": lanes(WORDS) >> 4}
VALUES = {name: signed(nibble, 4) for name, nibble in NIBBLES.items()}


def test_the_words_hold_every_byte_in_every_lane() -> None:
    assert all(len(lane.unique()) == 256 for lane in lanes(WORDS).unbind(-1))


def test_times_16() -> None:
    for word, value in zip(run_recipe(unpack.TIMES_16.value, [WORDS], 2), VALUES.values(), strict=True):
        assert torch.equal(signed(lanes(word), 8), value * 16)


@pytest.mark.parametrize("zero", [0, 5, 8, 15])
@pytest.mark.parametrize(("low", "high"), [(scale, 17 - scale) for scale in range(1, 17)])
def test_scales_and_zero_points_of_each_half_tile(low: int, high: int, zero: int) -> None:
    scales = [torch.full_like(WORDS, scale) for scale in (low, high)]
    pairs = [(zero, low), (15 - zero, high)]
    offsets = [torch.full_like(WORDS, (0x80808080 - 0x01010101 * z * s) & WORD) for z, s in pairs]
    expected = [(value + 8 - z) * s for value, (z, s) in zip(VALUES.values(), pairs, strict=True)]
    # One register a packed element: four of each.
    inputs = [WORDS, *(word for operand in (*scales, *offsets) for word in [operand] * 4)]
    # A byte that does not fit spills over into the next.
    fits = torch.stack([((e >= -128) & (e <= 127)).all(-1) for e in expected]).all(0)
    for word, value in zip(run_recipe(triton_unpack.RESCALED.value, inputs, 2), expected, strict=True):
        assert torch.equal(signed(lanes(word), 8)[fits], value[fits])


def test_sign_magnitude_as_e4m3() -> None:
    for word, nibble in zip(run_recipe(unpack.E4M3.value, [WORDS], 2), NIBBLES.values(), strict=True):
        got = lanes(word).to(torch.uint8).view(torch.float8_e4m3fn).double()
        magnitude = (nibble & 7) * 2.0**-9
        assert torch.equal(got, torch.where(nibble >= 8, -magnitude, magnitude).double())


def test_the_magic_number_of_to_int8_rounds_half_to_even() -> None:
    from qtool.kernels.language.casts import ONES

    x = torch.cat([torch.arange(-508, 509) / 4.0, torch.linspace(-127, 127, 100001)])
    low_byte = signed((x + ONES.value).view(torch.int32).long() & 0xFF, 8)
    assert torch.equal(low_byte, x.round().long())


def test_all_assembly_that_ships_is_tried_by_a_test() -> None:
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    used = set()
    for path in KERNELS.rglob("*.py"):
        source = path.read_text("utf-8")
        recipes = set(re.findall(r"^(\w+) = tl\.constexpr\(", source, re.M))
        for first_argument in re.findall(r"tl\.inline_asm_elementwise\(([^,]*),", source):
            used |= {f"{path.stem}.{name}.value" for name in recipes & set(re.findall(r"\w+", first_argument))}
    assert "unpack.TIMES_16.value" in used
    assert [recipe for recipe in sorted(used) if recipe not in tests] == []
