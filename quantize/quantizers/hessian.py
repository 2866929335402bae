"""The second moments of a linear's input, H = Σ x xᵀ: accumulated in a fixed order, factored in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.quantizers.in_place import InPlace

ESCALATION = 10.0
LARGEST_DAMP = 10.0
INVERSE_COLUMNS = 256
ERROR_ROWS = 512


class Hessian:
    """A running H [K, K]. Each batch's product is taken in float32 and added in float64, in the order given.

    Args:
        name: of the linear, for refusals.
        token_weights: one for every row in the order they will come, H = Σ w x xᵀ; None: all the same.
    """

    def __init__(self, name: str, token_weights: Tensor | None = None) -> None:
        self._name = name
        self._left = token_weights
        self._sum: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., K] float32.

        Raises:
            InputRefused: when an input is not finite.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self._left is not None:
            rows, self._left = rows * self._left[: len(rows), None].sqrt(), self._left[len(rows) :]
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


def inverse_factor(hessian: Tensor, damp: float, order: Tensor | None = None) -> InverseFactor:
    """Factor the inverse of H + damp × mean(diag H) × I, multiplying damp by ten until it is positive definite.

    With P the reversal of the order, P H P = L Lᵀ gives U = P L⁻¹ P: no inverse of H is ever formed. Beside H there is
    one more matrix of its size, in which L, L⁻¹ and U follow each other.

    Args:
        hessian: [K, K] float64, symmetric; not changed. A zero on the diagonal counts as one.
        damp: the first damping to try.
        order: [K] int64; factor H with rows and columns in this order. None: as they are.

    Raises:
        InputRefused: when even the largest damping does not help.
    """
    diagonal = torch.where(hessian.diagonal() == 0, 1.0, hessian.diagonal())
    if order is None:
        order = torch.arange(len(hessian))
    mean = diagonal[order].mean()
    backwards = order.flip(0)
    levels = diagonal[backwards] / mean
    info = torch.empty((), dtype=torch.int32)
    escalations = 0
    while damp <= LARGEST_DAMP:
        room = InPlace(len(hessian))
        matrix = room.matrix
        for start in range(0, len(hessian), ERROR_ROWS):
            rows = slice(start, start + ERROR_ROWS)
            matrix[rows] = hessian[backwards[rows]][:, backwards].div_(mean)
        matrix.diagonal().copy_(levels + damp)
        # LAPACK counts by columns: its upper triangle is our lower one, and a symmetric matrix is its own transpose.
        torch.linalg.cholesky_ex(matrix.mT, upper=True, out=(matrix.mT, info))
        if int(info) == 0:
            _invert_lower(matrix)
            upper = room.reversed_float32()
            if bool(torch.isfinite(upper.sum())):
                return InverseFactor(upper=upper, damp=damp, escalations=escalations)
        damp *= ESCALATION
        escalations += 1
    raise InputRefused("Hessian", "is not positive definite at any damping", "calibrate on more or other text")


def _invert_lower(lower: Tensor) -> Tensor:
    """L⁻¹ in the place of a lower triangular L [K, K], from the last columns to the first (LAPACK's trtri)."""
    size = len(lower)
    for start in reversed(range(0, size, INVERSE_COLUMNS)):
        stop = min(start + INVERSE_COLUMNS, size)
        corner = lower[start:stop, start:stop]
        identity = torch.eye(stop - start, dtype=lower.dtype)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        if stop < size:
            lower[stop:, start:stop] = -(lower[stop:, stop:] @ (lower[stop:, start:stop] @ inverse))
        corner.copy_(inverse)
    return lower


def output_error(difference: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ): the squared output error relative to the output. E and W are [N, K] float32."""
    lost, whole = (_squared_output(m, hessian) for m in (difference, weight))
    return lost / whole if whole > 0 else 0.0


def squared_norm(matrix: Tensor) -> float:
    """‖M‖² of a float32 matrix, added in float64."""
    return float(torch.stack([piece.double().square().sum() for piece in torch.split(matrix, ERROR_ROWS)]).sum())


def _squared_output(matrix: Tensor, hessian: Tensor) -> float:
    pieces = (piece.double() for piece in torch.split(matrix, ERROR_ROWS))
    return float(torch.stack([((piece @ hessian) * piece).sum() for piece in pieces]).sum())
