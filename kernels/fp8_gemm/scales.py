"""The forms a scale may take, brought to two strided matrices without copying."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import UsageError

BLOCK = 128


class ActivationScale(NamedTuple):
    """`values`: float32 [M, 1] or, with `blocks`, [M, ceil(K / 128)]; a tensor's one scale has stride 0."""

    values: Tensor
    blocks: bool


class WeightScale(NamedTuple):
    """`values`: float32 [ceil(N / rows), 1] or, with `blocks`, [ceil(N / rows), ceil(K / 128)]; `rows`: 1 or 128."""

    values: Tensor
    blocks: bool
    rows: int


def activation_scale(scale: Tensor, m: int, k: int) -> ActivationScale:
    """Name the form of an activation scale; raises UsageError when it has none."""
    _must_be_float32("x_scale", scale)
    row = _by_row(scale, m)
    if row is not None:
        return ActivationScale(row, False)
    if scale.shape == (m, -(-k // BLOCK)):
        return ActivationScale(scale, True)
    raise _unknown("x_scale", scale, f"[], [{m}] or [{m}, {-(-k // BLOCK)}]")


def weight_scale(scale: Tensor, n: int, k: int) -> WeightScale:
    """Name the form of a weight scale; raises UsageError when it has none."""
    _must_be_float32("w_scale", scale)
    row = _by_row(scale, n)
    if row is not None:
        return WeightScale(row, False, 1)
    blocks = -(-k // BLOCK)
    for rows in (1, BLOCK):
        if scale.shape == (-(-n // rows), blocks):
            return WeightScale(scale, True, rows)
    raise _unknown("w_scale", scale, f"[], [{n}], [{n}, {blocks}] or [{-(-n // BLOCK)}, {blocks}]")


def _by_row(scale: Tensor, rows: int) -> Tensor | None:
    if scale.numel() == 1 and scale.dim() <= 1:
        return scale.reshape(1, 1).expand(rows, 1)
    if scale.shape == (rows,):
        return scale[:, None]
    return scale if scale.shape == (rows, 1) else None


def _must_be_float32(name: str, scale: Tensor) -> None:
    if scale.dtype != torch.float32:
        raise UsageError(f"fp8_gemm: {name}", f"{scale.dtype}", "give float32")


def _unknown(name: str, scale: Tensor, wanted: str) -> UsageError:
    return UsageError(f"fp8_gemm: {name}", f"shape {tuple(scale.shape)}", f"give {wanted}")
