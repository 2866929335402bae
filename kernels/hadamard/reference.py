"""The transform in plain torch; runs anywhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qtool.kernels.hadamard.paley import paley
from qtool.kernels.hadamard.plan import HadamardPlan

FACTOR = 64


def apply(x: Tensor, plan: HadamardPlan, signs: Tensor | None = None) -> Tensor:
    """(x ∘ signs) M.

    Args:
        x: [..., width], floating point; half precision is transformed in float32.
        plan: of this width.
        signs: [width], or any shape that broadcasts against x; None: all +1.

    Returns:
        [..., width] in x's dtype.
    """
    rotated: Tensor = _Apply.apply(x, plan, signs)  # type: ignore[no-untyped-call]
    return rotated


class _Apply(torch.autograd.Function):
    """`apply`; its gradient is `invert` of the gradient, without the butterflies' own graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: HadamardPlan, signs: Tensor | None) -> Tensor:
        ctx.plan, ctx.signs = plan, signs
        wide = _wide(x)
        return _mixed(wide if signs is None else wide * signs.to(wide), plan, inverse=False).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return invert(gradients[0], ctx.plan, ctx.signs), None, None


def invert(x: Tensor, plan: HadamardPlan, signs: Tensor | None = None) -> Tensor:
    """x Mᵀ ∘ signs: what undoes `apply` with the same plan and signs."""
    mixed = _mixed(_wide(x), plan, inverse=True)
    return (mixed if signs is None else mixed * signs.to(mixed)).to(x.dtype)


def dense(plan: HadamardPlan, signs: Tensor | None = None) -> Tensor:
    """diag(signs) M as a float64 matrix R [width, width]: `apply(x)` is x R."""
    return apply(torch.eye(plan.width, dtype=torch.float64), plan, signs)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _mixed(x: Tensor, plan: HadamardPlan, *, inverse: bool) -> Tensor:
    if x.shape[-1] != plan.width:
        raise ValueError(f"a plan for {plan.width} channels, given {x.shape[-1]}")
    # Scaled first, so that nothing grows on the way.
    y = (x * plan.block**-0.5).reshape(*x.shape[:-1], plan.width // plan.block, plan.order, plan.power)
    if plan.order > 1:
        matrix = torch.tensor(paley(plan.order), dtype=x.dtype, device=x.device)
        y = (matrix if inverse else matrix.T) @ y
    y = _by_products(y) if x.dtype == torch.float64 else _by_butterflies(y)
    return y.reshape(x.shape)


def _by_butterflies(y: Tensor) -> Tensor:
    """y [..., power] times Sylvester's matrix. What a row becomes does not depend on the rows beside it, to the bit."""
    half, power, shape = 1, y.shape[-1], y.shape
    across = y.reshape(-1, power).T.contiguous()  # rows side by side, so that every step adds long runs
    while half < power:
        even, odd = across.reshape(power // (2 * half), 2, half, -1).unbind(1)
        across = torch.stack((even + odd, even - odd), dim=1).reshape(power, -1)
        half *= 2
    return across.T.reshape(shape)


def _by_products(y: Tensor) -> Tensor:
    """The same by matrix products with factors of 64: two to five times faster, where the last bits are spare."""
    inner, power, shape = 1, y.shape[-1], y.shape
    while inner < power:
        radix = min(FACTOR, power // inner)
        matrix = _sylvester(radix).to(y.device)
        y = y.reshape(-1, radix) @ matrix if inner == 1 else matrix @ y.reshape(-1, radix, inner)
        inner *= radix
    return y.reshape(shape)


@lru_cache(maxsize=8)
def _sylvester(order: int) -> Tensor:
    return _by_butterflies(torch.eye(order, dtype=torch.float64))
