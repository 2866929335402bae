"""The quadratic character of a finite field GF(p^k), as a table of all differences."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]
Digits = npt.NDArray[np.int64]


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime; None when there is none."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    rest, k = q, 0
    while rest % p == 0:
        rest, k = rest // p, k + 1
    return (p, k) if rest == 1 else None


@lru_cache(maxsize=16)
def character_of_differences(q: int) -> Signs:
    """Q [q, q] with Q[i, j] = χ(a_i − a_j): 1 for a non-zero square of GF(q), −1 for a non-square, 0 for zero.

    Raises:
        ValueError: when q is not an odd prime power.
    """
    field = prime_power(q)
    if field is None or field[0] == 2:
        raise ValueError(f"{q} is not an odd prime power")
    p, k = field
    elements = _digits(np.arange(q), p, k)
    character = np.full(q, -1, dtype=np.int8)
    character[_numbers(_squares(elements, p, k), p)] = 1
    character[0] = 0
    differences = (elements[:, None, :] - elements[None, :, :]) % p
    return character[_numbers(differences, p)]


def _digits(numbers: Digits, p: int, k: int) -> Digits:
    """An element is a polynomial; its number has the coefficients as digits in base p, constant first."""
    return np.stack([numbers // p**i % p for i in range(k)], axis=-1)


def _numbers(digits: Digits, p: int) -> Digits:
    return np.asarray(digits @ p ** np.arange(digits.shape[-1]))


def _squares(elements: Digits, p: int, k: int) -> Digits:
    product = np.zeros((len(elements), 2 * k - 1), dtype=np.int64)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += elements[:, i] * elements[:, j]
    modulus = _irreducible(p, k)
    for degree in range(2 * k - 2, k - 1, -1):
        product[:, degree - k : degree] -= product[:, degree, None] * modulus[None, :]
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> Digits:
    """The low coefficients [k] of the first monic polynomial of degree k that no monic one of lower degree divides."""
    for number in range(p**k):
        low = _digits(np.array([number]), p, k)[0]
        if not any(_divides(divisor, low, p) for divisor in _monic(p, k // 2)):
            return low
    raise AssertionError("every degree has an irreducible polynomial")


def _monic(p: int, highest_degree: int) -> list[list[int]]:
    return [[*low, 1] for degree in range(1, highest_degree + 1) for low in itertools.product(range(p), repeat=degree)]


def _divides(divisor: list[int], low: Digits, p: int) -> bool:
    rest = [*(int(c) for c in low), 1]
    while len(rest) >= len(divisor):
        lead, shift = rest[-1], len(rest) - len(divisor)
        for i, coefficient in enumerate(divisor):
            rest[shift + i] = (rest[shift + i] - lead * coefficient) % p
        rest.pop()
    return not any(rest)
