"""Which small numbers another format holds exactly, so that a kernel may widen codes by a cast or a shift alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EXPONENTS = range(-64, 65)


def casts_exactly(values: Tensor, target: torch.dtype) -> Tensor:
    """Whether each value (float32) is a number of the target: a float8 dtype, or torch.int8."""
    largest = torch.iinfo(target) if target is torch.int8 else torch.finfo(target)
    inside = (values >= largest.min) & (values <= largest.max)
    there = torch.where(inside, values, torch.zeros_like(values)).to(target).to(torch.float32)
    return inside & (there == values)


def exact_exponents(levels: Sequence[float], target: torch.dtype) -> range:
    """The k for which all levels × 2ᵏ are numbers of the target.

    E2M1 levels in E4M3: −8…6. E2M1 in E5M2: −15…13. INT4 codes −8…7 in E4M3: −9…5. INT4 in INT8: 0…4.
    """
    exact = [k for k in EXPONENTS if bool(casts_exactly(torch.tensor(levels) * 2.0**k, target).all())]
    return range(exact[0], exact[-1] + 1) if exact else range(0)


def rows_cast_exactly(exponents: Tensor, levels: Sequence[float], target: torch.dtype) -> Tensor:
    """Whether rows of groups with scales factor × 2ᵉ are, times one number a row, numbers of the target.

    Args:
        exponents: whole numbers [N, G].
        levels: of the codes.
        target: a float8 dtype, or torch.int8.

    Returns:
        [N] bool: the row's exponents span no more octaves than the target holds the levels in.
    """
    span = exponents.amax(dim=1) - exponents.amin(dim=1)
    return span < len(exact_exponents(levels, target))
