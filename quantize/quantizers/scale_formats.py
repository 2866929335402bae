"""Which scales a weight's groups may have where they are not plain floats: one step up or down, and the nearest ones.

    e8m0   2ᵉ                       MXFP4; ZeroQuant-FP's M1
    shift  factor × 2⁻ⁿ, n = 0…14   one float32 factor a row; ZeroQuant-FP's M2
    e4m3   factor × E4M3            one float32 factor for the whole weight; NVFP4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.small_floats import E4M3_MAX, LARGEST_SHIFT, ceil_log2, power_of_two

# A bigger scale than the unclipped one pays off where the largest weights then meet a finer part of E2M1.
EXPONENTS = (0, -1, -2, 1)
E4M3_STEPS = (0, *range(-1, -9, -1), *range(1, 6))
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127
E4M3_CODES = (1, 126)  # 2⁻⁹ … 448 as bit patterns, which are in the order of their values

Near = Callable[[Tensor, Tensor, tuple[int, ...]], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class ScaleFormat:
    """One way to store the scales of groups.

    Attributes:
        near: (wanted scales [n, G, 1], factor [n, 1, 1], steps) to the format's scales that many steps away, in order.
        steps: what a search tries; the first is no step: the power of two that clips nothing, or the nearest E4M3.
    """

    near: Near
    steps: tuple[int, ...]


def _octaves(lowest: int, highest: int) -> Near:
    def near(wanted: Tensor, factor: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
        exponent = ceil_log2(wanted / factor)
        return [factor * power_of_two((exponent + step).clamp(lowest, highest)) for step in steps]

    return near


def _e4m3(wanted: Tensor, factor: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
    code = (wanted / factor).clamp(0, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)
    stepped = [(code + step).clamp(*E4M3_CODES).to(torch.uint8) for step in steps]
    return [factor * number.view(torch.float8_e4m3fn).to(torch.float32) for number in stepped]


SCALE_FORMATS: Mapping[str, ScaleFormat] = {
    "e8m0": ScaleFormat(near=_octaves(SMALLEST_EXPONENT, LARGEST_EXPONENT), steps=EXPONENTS),
    "shift": ScaleFormat(near=_octaves(-LARGEST_SHIFT, 0), steps=EXPONENTS),
    "e4m3": ScaleFormat(near=_e4m3, steps=E4M3_STEPS),
}
