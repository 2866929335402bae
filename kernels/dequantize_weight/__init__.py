"""Codes and scales back to a float weight: value = scale × (code − zero_point), FP4 codes standing for E2M1 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.small_floats import E2M1_LEVELS, casts_exactly, e2m1_values, exact_exponents


def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    group_size: int | None,
    zero_code: int,
    e2m1: bool = False,
) -> Tensor:
    """Dequantize [N, K] codes.

    Args:
        codes: uint8 or float8_e4m3fn [N, K].
        scale: float32 [N, G]; G = ceil(K / group_size), or 1 when group_size is None.
        zero_point: uint8 [N, G], or None for the fixed `zero_code`.
        group_size: columns that share a scale; the last group may be short.
        zero_code: the code of zero without zero points (8, 128; 0 for FP8 and FP4).
        e2m1: codes are uint8 bit patterns of E2M1 numbers.

    Returns:
        float32 [N, K].
    """
    zeros = scale.new_full((1, 1), zero_code) if zero_point is None else zero_point.to(torch.float32)
    columns = codes.shape[1]
    values = e2m1_values(codes) if e2m1 else codes.to(torch.float32)
    if group_size is None or columns % group_size:
        values.sub_(_spread(zeros, group_size, columns)).mul_(_spread(scale, group_size, columns))
    else:  # no second matrix of this size in memory
        torch.unflatten(values, 1, (-1, group_size)).sub_(zeros.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return values


def widen_to_e4m3(
    codes: Tensor, scale: Tensor, *, group_size: int | None, zero_code: int, e2m1: bool = False
) -> tuple[Tensor, Tensor]:
    """4-bit codes whose scales are a number of the row's times powers of two, as FP8 weights: nothing is rounded.

    Args:
        codes, scale, group_size, zero_code, e2m1: as in `dequantize_weight`.

    Returns:
        float8_e4m3fn [N, K] and the rows' scales, float32 [N, 1].

    Raises:
        ValueError: when a row's scales are no powers of two apart, or lie further apart than E4M3 reaches.
    """
    levels = E2M1_LEVELS if e2m1 else range(-zero_code, zero_code)
    unit = scale.amax(dim=1, keepdim=True) * 2.0 ** -exact_exponents(levels, torch.float8_e4m3fn)[-1]
    values = dequantize_weight(codes, scale / unit, None, group_size=group_size, zero_code=zero_code, e2m1=e2m1)
    if not bool(casts_exactly(values, torch.float8_e4m3fn).all()):
        raise ValueError("E4M3 does not hold codes times scales exactly: a row's scales lie over 14 octaves apart")
    return values.to(torch.float8_e4m3fn), unit


def _spread(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    if group_size is None or per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]
