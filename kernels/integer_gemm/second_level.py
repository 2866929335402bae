"""Group scales as small integers times one float a row (QServe's second level), for which a product stays int32."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 16  # (code − 8) × 16 = −128…112 just fits int8


def second_level_scales(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """float32 scales [N, G] as w_scale float32 [N] times integers 1…16, uint8 [N, G]; None unless that is exact."""
    unit = scale.amin(dim=1)
    integers = torch.round(scale / unit[:, None])
    if float(integers.max()) > LARGEST or not torch.equal(integers * unit[:, None], scale):
        return None
    return unit, integers.to(torch.uint8)
