"""The 4-bit packing: byte layout, there and back, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.kernels.pack import pack_int4, unpack_int4


def test_low_nibble_first_and_an_odd_column_padded_with_zero() -> None:
    packed = pack_int4(torch.tensor([[1, 2, 15], [0, 9, 3]], dtype=torch.uint8))
    assert packed.tolist() == [[0x21, 0x0F], [0x90, 0x03]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(1, 33), st.integers(0, 2**31))
def test_there_and_back(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpack_int4(packed, columns=columns), codes)


@pytest.mark.parametrize(
    "codes",
    [
        torch.tensor([[16]], dtype=torch.uint8),
        torch.tensor([[1]], dtype=torch.int8),
        torch.tensor([1], dtype=torch.uint8),
    ],
)
def test_what_is_no_4_bit_matrix_is_refused(codes: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="pack_int4"):
        pack_int4(codes)


def test_a_byte_count_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="unpack_int4"):
        unpack_int4(torch.zeros(2, 3, dtype=torch.uint8), columns=4)
