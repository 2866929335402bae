"""The kernels' 4-bit layout: which value sits where, padding, there and back, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.kernels.pack import Encoding, HalvesInt4, from_halves, pack_int4, to_halves

ENCODINGS: tuple[Encoding, ...] = ("twos_complement", "sign_magnitude")


def test_byte_j_holds_k_and_k_plus_64_of_its_tile_in_twos_complement() -> None:
    values = torch.zeros(1, 256, dtype=torch.int8)
    values[0, 3], values[0, 67], values[0, 128 + 63], values[0, 255] = -8, 7, -1, 5
    halves = to_halves(pack_int4((values + 8).to(torch.uint8)), 256)
    want = torch.zeros(1, 128, dtype=torch.uint8)
    want[0, 3], want[0, 64 + 63] = 0x78, 0x5F
    assert torch.equal(halves, want)


def test_sign_magnitude_has_its_sign_in_the_fourth_bit() -> None:
    values = torch.zeros(1, 128, dtype=torch.int8)
    values[0, 0], values[0, 64], values[0, 65] = -7, -1, 6
    halves = to_halves(pack_int4((values + 8).to(torch.uint8)), 128, "sign_magnitude")
    assert halves[0, :2].tolist() == [0x9F, 0x60]
    assert not halves[0, 2:].any()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_padding_is_the_value_zero(encoding: Encoding) -> None:
    halves = to_halves(pack_int4(torch.full((2, 65), 15, dtype=torch.uint8)), 65, encoding)
    assert halves.tolist() == [[0x77] + [0x07] * 63] * 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5), st.integers(1, 300), st.sampled_from(ENCODINGS), st.integers(0, 2**31))
def test_there_and_back(rows: int, columns: int, encoding: Encoding, seed: int) -> None:
    least = int(encoding == "sign_magnitude")
    codes = torch.randint(
        least, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    packed = pack_int4(codes)
    weight = HalvesInt4.from_canonical(packed, columns, encoding)
    assert weight.packed.shape == (rows, (columns + 127) // 128 * 64)
    assert torch.equal(from_halves(weight.packed, columns, encoding), packed)
    assert torch.equal(weight.values(), (codes.int() - 8).to(torch.int8))


def test_what_sign_magnitude_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="−8"):
        to_halves(pack_int4(torch.zeros(1, 4, dtype=torch.uint8)), 4, "sign_magnitude")


def test_wrong_widths_and_encodings_are_refused() -> None:
    with pytest.raises(ValueError, match="unpack_int4"):
        to_halves(torch.zeros(2, 3, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="halves of 129 columns"):
        from_halves(torch.zeros(2, 64, dtype=torch.uint8), 129)
    with pytest.raises(ValueError, match="no encoding"):
        HalvesInt4(torch.zeros(2, 64, dtype=torch.uint8), 128, "ones_complement")  # type: ignore[arg-type]
