"""A site transform with a division of channels behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.site_transform import Parts, SiteTransform


@dataclass(frozen=True, kw_only=True)
class ThenDivide:
    """A transform, then a division of its main part's channels (Runtime Smooth with calibrated factors behind a
    rotation); `division` has the first's main width."""

    first: SiteTransform
    division: DivideChannels
    kind: ClassVar[str] = "then_divide"

    @property
    def main_width(self) -> int:
        return self.division.main_width

    @property
    def side_width(self) -> int:
        return self.first.side_width

    @property
    def online_products(self) -> int:
        return self.first.online_products + self.division.online_products

    @property
    def online_nodes(self) -> int:
        return self.first.online_nodes + self.division.online_nodes

    def input(self, x: Tensor) -> Parts:
        main, side = self.first.input(x)
        return self.division.input(main)[0], side

    def weight(self, weight: Tensor) -> Parts:
        main, side = self.first.weight(weight)
        return self.division.weight(main)[0], side

    def second_moment(self, hessian: Tensor, *, inplace: bool = False) -> Tensor:
        return self.division.second_moment(self.first.second_moment(hessian, inplace=inplace), inplace=True)

    def to_tensors(self) -> dict[str, Tensor]:
        return {**self.first.to_tensors(), **self.division.to_tensors()}

    def header(self) -> dict[str, Any]:
        return {"kind": self.kind, "first": self.first.header()}

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ThenDivide:
        from qtool.quantize.transforms.table import site_transform_from  # the table has this class in it

        return cls(
            first=site_transform_from(header["first"], tensors),
            division=DivideChannels.from_tensors(header, tensors),
        )
