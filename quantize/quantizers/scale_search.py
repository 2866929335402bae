"""The scale with the least (weighted) squared error of each group.

All is measured in units of the unclipped scale, so that nothing overflows or underflows for any finite weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

REFITS = 2
FACTORS = (2.0**-60, 2.0**60)  # beyond them nothing changes but overflow


class ScaleSearch:
    """Groups of weights and what rounding them costs.

    Args:
        groups: [n, G, g] float32.
        unit: the unclipped scale [n, G, 1], positive.
        on_grid: weights in units of a scale to the nearest codes, as signed numbers.
        importance: [1, G, g] weights of the squared error, or None.
    """

    def __init__(
        self, groups: Tensor, unit: Tensor, on_grid: Callable[[Tensor], Tensor], importance: Tensor | None
    ) -> None:
        self._ratio = groups / unit
        self._unit, self._on_grid, self._importance = unit, on_grid, importance

    def error(self, factor: Tensor | float) -> Tensor:
        """The error [n, G, 1] of scale = factor × unit, in squares of the unit."""
        return self._error(self._on_grid(self._ratio / factor), factor)

    def best_factor(self, factors: Iterable[float]) -> Tensor:
        """The scale [n, G, 1] among 1 and the factors times the unit, and their least-squares refits."""
        best = torch.ones_like(self._unit)
        least = self.error(1.0)
        for factor in factors:
            found = self.error(factor)
            better = found < least
            best = torch.where(better, torch.full_like(best, factor), best)
            least = torch.where(better, found, least)
        for _ in range(REFITS):
            refit = self._refit(best)
            found = self.error(refit)
            better = found < least
            best, least = torch.where(better, refit, best), torch.where(better, found, least)
        return self._unit * best

    def best_of(self, scales: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """The best of several scales [n, G, 1], the first among equals, and its error in squares of the unit."""
        best = least = None
        for scale in scales:
            found = self.error((scale / self._unit).clamp(*FACTORS))
            if best is None or least is None:
                best, least = scale, found
            better = found < least
            best, least = torch.where(better, scale, best), torch.where(better, found, least)
        assert best is not None and least is not None
        return best, least

    def _error(self, codes: Tensor, factor: Tensor | float) -> Tensor:
        square = (codes * factor).sub_(self._ratio).square_()
        return (square if self._importance is None else square.mul_(self._importance)).sum(dim=-1, keepdim=True)

    def _refit(self, factor: Tensor) -> Tensor:
        codes = self._on_grid(self._ratio / factor)
        weighted = codes if self._importance is None else codes * self._importance
        square = (weighted * codes).sum(dim=-1, keepdim=True)
        refit = (weighted * self._ratio).sum(dim=-1, keepdim=True)
        refit = refit / torch.where(square > 0, square, torch.ones_like(square))
        return torch.where((square > 0) & (refit > 0), refit, factor)
