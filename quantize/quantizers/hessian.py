"""The second moments of a linear's input, H = Σ x xᵀ: accumulated in a fixed order, factored in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import InputRefused

ESCALATION = 10.0
LARGEST_DAMP = 10.0


class Hessian:
    """A running H [K, K]. Each batch's product is taken in float32 and added in float64, in the order given."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., K] float32.

        Raises:
            InputRefused: when an input is not finite.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        product = rows.T @ rows
        # A NaN or infinity anywhere in a column reaches that column's diagonal entry.
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise InputRefused(f"{self._name}.input", "is not finite on this text", "check the model's weights")
        self._sum = product.double() if self._sum is None else self._sum.add_(product)

    def matrix(self) -> Tensor:
        """H [K, K] float64, after at least one `add`."""
        assert self._sum is not None
        return self._sum


@dataclass(frozen=True, kw_only=True)
class InverseFactor:
    """U [K, K] float32, upper triangular, with (H + damping)⁻¹ = UᵀU up to a positive factor."""

    upper: Tensor
    damp: float
    escalations: int


def inverse_factor(hessian: Tensor, damp: float) -> InverseFactor:
    """Factor the inverse of H + damp × mean(diag H) × I, multiplying damp by ten until it is positive definite.

    With P the reversal of the order, P H P = L Lᵀ gives U = P L⁻¹ P: no inverse of H is ever formed.

    Args:
        hessian: [K, K] float64, symmetric, no zero on the diagonal.
        damp: the first damping to try.

    Raises:
        InputRefused: when even the largest damping does not help.
    """
    scaled = hessian / hessian.diagonal().mean()
    flipped = scaled.flip(0, 1)
    identity = torch.eye(len(scaled), dtype=torch.float64)
    escalations = 0
    while damp <= LARGEST_DAMP:
        lower, info = torch.linalg.cholesky_ex(flipped + damp * identity)
        if int(info) == 0:
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).to(torch.float32)
            if bool(torch.isfinite(upper).all()):
                return InverseFactor(upper=upper.contiguous(), damp=damp, escalations=escalations)
        damp *= ESCALATION
        escalations += 1
    raise InputRefused("Hessian", "is not positive definite at any damping", "calibrate on more or other text")


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the squared output error relative to the output. E and W are [N, K] float32."""
    lost, whole = (float(((m @ hessian) * m).sum()) for m in (difference.double(), weight.double()))
    return lost / whole if whole > 0 else 0.0
