"""Small floats: FP4 E2M1 and FP8 E4M3 elements, E8M0 and E4M3 scales, and which casts between them lose nothing.

    E2M1  ±{0, ½, 1, 1½, 2, 3, 4, 6}; a code is sign × 8 + index, which is its bit pattern; −0 is never made
    E4M3  up to ±448 with four significant bits, down to 2⁻⁹; no infinity
    E8M0  2ᵉ as the byte e + 127, the byte 255 is NaN (OCP Microscaling Formats 1.0)
    shift a row's float32 factor × 2⁻ⁿ with n = 0…14 in four bits: times a 4-bit code it is the factor times an exact
          E4M3 number (ZeroQuant-FP, 2307.09782, constraint M2)

Rounding is to nearest, ties to even, and saturates; NaN stays NaN.
"""

from __future__ import annotations

from qtool.kernels.small_floats.elements import (
    E2M1_LEVELS,
    E2M1_MAX,
    E4M3_MAX,
    cast_e4m3,
    e2m1_codes,
    e2m1_values,
    round_e2m1,
)
from qtool.kernels.small_floats.exact_cast import casts_exactly, exact_exponents, rows_cast_exactly
from qtool.kernels.small_floats.scales import (
    LARGEST_SHIFT,
    MX_RULES,
    ceil_log2,
    e8m0_bytes,
    e8m0_scale,
    mx_exponent,
    power_of_two,
    shift_of,
)

__all__ = [
    "E2M1_LEVELS",
    "E2M1_MAX",
    "E4M3_MAX",
    "LARGEST_SHIFT",
    "MX_RULES",
    "cast_e4m3",
    "casts_exactly",
    "ceil_log2",
    "e2m1_codes",
    "e2m1_values",
    "e8m0_bytes",
    "e8m0_scale",
    "exact_exponents",
    "mx_exponent",
    "power_of_two",
    "round_e2m1",
    "rows_cast_exactly",
    "shift_of",
]
