"""Division of a site's input by one factor per channel, the factors multiplied into the weights that read it.

This is smoothing where no producer can take the factors in. With one factor per tile of the weight's groups it is
Runtime Smooth with calibrated factors: symmetric grouped codes do not change at all, only their scales grow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from qtool.quantize.transforms.in_rows import computed_in_float64
from qtool.quantize.transforms.site_transform import Parts


@dataclass(frozen=True, kw_only=True)
class DivideChannels:
    """x / factors; `factors` is float32 [K], finite and positive."""

    factors: Tensor
    kind: ClassVar[str] = "divide_channels"

    @property
    def main_width(self) -> int:
        return len(self.factors)

    @property
    def side_width(self) -> int:
        return 0

    @property
    def online_products(self) -> int:
        return len(self.factors)

    @property
    def online_nodes(self) -> int:
        return 1

    def input(self, x: Tensor) -> Parts:
        return x / self.factors, None

    def weight(self, weight: Tensor) -> Parts:
        factors = self.factors.double()
        return computed_in_float64(weight, lambda rows: rows * factors), None

    def second_moment(self, hessian: Tensor, *, inplace: bool = False) -> Tensor:
        factors = self.factors.double()
        return (hessian if inplace else hessian.clone()).div_(factors).div_(factors.unsqueeze(-1))

    def to_tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors}

    def header(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(factors=tensors["factors"])
