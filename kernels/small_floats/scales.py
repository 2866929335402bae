"""Scales that are powers of two, or a factor times one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LOWEST, HIGHEST = -126, 127  # of the normal float32 numbers
BIAS = 127
NAN_BYTE = 255
LARGEST_SHIFT = 14

MX_RULES = ("floor", "even", "rceil")
_MANTISSA: Mapping[float, int] = {6.0: 1, 448.0: 3}  # bits of the fraction, by the largest element


def power_of_two(exponent: Tensor) -> Tensor:
    """2ᵉ as float32, exactly, for whole e; clamped to −126…127."""
    return ((exponent.clamp(LOWEST, HIGHEST).to(torch.int32) + BIAS) << 23).view(torch.float32)


def ceil_log2(x: Tensor) -> Tensor:
    """The smallest whole e (int32) with x ≤ 2ᵉ, of positive float32 numbers."""
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).to(torch.int32)


def mx_exponent(amax: Tensor, *, largest: float, rule: str) -> Tensor:
    """The exponent (int32) of the power-of-two scale of blocks whose largest magnitude is `amax`.

    Args:
        amax: positive, normal, finite float32.
        largest: the largest element: 6 (E2M1) or 448 (E4M3).
        rule: "floor" (OCP: floor(log2 amax) − emax, the maximum may saturate), "even" (the same after rounding the
            maximum to the element's precision), or "rceil" (ceil(log2(amax / largest)), nothing saturates).
    """
    if rule == "rceil":
        return ceil_log2(amax / largest)
    carry = 1 << (22 - _MANTISSA[largest]) if rule == "even" else 0
    top = (amax.to(torch.float32).view(torch.int32) + carry >> 23) - BIAS
    return top - (int(largest).bit_length() - 1)


def e8m0_bytes(scale: Tensor) -> Tensor:
    """The E8M0 bytes (uint8) of positive powers of two."""
    return (ceil_log2(scale) + BIAS).to(torch.uint8)


def e8m0_scale(stored: Tensor) -> Tensor:
    """The powers of two (float32) that E8M0 bytes stand for; NaN for the byte 255 and for 0, which no kernel keeps."""
    value = power_of_two(stored.to(torch.int32) - BIAS)
    return torch.where((stored == NAN_BYTE) | (stored == 0), torch.nan, value)


def shift_of(scale: Tensor, factor: Tensor) -> Tensor:
    """n (uint8) of scale = factor × 2⁻ⁿ; [N, G] and [N, 1]."""
    return (-ceil_log2(scale / factor)).to(torch.uint8)
