"""QUAD (2503.19353): the leading directions of an input go through a skinny 16-bit product, the rest is quantized.

Two forms. `Quad` is the one to deploy: each site has its own directions P [K, r], its linears keep their shapes, and
online it costs x P, one rank-r update and a block Hadamard:

    side = x P                     side weight = W P (2 I − PᵀP)
    main = (x − side Pᵀ) R         main weight = W (I − P Pᵀ) R

The factor 2 I − PᵀP is the identity for orthonormal columns; with it the sum is x Wᵀ for *any* P, so P may be stored
in 16 bits and the float model stays what it was.

`widen_residual` is the published form: one P for the model, and a residual stream of width r + d in which the first r
columns are the directions and no input is ever projected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.side_gemm import side_columns
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.directions import leading_directions
from qtool.quantize.transforms.in_rows import computed_in_float64, make_symmetric
from qtool.quantize.transforms.site_transform import Parts

STORED = torch.float16


@dataclass(frozen=True, kw_only=True)
class Quad:
    """The per-site form; see the module.

    Attributes:
        directions: P [K, r] float32, holding float16 values.
        rotation: R.
    """

    directions: Tensor
    rotation: BlockHadamard
    kind: ClassVar[str] = "quad"

    @property
    def main_width(self) -> int:
        return len(self.directions)

    @property
    def side_width(self) -> int:
        return int(self.directions.shape[1])

    @property
    def online_products(self) -> int:
        return 2 * self.directions.numel() + self.rotation.online_products

    @property
    def online_nodes(self) -> int:
        return 5 + self.rotation.online_nodes  # side, projection, rest; the side's product and its sum

    def input(self, x: Tensor) -> Parts:
        side = side_columns(x, self.directions)
        return self.rotation.rotate(x - side @ self.directions.T), side

    def weight(self, weight: Tensor) -> Parts:
        p = self.directions.double()
        to_side = p @ (2 * torch.eye(self.side_width, dtype=p.dtype) - p.T @ p)
        main = computed_in_float64(weight, lambda w: self.rotation.rotate(w - (w @ p) @ p.T))
        return main, computed_in_float64(weight, lambda w: w @ to_side, self.side_width)

    def second_moment(self, hessian: Tensor, *, inplace: bool = False) -> Tensor:
        p, rest = self.directions.double(), hessian if inplace else hessian.clone()
        rest.addmm_(rest @ p, p.T, alpha=-1)
        rest.addmm_(p, p.T @ rest, alpha=-1)
        # Rounding leaves tiny asymmetries that a Cholesky factorisation would see.
        return self.rotation.second_moment(make_symmetric(rest), inplace=True)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"directions": self.directions.to(STORED), **self.rotation.to_tensors()}

    def header(self) -> dict[str, Any]:
        return {**self.rotation.header(), "kind": self.kind}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(
            directions=tensors["directions"].to(torch.float32), rotation=BlockHadamard.from_tensors(header, tensors)
        )


def quad(second_moment: Tensor, rank: int, *, seed: int, stream: str, block: int | None = None) -> Quad:
    """The per-site transform for inputs with this second moment.

    Args:
        second_moment: Σ x xᵀ, or Σ x xᵀ / |x|² so that massive tokens do not own the directions; [K, K] float64.
        rank: r, 8 … 128.
        seed, stream: of the rotation's signs; the stream is the site's name.
        block: of the rotation; None takes the widest of 64, 32, 16 that divides K.

    Raises:
        InputRefused: for a rank or width that cannot be.
    """
    directions = leading_directions(second_moment, rank).to(STORED).to(torch.float32)
    rotation = BlockHadamard.random(len(second_moment), seed=seed, stream=stream, block=block)
    return Quad(directions=directions, rotation=rotation)


@dataclass(frozen=True, kw_only=True)
class WideResidual:
    """The published form: h ↦ h Q for a residual stream of width d, Q [d, r + d] with Q Qᵀ = I.

    RMSNorm without a gain commutes with Q when its mean square divides by d, not by r + d; norm gains must be folded
    into the readers first and the head untied. |h Q| = |h|.

    Attributes:
        q: [d, r + d] float32: the directions rotated among themselves, then the rest rotated in blocks.
        rank: r.
    """

    q: Tensor
    rank: int

    def rows(self, embedding: Tensor) -> Tensor:
        """E Q: the embedding [V, d] to [V, r + d]."""
        return _product(embedding, self.q)

    def reader(self, weight: Tensor) -> Tensor:
        """W Q: q, k, v, gate, up and head, [N, d] to [N, r + d]; the first r columns stay in 16 bits."""
        return _product(weight, self.q)

    def writer(self, weight: Tensor) -> Tensor:
        """Qᵀ W: o and down, [d, K] to [r + d, K]."""
        return _product(self.q.T, weight)

    def writer_bias(self, bias: Tensor) -> Tensor:
        """b Q: a writer's bias [d] to [r + d]."""
        return _product(bias, self.q)


def widen_residual(second_moment: Tensor, rank: int, *, seed: int, block: int | None = None) -> WideResidual:
    """Q = [P, I − P Pᵀ] with its two parts rotated.

    Args:
        second_moment: of the gain-free norm's inputs, summed over all layers, [d, d] float64.
        rank: r; a power of two, so that the r columns are one Hadamard.
        seed, block: of the rotations.

    Raises:
        InputRefused: for a rank that is no power of two or does not fit.
    """
    if rank & (rank - 1):
        raise InputRefused(f"rank {rank}", "is not a power of two", "choose 16, 32, 64 or 128")
    p = leading_directions(second_moment, rank)
    width = len(p)
    first = BlockHadamard.random(rank, seed=seed, stream="residual directions", block=rank)
    rest = BlockHadamard.random(width, seed=seed, stream="residual", block=block)
    parts = [first.rotate(p), rest.rotate(torch.eye(width, dtype=torch.float64) - p @ p.T)]
    return WideResidual(q=torch.cat(parts, dim=1).to(torch.float32), rank=rank)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).to(torch.float32)
