"""What is done to a row before it is quantized: where its values come from, and which rotation they pass through."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qtool.kernels.hadamard import HadamardPlan, dense, hadamard_plan

# Of a Hadamard matrix that one tensor-core product multiplies by; with larger ones a row no longer fits the registers.
SMALLEST_FACTOR, LARGEST_FACTOR, LARGEST_TILE = 16, 64, 16384


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """RMSNorm of x, after x has been added to the residual stream.

    Attributes:
        gain: [K], or None where it is folded into the weights.
        epsilon: added to the mean square.
        residual: [..., K] of x's shape; the sum with x (in float32, rounded to the residual's dtype) is written back
            into it and is what is normalized. None normalizes x itself.
    """

    gain: Tensor | None
    epsilon: float
    residual: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SiluTimes:
    """silu(x) × up, both in float32.

    Attributes:
        up: [..., K] of x's shape.
    """

    up: Tensor


@dataclass(frozen=True, kw_only=True)
class RowHadamard:
    """The rotation (x ∘ signs) M of `kernels/hadamard`.

    Attributes:
        plan: of this width.
        signs: [K] of ±1, or None.
    """

    plan: HadamardPlan
    signs: Tensor | None = None


Source = RmsNorm | SiluTimes | None


@dataclass(frozen=True, kw_only=True)
class Factors:
    """A plan as products with small matrices of 0 and ±1 on a row written as [rows, columns], row by row.

    Attributes:
        rows: of the tile, padded to a power of two ≥ 16.
        columns: of the tile.
        left: the order of the factor on the left, 0 for none (a rotation in blocks of `columns`).
    """

    rows: int
    columns: int
    left: int


@lru_cache(maxsize=64)
def factors_of(plan: HadamardPlan) -> Factors | None:
    """The factors of a plan that one kernel can apply; None where it needs larger matrices."""
    if plan.order == 1 and SMALLEST_FACTOR <= plan.power <= LARGEST_FACTOR:
        rows = _padded(plan.width // plan.block)
        return Factors(rows=rows, columns=plan.block, left=0) if rows * plan.block <= LARGEST_TILE else None
    if plan.block < plan.width:
        return None
    columns = min(plan.power, LARGEST_FACTOR)
    left = plan.width // columns
    while columns > SMALLEST_FACTOR and 2 * left <= columns // 2:  # squarer is cheaper
        columns, left = columns // 2, left * 2
    if columns < SMALLEST_FACTOR or _padded(left) > LARGEST_FACTOR:
        return None
    return Factors(rows=_padded(left), columns=columns, left=left)


@lru_cache(maxsize=64)
def factor_matrices(plan: HadamardPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """(left [rows, rows], right [columns, columns]) in bfloat16, without the 1 / √block, for `factors_of(plan)`.

    The right one is symmetric; the left one is padded with zeros, and is the transposed Paley part, as M multiplies
    rows from the right.
    """
    factors = factors_of(plan)
    assert factors is not None
    right = _signs_of(hadamard_plan(factors.columns))
    left = torch.zeros(factors.rows, factors.rows)
    if factors.left:
        left[: factors.left, : factors.left] = _signs_of(_left_plan(plan, factors)).T
    return left.to(device, torch.bfloat16), right.to(device, torch.bfloat16)


def _left_plan(plan: HadamardPlan, factors: Factors) -> HadamardPlan:
    """P ⊗ S, S being what the right factor leaves of the plan's Sylvester part."""
    power = plan.power // factors.columns
    return HadamardPlan(
        width=factors.left, block=factors.left, order=plan.order, power=power, reason="the left factor"
    )


def _signs_of(plan: HadamardPlan) -> Tensor:
    return dense(plan).sign().to(torch.float32)


def _padded(rows: int) -> int:
    return max(SMALLEST_FACTOR, 1 << (rows - 1).bit_length())
