"""Group scales as small integers times one float a row (QServe's second level), for which a product stays int32."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 16  # (code − 8) × 16 = −128…112 just fits int8


def second_level_scales(scale: Tensor, unit: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """float32 scales [N, G] as w_scale float32 [N] times integers 1…16, uint8 [N, G]; None unless that is exact.

    Args:
        scale: of the groups.
        unit: [N, 1] what the scales are multiples of; None takes each row's smallest scale.
    """
    unit = scale.amin(dim=1, keepdim=True) if unit is None else unit
    integers = torch.round(scale / unit)
    if float(integers.max()) > LARGEST or not torch.equal(integers * unit, scale):
        return None
    return unit[:, 0].contiguous(), integers.to(torch.uint8)
