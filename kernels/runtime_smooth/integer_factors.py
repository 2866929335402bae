"""Factors as whole numbers times a base, so that a smoothed GEMM's sum over tiles stays in int32.

    s_G ≈ base × n_G,   base = max s_G / limit,   n_G = round-half-even(s_G / base) in 1…limit
    y_tn = base × a_t / 7 × Σ_G n_G × (int32 partial sum of tile G)

A tile's own rounding of its factor costs no accuracy by itself: a_t is found from the factors that are used, and only
tiles that are quieter than max / limit lose resolution. One multiply-add an element and tile in place of a conversion
and a float one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 127
INT32_MAX = 2**31 - 1
WEIGHT_X16 = 128  # the largest |weight| as kernels multiply it: −8 × 16


@dataclass(frozen=True, kw_only=True)
class IntegerFactors:
    """Attributes:
    numbers: n_G int32 [R, G].
    base: float32 [R].
    """

    numbers: Tensor
    base: Tensor

    def values(self) -> Tensor:
        """The factors that are used, base × n_G: float32 [R, G]."""
        return self.base.unsqueeze(-1) * self.numbers.to(torch.float32)


def integer_factors(factors: Tensor, limit: int) -> IntegerFactors:
    """Whole numbers 1…limit for factors [R, G]; a request with a factor that is not finite gets a base that is not."""
    base = factors.amax(dim=-1) / limit
    numbers = torch.round(factors / base.unsqueeze(-1)).nan_to_num(nan=1.0).clamp(1, limit)
    return IntegerFactors(numbers=numbers.to(torch.int32), base=base)


def largest_integer_factor(columns: int, *, largest_code: int = 7, largest_weight: int = WEIGHT_X16) -> int:
    """The largest factor (at most 127) with which no int32 sum over K columns can overflow; 0 where none is safe."""
    return min(LARGEST, INT32_MAX // (columns * largest_code * largest_weight))
