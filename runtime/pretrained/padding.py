"""Which columns of a padded batch are tokens: the native runtime computes those and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import UsageError


def token_counts(
    mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], past: int
) -> tuple[Tensor | None, list[int]]:
    """Which of T new columns are tokens.

    Args:
        mask: [B, past + T], zero where there is padding; None: nowhere.
        positions: [B or 1, T] or None.
        shape: (B, T).
        past: columns before these.

    Returns:
        bool [B, T], None where all are tokens; and each sequence's number of them.

    Raises:
        UsageError: for a mask of another shape, a sequence without a token, or positions that skip or repeat.
    """
    batch, length = shape
    real = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        if tuple(mask.shape) != (batch, past + length):
            why = f"has shape {tuple(mask.shape)}, not {(batch, past + length)}"
            raise UsageError("attention_mask", why, "give a column for every token so far, 0 for padding")
        real = mask[:, past:].to("cpu") != 0
    counts = [int(count) for count in real.sum(dim=1)]
    if min(counts) == 0:
        raise UsageError("attention_mask", f"sequence {counts.index(0)} has no token", "leave it out of the batch")
    if positions is not None:
        _check_positions(positions.to("cpu").expand(shape), real)
    return (None if bool(real.all()) else real), counts


def _check_positions(positions: Tensor, real: Tensor) -> None:
    for row, keep in zip(positions, real, strict=True):
        if bool((row[keep].diff() != 1).any()):
            raise UsageError("position_ids", "skip or repeat", "leave them out: tokens are counted by the mask")
