"""The leading directions of a site's inputs: which r dimensions carry most of what a second moment holds.

A token whose norm is a hundred times the others' weighs ten thousand times theirs in Σ x xᵀ. In Σ x xᵀ / |x|² every
token weighs the same; `second_moment_of` makes either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.transforms.once_per_input import OncePerInput

# A planner asks for several ranks of one second moment.
_eigenvectors = OncePerInput(lambda moment: torch.linalg.eigh(moment.double()).eigenvectors)


def second_moment_of(x: Tensor, *, normalised: bool = False) -> Tensor:
    """Σ x xᵀ over the rows of x [..., K] in float64 [K, K]; normalised: every row scaled to length 1, zeros kept."""
    rows = x.reshape(-1, x.shape[-1]).double()
    if normalised:
        length = rows.norm(dim=-1, keepdim=True)
        rows = rows / torch.where(length > 0, length, torch.ones_like(length))
    return rows.T @ rows


def leading_directions(second_moment: Tensor, rank: int) -> Tensor:
    """The `rank` eigenvectors with the largest eigenvalues, largest first, [K, rank] float64 orthonormal.

    Each is signed so that its component of largest magnitude (the first of equals) is positive.

    Raises:
        InputRefused: when rank is not in 1 … K, or the matrix is not finite.
    """
    width = len(second_moment)
    if not 1 <= rank <= width:
        raise InputRefused(f"rank {rank}", f"is not between 1 and the width {width}", "choose another rank")
    if not bool(torch.isfinite(second_moment).all()):
        raise InputRefused("second moment", "is not finite", "calibrate again")
    return with_fixed_signs(_eigenvectors(second_moment)[:, -rank:].flip(1))


def with_fixed_signs(columns: Tensor) -> Tensor:
    """Columns [K, r], each negated where its component of largest magnitude is negative."""
    peak = columns.abs().argmax(dim=0, keepdim=True)
    negative = columns.gather(0, peak) < 0
    return torch.where(negative, -columns, columns).contiguous()
