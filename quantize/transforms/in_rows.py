"""Large float64 matrices a few rows at a time, so that no second one of their size is ever made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ELEMENTS = 2**20  # of a piece: 8 MB


def rows_of(matrix: Tensor) -> Iterator[slice]:
    """The rows of a matrix [N, K] in pieces."""
    step = max(1, ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        yield slice(start, min(start + step, len(matrix)))


def computed_in_float64(weight: Tensor, compute: Callable[[Tensor], Tensor], columns: int | None = None) -> Tensor:
    """compute(weight.double()) in float32, where every row of it depends on its own row of the weight alone.

    Args:
        weight: [N, K] float32.
        compute: float64 [n, K] to [n, K'].
        columns: K', where it is not K.
    """
    found = torch.empty(len(weight), weight.shape[1] if columns is None else columns)
    for rows in rows_of(weight):
        found[rows] = compute(weight[rows].double())
    return found


def turn_both_sides(moment: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Rᵀ H R in the place of a symmetric H [K, K], where turn(rows) is rows R."""
    for rows in rows_of(moment):
        moment[rows] = turn(moment[rows])
    for columns in rows_of(moment):
        moment[:, columns] = turn(moment[:, columns].T.contiguous()).T
    return moment


def make_symmetric(moment: Tensor) -> Tensor:
    """(H + Hᵀ) / 2 in the place of H [K, K]."""
    for rows in rows_of(moment):
        mean = (moment[rows, rows.start :] + moment[rows.start :, rows].T) / 2
        moment[rows, rows.start :] = mean
        moment[rows.start :, rows] = mean.T
    return moment
