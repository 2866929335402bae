"""The code formats of a quantized row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

SMALLEST_RANGE = 2.0**-120  # below it 127 / max|a| overflows, or max|a| / 448 is subnormal
PACK_TILE = 128  # columns of a K tile whose halves share bytes


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row's codes are made and stored.

    Attributes:
        largest: the largest code.
        dtype: of the stored codes.
        integer: codes are integers, so that rows have integer sums.
        halves: two codes a byte: in each K tile of 128, byte j holds k = j (low) and k = j + 64 (high nibble), two's
            complement; K is padded to whole tiles with zeros.
    """

    largest: float
    dtype: torch.dtype
    integer: bool = True
    halves: bool = False

    @property
    def e4m3(self) -> bool:
        """Whether the codes are E4M3 numbers, which not every GPU knows."""
        return not self.integer


ROW_FORMATS: Mapping[str, RowFormat] = {
    "int8": RowFormat(largest=127.0, dtype=torch.int8),
    "int4": RowFormat(largest=7.0, dtype=torch.int8),
    "int4_halves": RowFormat(largest=7.0, dtype=torch.uint8, halves=True),
    "fp8_e4m3": RowFormat(largest=448.0, dtype=torch.float8_e4m3fn, integer=False),
}


def stored_columns(form: RowFormat, columns: int) -> int:
    """How many elements of `form.dtype` a row of this many columns takes."""
    return -(-columns // PACK_TILE) * (PACK_TILE // 2) if form.halves else columns
