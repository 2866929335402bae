"""Group scales as small integers times one float a row (QServe's second level), for which a product stays int32."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 16  # (code − 8) × 16 = −128…112 just fits int8


def second_level_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest scales of this form: scale[n, g] ≈ w_scale[n] × integer[n, g].

    A group below 1 / 32 of its row's largest scale is rounded up to 1 / 16 of it, so this changes weights: a quantizer
    has to choose its codes under the returned scales.

    Args:
        scale: float [N, G], not negative.

    Returns:
        w_scale float32 [N] and uint8 [N, G] in 1…16. What is not finite goes into w_scale.
    """
    wide = scale.to(torch.float32)
    unit = wide.amax(dim=1) / LARGEST
    integers = torch.round(wide / unit[:, None]).nan_to_num(1.0).clamp(1, LARGEST)
    return unit, integers.to(torch.uint8)
