"""Which scales a weight's groups may have where they are not plain floats: one step up or down, and the nearest ones.

    e8m0     2ᵉ                       MXFP4; ZeroQuant-FP's M1 (2307.09782)
    shift    factor × 2⁻ⁿ, n = 0…14   one float32 factor a row; ZeroQuant-FP's M2
    integer  factor × n, n = 1…16     one bfloat16 factor a row; QoQ's two levels (2405.04532)
    e4m3     factor × E4M3            one float32 factor for the whole weight; NVFP4

Under integer scales a row of INT4 codes is a row of INT8 numbers n (code − zero) and one scale, so that a product of
integers stays one. QoQ finds those INT8 numbers first, within ±119, and their groups' scales and zero points second.
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

LARGEST_INTEGER = 16  # (code − 8) × 16 = −128…112 just fits INT8
INTEGER_STEPS = (0, *range(-1, -8, -1), 1)
PROTECTED = 119  # INT8 numbers up to ± this stay INT8 numbers under any integer scale and zero point

Near = Callable[[Tensor, Tensor, tuple[int, ...]], list[Tensor]]
Factor = Callable[[Tensor, Tensor, bool], Tensor]


@dataclass(frozen=True, kw_only=True)
class ScaleFormat:
    """One way to store the scales of groups.

    Attributes:
        near: (wanted scales [n, G, 1], factor [n, 1, 1], steps) to the format's scales that many steps away, in order.
        steps: what a search tries; the first is no step: the power of two that clips nothing, or the nearest number.
        factor: (groups [n, G, g], unclipped scales [n, G, 1], symmetric) to the rows' factors [n, 1, 1] with which
            nothing is clipped; None where rows have none of their own.
        multiples: of that factor, what a search tries.
        rounded: a factor to the nearest that can be stored.
    """

    near: Near
    steps: tuple[int, ...]
    factor: Factor | None = None
    multiples: tuple[float, ...] = ()
    rounded: Callable[[Tensor], Tensor] = lambda factor: factor


def _octaves(lowest: int, highest: int) -> Near:
    def near(wanted: Tensor, factor: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
        exponent = ceil_log2(wanted / factor)
        return [factor * power_of_two((exponent + step).clamp(lowest, highest)) for step in steps]

    return near


def _e4m3(wanted: Tensor, factor: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
    code = (wanted / factor).clamp(0, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int32)
    stepped = [(code + step).clamp(*E4M3_CODES).to(torch.uint8) for step in steps]
    return [factor * number.view(torch.float8_e4m3fn).to(torch.float32) for number in stepped]


def _integer(wanted: Tensor, factor: Tensor, steps: tuple[int, ...]) -> list[Tensor]:
    nearest = (wanted / factor).round()
    return [factor * (nearest + step).clamp(1, LARGEST_INTEGER) for step in steps]


def _largest(groups: Tensor, unit: Tensor, symmetric: bool) -> Tensor:
    used = groups.abs().amax(dim=-1, keepdim=True) > 0
    return torch.where(used, unit, torch.zeros_like(unit)).amax(dim=1, keepdim=True)


def _int8_step(groups: Tensor, unit: Tensor, symmetric: bool) -> Tensor:
    if symmetric:
        return _largest(groups, unit, symmetric) / LARGEST_INTEGER
    return groups.abs().amax(dim=(1, 2), keepdim=True) / PROTECTED


def _bfloat16(factor: Tensor) -> Tensor:
    return factor.to(torch.bfloat16).to(torch.float32)


SCALE_FORMATS: Mapping[str, ScaleFormat] = {
    "e8m0": ScaleFormat(near=_octaves(SMALLEST_EXPONENT, LARGEST_EXPONENT), steps=EXPONENTS),
    "shift": ScaleFormat(
        near=_octaves(-LARGEST_SHIFT, 0),
        steps=EXPONENTS,
        factor=_largest,
        multiples=tuple(2 ** (step / 8) for step in range(-4, 4)),  # one octave, all that groups can tell apart
    ),
    "integer": ScaleFormat(
        near=_integer,
        steps=INTEGER_STEPS,
        factor=_int8_step,
        multiples=(0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0),
        rounded=_bfloat16,
    ),
    "e4m3": ScaleFormat(near=_e4m3, steps=E4M3_STEPS),
}
