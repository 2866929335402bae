"""Signed-gradient rounding of one weight: an offset for every weight and a factor for every range.

Ŵ = s f clip(round(U / f + V)), with offsets V ∈ [−½, ½] and factors f that start at 0 and 1. A step moves each by a
rate against the sign of its gradient; rounding counts as the identity (AutoRound, 2309.05516).

Ours differs in three points.

It starts at codes that another quantizer found: U, the weight in units of its scale, is first moved into the cell of
its code, no further than needed. Offsets of zero then are those codes, and a weight that GPTQ pushed over an edge lies
next to that edge.

An offset has two codes to choose from, and what decides between them is the slope half-way: the gradient as it is now,
less what the weight's own curvature makes of its present code. Without that, every weight is driven away from the code
it has, back and forth over the edge, and ends on either side: on inputs without correlations, where rounding to nearest
is nearly best, the published form ends at 1.6 times its error and this one at 0.8.

Factors move slower than offsets, since one of them moves a whole group's codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.quantizers.numerics import Grid, as_stored, code_dtype, in_groups, lowest_code, zero_of

HALF_CELL = 0.5 - 2.0**-10  # inside the cell, whichever way a tie rounds
FACTORS = (0.5, 1.5)
FACTOR_SHARE = 1 / 4  # of an offset's rate, in what it moves the outermost code by
CHUNK_ELEMENTS = 1 << 17  # a few float32 arrays of this size stay in cache


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Second derivatives of a loss by a weight's elements, as a product: `rows` [N] × `columns` [K], not negative."""

    rows: Tensor
    columns: Tensor


class SignedRounding:
    """The offsets and factors of one weight.

    Args:
        weight: [N, K] float32, what the codes stand for.
        codes: [N, K] uint8, where to start.
        grid: scales and zero points to start from; the zero points stay, and so do scales that are not plain floats.
        scheme: of the weight; integers.
    """

    def __init__(self, weight: Tensor, codes: Tensor, grid: Grid, scheme: TensorScheme) -> None:
        rows, self._columns = weight.shape
        group = group_size_of(scheme.granularity) or self._columns
        self._grid, self._scheme = grid, scheme
        scale = grid.scale.unsqueeze(-1)
        zero = torch.full_like(scale, zero_of(scheme)) if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
        self._zero = zero.to(torch.float32)
        start = in_groups(codes.to(torch.float32) - self._spread(self._zero, group), group)
        self._ratio = torch.clamp(in_groups(weight, group) / scale, start - HALF_CELL, start + HALF_CELL)
        self._offset = torch.zeros_like(self._ratio)
        self._factor = torch.ones_like(scale)
        step = max(1, CHUNK_ELEMENTS // self._columns)
        self._parts = [slice(at, at + step) for at in range(0, rows, step)]

    def step(self, gradient: Tensor, curvature: Curvature, rate: float) -> None:
        """Move every offset by `rate`, every factor so that its outermost code moves by a share of that.

        Args:
            gradient: of the loss by the weight, [N, K] float32.
            curvature: the loss's second derivatives.
            rate: in steps of the grid.
        """
        group = self._ratio.shape[-1]
        factor_rate = rate * FACTOR_SHARE / self._scheme.format.qmax
        gradients, columns = in_groups(gradient, group), in_groups(curvature.columns.unsqueeze(0), group)
        for part in self._parts:
            slope, factor, scale = gradients[part], self._factor[part], self._scale(part)
            ratio = self._ratio[part] / factor
            integers = self._clipped((ratio + self._offset[part]).round_(), part)
            to_middle = ratio.floor().add_(0.5).sub_(integers)
            decisive = to_middle.mul_(columns).mul_(curvature.rows[part, None, None] * scale).add_(slope)
            self._offset[part].sub_(decisive.sign_(), alpha=rate).clamp_(-0.5, 0.5)
            if self._scheme.scale == "float":
                # A code inside the range moves against its scale; one at a clipped end grows with it.
                low, high = self._ends(part)
                follows = integers - ratio.mul_((integers > low) & (integers < high))
                direction = follows.mul_(slope).sum(dim=-1, keepdim=True).sign_()
                self._factor[part] = (factor - factor_rate * direction).clamp_(*FACTORS)

    def write_weight(self, out: Tensor) -> None:
        """Write Ŵ to `out` [N, K] float32."""
        for part in self._parts:
            value = self._integers(part).mul_(self._scale(part))
            out[part] = value.flatten(1)[:, : self._columns]

    def result(self) -> tuple[Tensor, Grid]:
        """Codes [N, K] as they are stored, and their grid."""
        codes = torch.cat([(self._integers(part) + self._zero[part]).flatten(1) for part in self._parts])
        scale = torch.cat([self._scale(part).squeeze(-1) for part in self._parts])
        grid = Grid(scale=scale, zero_point=self._grid.zero_point, factor=self._grid.factor)
        return codes[:, : self._columns].to(code_dtype(self._scheme.format)), grid

    def _spread(self, per_group: Tensor, group: int) -> Tensor:
        return per_group.expand(-1, -1, group).flatten(1)[:, : self._columns]

    def _integers(self, part: slice) -> Tensor:
        return self._clipped((self._ratio[part] / self._factor[part]).add_(self._offset[part]).round_(), part)

    def _clipped(self, rounded: Tensor, part: slice) -> Tensor:
        low, high = self._ends(part)
        return torch.maximum(torch.minimum(rounded, high), low)

    def _ends(self, part: slice) -> tuple[Tensor, Tensor]:
        zero = self._zero[part]
        return lowest_code(self._scheme) - zero, self._scheme.format.max_code - zero

    def _scale(self, part: slice) -> Tensor:
        return as_stored(self._grid.scale[part].unsqueeze(-1) * self._factor[part], self._scheme)
