"""Runtime Smooth's factors, frozen: found in calibration, behind the site's transform, from quantized predecessors."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.runtime_smooth import tile_maxima
from qtool.quantize.quantizers.calibration import Inputs
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.runtime_smooth import FrozenSmooth, frozen_factors
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide


def then_smooth(transform: SiteTransform | None, width: int, group_size: int, inputs: Inputs) -> SiteTransform:
    """A site's transform with the division by frozen factors behind it.

    Args:
        transform: what is done to the input first; None for nothing.
        width: K' of what that leaves.
        group_size: channels per tile, which is the weight's group.
        inputs: hands the site's input [b, T, K] to a function, batch by batch.

    Raises:
        InputRefused: a width that the group size does not divide; an input that is not finite.
    """
    if width % group_size:
        raise InputRefused(f"width {width}", f"does not divide by {group_size}", "choose another group size")
    maxima: list[Tensor] = []

    def add(x: Tensor) -> None:
        main = x if transform is None else transform.input(x)[0]
        maxima.append(tile_maxima(main, group_size).flatten(0, -2))

    inputs(add)
    found = torch.cat(maxima)
    if not bool(torch.isfinite(found).all()):
        raise InputRefused("an input with runtime_smooth", "is not finite on this text", "check the model's weights")
    division: DivideChannels = FrozenSmooth(factors=frozen_factors(found)).as_division(width)
    return division if transform is None else ThenDivide(first=transform, division=division)
