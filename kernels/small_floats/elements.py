"""Elements: numbers to the nearest small float, and E2M1 numbers to their codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E4M3_MAX = 448.0
SIGN = 8


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 numbers, in x's shape and dtype."""
    # Steps of ½ below 2, of 1 below 4, of 2 up to 6: rounding the quotient half to even is E2M1's own tie rule.
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.clamp(torch.round(x / step) * step, -E2M1_MAX, E2M1_MAX)


def cast_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers, as float32."""
    return torch.clamp(x, -E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def e2m1_codes(values: Tensor) -> Tensor:
    """Codes 0…15 (uint8) of numbers that are E2M1 numbers; the code of zero is 0."""
    size = values.abs()
    index = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return (index + SIGN * (values < 0)).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """The E2M1 numbers (float32) of codes 0…15 (uint8)."""
    levels = torch.tensor(E2M1_LEVELS, device=codes.device)
    return torch.cat((levels, -levels))[codes.to(torch.int32)]
