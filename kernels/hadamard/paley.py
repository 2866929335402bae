"""Hadamard matrices of orders that are no power of two, by Paley's two constructions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from qtool.kernels.hadamard.finite_field import character_of_differences, prime_power

Matrix = npt.NDArray[np.int8]


def paley_prime_power(order: int) -> tuple[str, int] | None:
    """("Paley I", order − 1) or ("Paley II", order / 2 − 1) when one of them builds this order; otherwise None."""
    if order % 4:
        return None
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and prime_power(first):
        return "Paley I", first
    if second % 4 == 1 and prime_power(second):
        return "Paley II", second
    return None


@lru_cache(maxsize=16)
def paley(order: int) -> Matrix:
    """A Hadamard matrix [order, order] of ±1 whose first row and first column are all +1.

    Raises:
        ValueError: when neither construction has this order.
    """
    found = paley_prime_power(order)
    if found is None:
        raise ValueError(f"Paley builds no Hadamard matrix of order {order}")
    name, q = found
    matrix = _first(q) if name == "Paley I" else _second(q)
    matrix = matrix * matrix[:1]
    normal: Matrix = matrix * matrix[:, :1]
    normal.setflags(write=False)
    return normal


def _bordered(q: int, left: int) -> Matrix:
    matrix = np.empty((q + 1, q + 1), dtype=np.int8)
    matrix[0, 0], matrix[0, 1:], matrix[1:, 0] = 0, 1, left
    matrix[1:, 1:] = character_of_differences(q)
    return matrix


def _first(q: int) -> Matrix:
    """I + S with the skew S = [[0, 1ᵀ], [−1, Q]], q ≡ 3 mod 4."""
    return np.eye(q + 1, dtype=np.int8) + _bordered(q, -1)


def _second(q: int) -> Matrix:
    """C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]] with the symmetric C = [[0, 1ᵀ], [1, Q]], q ≡ 1 mod 4."""
    off = np.array([[1, 1], [1, -1]], dtype=np.int8)
    on = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(_bordered(q, 1), off) + np.kron(np.eye(q + 1, dtype=np.int8), on)
