"""What is done, online, to a site's input before it is quantized, and offline to every weight that reads the site.

For any input x [..., K] and weight W [N, K]

    x Wᵀ = main(x) main(W)ᵀ + side(x) side(W)ᵀ

in exact arithmetic: `main` is what gets quantized, `side` an optional skinny product in 16 bits. A transform belongs to
a site, not to a linear: q, k and v share one, and its online half runs once for them.

Each kind is a frozen dataclass of tensors; `to_tensors` and `header` are what a checkpoint stores of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

Parts = tuple[Tensor, Tensor | None]


class SiteTransform(Protocol):
    """One site's transform. Tensors are float32 unless said otherwise."""

    kind: ClassVar[str]

    @property
    def main_width(self) -> int:
        """K': columns of the quantized product."""
        ...

    @property
    def side_width(self) -> int:
        """r: columns of the side product, 0 without one."""
        ...

    @property
    def online_products(self) -> int:
        """Multiply-accumulates per token of `input`."""
        ...

    @property
    def online_nodes(self) -> int:
        """Nodes of a package that compute `input` and the linears' side products, for all linears together."""
        ...

    def input(self, x: Tensor) -> Parts:
        """x [..., K] to main [..., K'] and side [..., r] or None."""
        ...

    def weight(self, weight: Tensor) -> Parts:
        """W [N, K] to main [N, K'] and side [N, r] or None; computed in float64."""
        ...

    def second_moment(self, hessian: Tensor, *, inplace: bool = False) -> Tensor:
        """Σ x xᵀ [K, K] float64 to the second moment of main(x), [K', K'] float64: MᵀHM with main(x) = x M.

        `inplace` puts it where `hessian` was, which at K = 8192 saves 537 MB.
        """
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors a checkpoint stores, by short name."""
        ...

    def header(self) -> dict[str, Any]:
        """What JSON stores beside the tensors, `kind` included."""
        ...

    @classmethod
    def from_tensors(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `header` and `to_tensors`; a missing name raises KeyError."""
        ...
