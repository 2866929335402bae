"""Rows in blocks along K, and back."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def in_blocks(x: Tensor, width: int | None) -> Tensor:
    """x [..., K] to [..., G, width], a short last block filled up with zeros; None takes the whole row as one block."""
    if width is None:
        return x.unsqueeze(-2)
    count = -(-x.shape[-1] // width)
    short = count * width - x.shape[-1]
    return (pad(x, (0, short)) if short else x).reshape(*x.shape[:-1], count, width)


def whole_rows(blocks: Tensor, x: Tensor) -> Tensor:
    """The inverse, [..., G, width] to the shape of x [..., K]."""
    return blocks.flatten(-2)[..., : x.shape[-1]]
