"""LoRC (2303.08302): a low-rank correction of what rounding did to a weight, y += (x Vᵀ) Uᵀ.

With E = W − Ŵ and H = Σ x xᵀ the best correction of rank r minimises tr((E − UV) H (E − UV)ᵀ). Let U hold the r leading
left singular vectors of E H^½, which are the leading eigenvectors of E H Eᵀ. Then U Uᵀ E is that optimum: no root and
no inverse of H is needed. H = I is the published, unweighted form. It is usable after every quantizer, and x is
whatever the weight reads: the transformed input in float, not its codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.transforms.directions import leading_directions, with_fixed_signs

DAMP = 0.01
INT8_MAX = 127.0


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """A correction U V; up is U [N, r] and down is V [r, K], float32."""

    up: Tensor
    down: Tensor

    @property
    def weight(self) -> Tensor:
        """U V [N, K]."""
        return self.up @ self.down

    def output(self, x: Tensor) -> Tensor:
        """What is added to y: x [..., K] to [..., N]."""
        return (x @ self.down.T) @ self.up.T


def low_rank(error: Tensor, rank: int, hessian: Tensor | None = None, *, damp: float = DAMP) -> LowRank:
    """The best correction of an error.

    Args:
        error: E = W − Ŵ [N, K] float32.
        rank: r, at most min(N, K).
        hessian: Σ x xᵀ [K, K] float64 of what the weight reads, or None for the unweighted form.
        damp: damp × mean(diag H) is added to the diagonal, so that directions which the text never showed still count.

    Raises:
        InputRefused: for a rank that does not fit, or numbers that are not finite.
    """
    rows, columns = error.shape
    if not 1 <= rank <= min(rows, columns):
        raise InputRefused(f"rank {rank}", f"does not fit a weight of {rows} × {columns}", "choose a smaller rank")
    e = error.double()
    weighted = e if hessian is None else torch.addmm(e, e, hessian, beta=damp * float(hessian.diagonal().mean()))
    if rows <= columns:
        gram = weighted @ e.T
        up = leading_directions((gram + gram.T) / 2, rank)
    else:
        up = _tall_directions(e, weighted, rank)
    return LowRank(up=up.to(torch.float32), down=(up.T @ e).to(torch.float32))


def _tall_directions(e: Tensor, weighted: Tensor, rank: int) -> Tensor:
    """Leading eigenvectors of E H Eᵀ [N, N] for N > K: those of R H Rᵀ, with E = Q R, turned by Q."""
    q, r = torch.linalg.qr(e)
    gram = (q.T @ weighted) @ r.T
    return with_fixed_signs(q @ leading_directions((gram + gram.T) / 2, rank))


@dataclass(frozen=True, kw_only=True)
class LowRankCodes:
    """A correction in 8 bits: int8 codes up [N, r] and down [r, K], one float32 scale [r] for each pair."""

    up: Tensor
    down: Tensor
    scale: Tensor

    @staticmethod
    def of(factors: LowRank) -> LowRankCodes:
        """Round to the nearest codes, −127…127."""
        up, up_scale = _codes(factors.up.T)
        down, down_scale = _codes(factors.down)
        return LowRankCodes(up=up.T.contiguous(), down=down, scale=up_scale * down_scale)

    def factors(self) -> LowRank:
        """The float factors that the codes stand for; the scale goes with V."""
        return LowRank(up=self.up.to(torch.float32), down=self.down.to(torch.float32) * self.scale.unsqueeze(-1))

    @property
    def stored_bits(self) -> int:
        """Bits on disk."""
        return 8 * (self.up.numel() + self.down.numel()) + 32 * len(self.scale)


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(dim=1) / INT8_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return torch.round(rows / scale.unsqueeze(1)).to(torch.int8), scale
