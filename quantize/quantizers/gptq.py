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
from qtool.quantize.quantizers.numerics import Grid, choose_grid, code_dtype, to_codes, zero_of
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
    dead = diagonal == 0
    # torch.sort with stable=True keeps equal columns in their order, so ties break by index.
    order = torch.sort(diagonal, descending=True, stable=True).indices if options.act_order else None
    alive = hessian + torch.diag(dead.to(torch.float64))
    factor = inverse_factor(alive if order is None else alive[order][:, order], options.damp)
    chunks = [
        _round_rows(chunk, factor.upper, diagonal, order, scheme, options) for chunk in torch.split(weight, CHUNK_ROWS)
    ]
    zeros = [grid.zero_point for _, grid in chunks if grid.zero_point is not None]
    grid = Grid(scale=torch.cat([g.scale for _, g in chunks]), zero_point=torch.cat(zeros) if zeros else None)
    codes = torch.cat([c for c, _ in chunks])
    return Outcome(codes=codes, grid=grid, damp=factor.damp, escalations=factor.escalations)


def _round_rows(
    weight: Tensor,
    upper: Tensor,
    diagonal: Tensor,
    order: Tensor | None,
    scheme: TensorScheme,
    options: QuantizerOptions,
) -> tuple[Tensor, Grid]:
    rows, columns = weight.shape
    group = group_size_of(scheme.granularity) or columns
    grids = _Grids(weight, diagonal, scheme, options, static=order is not None or group >= columns)
    permuted = weight if order is None else weight[:, order]
    work = permuted.T.contiguous()  # [K, n]: a column of the weight is then contiguous
    codes = torch.empty(columns, rows)
    groups_of = (torch.arange(columns) if order is None else order).div(group, rounding_mode="floor").tolist()
    # Without act_order a group's grid is taken from updated columns, so a lazy block must not end inside a group.
    block_size = options.block_size if grids.static else max(group, options.block_size // group * group)
    diagonals = upper.diagonal().tolist()
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows)
        for column in range(start, end):
            if not grids.static and column % group == 0:
                grids.enter(column, work[column : column + group])
            scale, zero = grids.of(groups_of[column])
            current = work[column]
            torch.sub(to_codes(current / scale, zero, scheme), zero, out=codes[column])
            error = torch.div(current - codes[column] * scale, diagonals[column], out=errors[column - start])
            work[column + 1 : end].addr_(upper[column, column + 1 : end], error, alpha=-1)
            codes[column] += zero
        work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    grid = grids.grid()
    result = torch.empty(rows, columns, dtype=code_dtype(scheme.format))
    result[:, torch.arange(columns) if order is None else order] = codes.T.to(result.dtype)
    return result, grid


class _Grids:
    """The grids of one chunk of rows: all chosen at once (static), or group by group as columns are reached."""

    def __init__(
        self, weight: Tensor, diagonal: Tensor, scheme: TensorScheme, options: QuantizerOptions, *, static: bool
    ) -> None:
        self.static = static
        self._scheme, self._options, self._diagonal = scheme, options, diagonal
        self._scales: list[Tensor] = []
        self._zeros: list[Tensor] = []
        if static:
            self._append(weight, diagonal)

    def enter(self, column: int, updated: Tensor) -> None:
        """Choose the grid of the group that begins at `column` from its updated columns [g, n]."""
        self._append(updated.T.contiguous(), self._diagonal[column : column + len(updated)])

    def of(self, group: int) -> tuple[Tensor, Tensor | float]:
        """Scale [n] and zero ([n], or one number) of a group."""
        return self._scales[group], self._zeros[group] if self._zeros else zero_of(self._scheme)

    def grid(self) -> Grid:
        """All groups together."""
        zero = torch.stack(self._zeros, dim=1).to(torch.uint8) if self._zeros else None
        return Grid(scale=torch.stack(self._scales, dim=1), zero_point=zero)

    def _append(self, weight: Tensor, importance: Tensor) -> None:
        clip = self._options.mse_clip is not False
        grid = choose_grid(weight, self._scheme, mse_clip=clip, importance=importance)
        self._scales += [column.contiguous() for column in grid.scale.T]
        if grid.zero_point is not None:
            self._zeros += [column.to(torch.float32).contiguous() for column in grid.zero_point.T]
