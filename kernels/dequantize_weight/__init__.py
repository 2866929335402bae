"""Codes and scales back to a float weight: value = scale × (code − zero_point)."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, group_size: int | None, zero_code: int
) -> Tensor:
    """Dequantize [N, K] codes.

    Args:
        codes: uint8 or float8_e4m3fn [N, K].
        scale: float32 [N, G]; G = ceil(K / group_size), or 1 when group_size is None.
        zero_point: uint8 [N, G], or None for the fixed `zero_code`.
        group_size: columns that share a scale; the last group may be short.
        zero_code: the code of zero without zero points (8, 128; 0 for FP8).

    Returns:
        float32 [N, K].
    """
    zeros = scale.new_full((1, 1), zero_code) if zero_point is None else zero_point.to(torch.float32)
    columns = codes.shape[1]
    return (codes.to(torch.float32) - _spread(zeros, group_size, columns)) * _spread(scale, group_size, columns)


def _spread(per_group: Tensor, group_size: int | None, columns: int) -> Tensor:
    if group_size is None or per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]
