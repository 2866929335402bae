"""The leading directions of a site's inputs: which r dimensions carry most of what a second moment holds.

A token whose norm is a hundred times the others' weighs ten thousand times theirs in Σ x xᵀ. In Σ x xᵀ / |x|² every
token weighs the same; `second_moment_of` makes either.

Wide second moments give up their few leading eigenvectors by Lanczos iterations (ARPACK, to machine precision): all
8192 of them take minutes, 64 take seconds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.transforms.once_per_input import OncePerInput

WIDE = 1024  # from here on Lanczos is faster than a whole decomposition
USUAL_RANK = 64  # found at once, so that directions do not depend on the rank that was asked for

# A planner asks for several ranks of one second moment.
_usual_directions = OncePerInput(lambda moment: _largest(moment.double(), min(USUAL_RANK, len(moment))))


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
    if not bool(torch.isfinite(second_moment.sum())):  # elementwise would take another matrix of its size
        raise InputRefused("second moment", "is not finite", "calibrate again")
    found = _usual_directions(second_moment) if rank <= USUAL_RANK else _largest(second_moment.double(), rank)
    return with_fixed_signs(found[:, :rank])


def _largest(moment: Tensor, count: int) -> Tensor:
    """The `count` eigenvectors [K, count] of a symmetric float64 matrix with the largest eigenvalues, largest first."""
    found = _by_lanczos(moment, count) if len(moment) >= max(WIDE, 8 * count) else None
    return torch.linalg.eigh(moment).eigenvectors[:, -count:].flip(1) if found is None else found


def _by_lanczos(moment: Tensor, count: int) -> Tensor | None:
    """As `_largest`; None where ARPACK gives up, or where the matrix does not tell the eigenvectors apart.

    Equal eigenvalues, such as the zeros of a second moment of fewer than `count` tokens, leave them to the random
    vectors that ARPACK goes on with, which differ from run to run.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    width = len(moment)
    start = np.random.default_rng(0).standard_normal(width)
    product = LinearOperator((width, width), matvec=lambda v: (moment @ torch.from_numpy(v)).numpy(), dtype=np.float64)
    try:
        values, vectors = eigsh(product, k=count, which="LA", v0=start)
    except ArpackError:
        return None
    rounding = width * np.finfo(np.float64).eps * values[-1]
    if values[0] <= rounding or np.diff(values).min() <= rounding:
        return None
    return torch.from_numpy(vectors).flip(1)


def with_fixed_signs(columns: Tensor) -> Tensor:
    """Columns [K, r], each negated where its component of largest magnitude is negative."""
    peak = columns.abs().argmax(dim=0, keepdim=True)
    negative = columns.gather(0, peak) < 0
    return torch.where(negative, -columns, columns).contiguous()
