"""What the linears of one input read: made once, multiplied by each of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An input's rows, behind its transform. M rows, K columns of the main part.

    Attributes:
        values: the main part in float [M, K], None where no linear reads it.
        codes: what a low-bit product multiplies: int8 or E4M3 [M, K], or bytes of two 4-bit codes; None in float.
        scale: of the codes: float32 [M], [1] for a stored scale, or [M, G].
        sums: the codes' sums, int32 [M], None where no linear reads them.
        factors: Runtime Smooth's, float32 [M, G].
        group: columns of one of the G scales or factors, 0 without.
        columns: K.
        side: the side part [M, r] in float16.
    """

    values: Tensor | None
    columns: int
    codes: Tensor | None = None
    scale: Tensor | None = None
    sums: Tensor | None = None
    factors: Tensor | None = None
    group: int = 0
    side: Tensor | None = None
