"""A signed Hadamard rotation of a site's input in front of a linear: x R, online, and W R offline cancels it.

Needs nothing but a width. Blocks of 64 cost 6 additions per element, or one product with tiles 64 wide; a block as wide
as the input is the whole rotation. A dense K × K rotation is never run online.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.hadamard import apply, hadamard_plan, random_signs
from qtool.quantize.transforms.in_rows import computed_in_float64, turn_both_sides
from qtool.quantize.transforms.site_transform import Parts

BLOCKS = (64, 32, 16)


def block_for(width: int, widest: int | None = None) -> int:
    """The widest of BLOCKS that divides a width, no wider than `widest`.

    Raises:
        InputRefused: when none does.
    """
    for block in BLOCKS:
        if width % block == 0 and block <= (widest or block):
            return block
    remedy = "leave these layers out with --ignore, or use no transform"
    raise InputRefused(f"width {width}", "does not divide by 16", remedy)


@dataclass(frozen=True, kw_only=True)
class BlockHadamard:
    """See the module. `signs` is ±1 float32 [K]; `block` divides K and has a Hadamard matrix."""

    signs: Tensor
    block: int
    kind: ClassVar[str] = "block_hadamard"

    @staticmethod
    def random(width: int, *, seed: int, stream: str, block: int | None = None) -> BlockHadamard:
        """Random signs and the widest block that fits, or `block`; `hadamard_plan(width).block` is the whole rotation.

        Args:
            width: K.
            seed: the user's seed.
            stream: the site's name, so that sites with one seed differ.
            block: channels that are mixed with each other.
        """
        signs = random_signs(width, seed=seed, stream=stream).to(torch.float32)
        return BlockHadamard(signs=signs, block=block or block_for(width))

    @property
    def main_width(self) -> int:
        return len(self.signs)

    @property
    def side_width(self) -> int:
        return 0

    def rotate(self, rows: Tensor) -> Tensor:
        """rows [..., K] × R, in the dtype of the rows."""
        return apply(rows, hadamard_plan(len(self.signs), block=self.block), self.signs)

    @property
    def online_products(self) -> int:
        return len(self.signs) * self.block

    @property
    def online_nodes(self) -> int:
        return 4  # signs, two reshapes, the product

    def input(self, x: Tensor) -> Parts:
        return self.rotate(x), None

    def weight(self, weight: Tensor) -> Parts:
        return computed_in_float64(weight, self.rotate), None

    def second_moment(self, hessian: Tensor, *, inplace: bool = False) -> Tensor:
        return turn_both_sides(hessian if inplace else hessian.clone(), self.rotate)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs.to(torch.int8)}

    def header(self) -> dict[str, Any]:
        return {"kind": self.kind, "block": self.block}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(signs=tensors["signs"].to(torch.float32), block=int(header["block"]))
