"""Float scales of 4-bit weights, one a row or one a group of columns, as the float products take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.errors import UsageError

TILE = 128
INSIDE_A_TILE = (32, 64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class GroupScales(NamedTuple):
    """`values`: [N, G] of a float type, any strides; `size`: the columns of a group, 0 when a row has one scale.

    A kernel reads a column of `values` for each K tile: transposed memory (`scale.T.contiguous().T`) loads fastest.
    """

    values: Tensor
    size: int

    def obstacle(self) -> str:
        """Why the kernels cannot take this group size; empty when they can."""
        fits = not self.size or self.size in INSIDE_A_TILE or self.size % TILE == 0
        return "" if fits else f"groups of {self.size} columns, not 32, 64 or a multiple of {TILE}"


def group_scales(op: str, scale: Tensor, n: int, k: int, group_size: int | None) -> GroupScales:
    """Name the form of a weight scale.

    Args:
        op: the operation, for the refusal.
        scale: [N] or [N, 1], or with a group size [N, ceil(K / group_size)].
        n, k: of the weights.
        group_size: columns that share a scale, the last group may be short; None: one scale a row.

    Raises:
        UsageError: when the shape or type does not fit.
    """
    if scale.dtype not in FLOATS:
        raise UsageError(f"{op}: w_scale", f"{scale.dtype}", "give float32, float16 or bfloat16")
    if group_size is not None and group_size <= 0:
        raise UsageError(f"{op}: group_size", f"{group_size}", "give a positive number of columns, or None")
    groups = 1 if group_size is None else -(-k // group_size)
    values = scale[:, None] if scale.dim() == 1 else scale
    if values.shape != (n, groups):
        wanted = f"[{n}]" if group_size is None else f"[{n}, {groups}] for groups of {group_size}"
        raise UsageError(f"{op}: w_scale", f"shape {tuple(scale.shape)}", f"give {wanted}")
    return GroupScales(values, 0 if group_size is None or groups == 1 else group_size)


def spread(per_group: Tensor, size: int, columns: int) -> Tensor:
    """[N, G] to [N, columns], or to [N, 1] when a row is one group."""
    return per_group.repeat_interleave(size, dim=1)[:, :columns] if size else per_group
