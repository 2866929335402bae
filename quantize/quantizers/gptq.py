"""GPTQ: round one column after another and let the columns not yet rounded make up for the error.

Frantar et al., 2210.17323; the order of work and the names follow the authors' code. Ours differs in three points:
a column that the calibration text never excites keeps its own nearest codes instead of zeros, groups stay
contiguous under act_order because their grids are chosen beforehand on the original weight, and the factor of the
inverse comes from one Cholesky decomposition of the reversed Hessian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.rule import QuantizerOptions
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.quantizers.hessian import inverse_factor
from qtool.quantize.quantizers.numerics import (
    Grid,
    choose_grid,
    code_dtype,
    scale_factor,
    stored_codes,
    to_codes,
    zero_of,
)
from qtool.quantize.quantizers.outcome import Outcome

CHUNK_ROWS = 4096


def gptq(weight: Tensor, hessian: Tensor | None, scheme: TensorScheme, options: QuantizerOptions) -> Outcome:
    """Quantize a weight [N, K] float32 against H [K, K] float64.

    Args:
        weight: [N, K] float32; not changed.
        hessian: Σ x xᵀ over the calibration inputs, [K, K] float64; not changed.
        scheme: the weight's format and grouping.
        options: damp, act_order, mse_clip, block_size.

    Returns:
        codes, grid, and the damping that was needed.
    """
    assert hessian is not None
    diagonal = hessian.diagonal()
    # torch.sort with stable=True keeps equal columns in their order, so ties break by index.
    order = torch.sort(diagonal, descending=True, stable=True).indices if options.act_order else None
    factor = inverse_factor(hessian, options.damp, order)
    clip = options.mse_clip is not False
    multiples = scale_factor(weight, scheme, mse_clip=clip, importance=diagonal)
    parts = [slice(start, start + CHUNK_ROWS) for start in range(0, len(weight), CHUNK_ROWS)]
    chunks = [
        _round_rows(
            weight[part],
            factor.upper,
            _Grids(diagonal, scheme, clip=clip, factor=None if multiples is None else multiples[part]),
            order,
            options.block_size,
        )
        for part in parts
    ]
    zeros = [grid.zero_point for _, grid in chunks if grid.zero_point is not None]
    grid = Grid(
        scale=torch.cat([g.scale for _, g in chunks]),
        zero_point=torch.cat(zeros) if zeros else None,
        factor=multiples,
    )
    codes = torch.cat([c for c, _ in chunks])
    return Outcome(codes=codes, grid=grid, damp=factor.damp, escalations=factor.escalations)


def _round_rows(
    weight: Tensor, upper: Tensor, grids: _Grids, order: Tensor | None, block_size: int
) -> tuple[Tensor, Grid]:
    rows, columns = weight.shape
    scheme = grids.scheme
    group = group_size_of(scheme.granularity) or columns
    static = order is not None or group >= columns
    if static:
        grids.enter(0, weight)
    permuted = weight if order is None else weight[:, order]
    work = permuted.T.contiguous()  # [K, n]: a column of the weight is then contiguous
    codes = torch.empty(columns, rows)
    groups_of = (torch.arange(columns) if order is None else order).div(group, rounding_mode="floor").tolist()
    # Without act_order a group's grid is taken from updated columns, so a lazy block must not end inside a group.
    block_size = block_size if static else max(group, block_size // group * group)
    diagonals = upper.diagonal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows)
        for column in range(start, end):
            if not static and column % group == 0:
                grids.enter(column, work[column : column + group].T.contiguous())
            scale, zero = grids.of(groups_of[column])
            current = work[column]
            torch.sub(to_codes(current / scale, zero, scheme), zero, out=codes[column])
            error = torch.div(current - codes[column] * scale, diagonals[column], out=errors[column - start])
            work[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            codes[column] += zero
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    grid = grids.grid()
    result = torch.empty(rows, columns, dtype=code_dtype(scheme.format))
    result[:, torch.arange(columns) if order is None else order] = stored_codes(codes.T, scheme.format)
    return result, grid


class _Grids:
    """The grids of one chunk of rows: all chosen at once, or group by group as columns are reached.

    Args:
        diagonal: of the Hessian [K].
        scheme: of the weight.
        clip: search the range.
        factor: [n, 1] of the chunk's rows where the scheme's scales have one.
    """

    def __init__(self, diagonal: Tensor, scheme: TensorScheme, *, clip: bool, factor: Tensor | None) -> None:
        self.scheme = scheme
        self._diagonal, self._clip, self._factor = diagonal, clip, factor
        self._scales: list[Tensor] = []
        self._zeros: list[Tensor] = []

    def enter(self, column: int, weight: Tensor) -> None:
        """Choose the grids of the next columns [n, k], of which `column` is the first."""
        importance = self._diagonal[column : column + weight.shape[1]]
        grid = choose_grid(
            weight, self.scheme, mse_clip=self._clip, importance=importance, factor=self._factor
        )
        self._scales += [scale.contiguous() for scale in grid.scale.T]
        if grid.zero_point is not None:
            self._zeros += [zero.to(torch.float32).contiguous() for zero in grid.zero_point.T]

    def of(self, group: int) -> tuple[Tensor, Tensor | float]:
        """Scale [n] and zero ([n], or one number) of a group."""
        return self._scales[group], self._zeros[group] if self._zeros else zero_of(self.scheme)

    def grid(self) -> Grid:
        """All groups together."""
        zero = torch.stack(self._zeros, dim=1).to(torch.uint8) if self._zeros else None
        return Grid(scale=torch.stack(self._scales, dim=1), zero_point=zero, factor=self._factor)
