"""Runtime Smooth as an input quantizer: the online half of RRS, with factors found per request or frozen.

Sits behind a rotation, in place of an INT4 per token quantizer; changes no weight, except that sorted channels ask for
the weight's columns in the same order. `kernels/runtime_smooth` has the arithmetic and the one-token rule.

The published form takes each channel's maximum over the request's tokens. One massive token then sets all maxima, and
the factors are those of a token unlike any other. The robust rules look past it; the best of them levels the tokens
first, because a token's own scale takes up its size, and needs no threshold. With frozen factors a token's codes
depend on that token alone, and the factors can be multiplied into a weight's group scales (`as_division`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.runtime_smooth import (
    RangeRule,
    SmoothedCodes,
    channel_ranges,
    quantize_smoothed,
    smooth_factors,
    smoothed_values,
    sorted_channels,
    tile_maxima,
)
from qtool.quantize.transforms.divide_channels import DivideChannels

PUBLISHED = RangeRule()
ROBUST = RangeRule(level=True)
WITHOUT_MASSIVE = RangeRule(massive_ratio=2.0)
FROZEN = RangeRule(level=True, quantile=0.9)


@dataclass(frozen=True, kw_only=True)
class RuntimeSmooth:
    """Factors from the request itself.

    Attributes:
        group_size: channels per K tile.
        rule: how a channel's range is taken.
        order: frozen channel order int64 [K], or None.
        sort_live: sort by the request's own ranges (a gather of the weight per request); excludes `order`.
    """

    group_size: int
    rule: RangeRule = PUBLISHED
    order: Tensor | None = None
    sort_live: bool = False

    def quantize(self, x: Tensor) -> SmoothedCodes:
        """x [..., T, K] to codes; each [T, K] is one request."""
        ranges = channel_ranges(x, self.rule)
        order = sorted_channels(ranges) if self.sort_live else self.order
        return quantize_smoothed(x, smooth_factors(ranges, self.group_size, order), order=order)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the product really multiplies, [..., T, K]."""
        return smoothed_values(self.quantize(x))


@dataclass(frozen=True, kw_only=True)
class FrozenSmooth:
    """Factors from statistics: the same function of a token in prefill and decode, in any batch.

    Attributes:
        factors: s_G [G] float32, finite and positive.
        order: channel order int64 [K], or None.
    """

    factors: Tensor
    order: Tensor | None = None

    def quantize(self, x: Tensor) -> SmoothedCodes:
        """x [..., T, K] to codes."""
        return quantize_smoothed(x, self.factors, order=self.order)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the product really multiplies, [..., T, K]."""
        return smoothed_values(self.quantize(x))

    def as_division(self, width: int) -> DivideChannels:
        """The same as a division of channels in front of a plain INT4 per token quantizer (equal up to rounding)."""
        tiled = self.factors.repeat_interleave(width // len(self.factors))
        if self.order is None:
            return DivideChannels(factors=tiled)
        return DivideChannels(factors=torch.empty_like(tiled).scatter_(0, self.order, tiled))


def frozen_smooth(x: Tensor, group_size: int, rule: RangeRule = FROZEN, *, sort: bool = False) -> FrozenSmooth:
    """Calibrated factors: the rule's ranges of whole tiles, over all calibration tokens together.

    Args:
        x: calibration inputs [..., K].
        group_size: channels per K tile.
        rule: how a tile's range is taken over the tokens.
        sort: put channels of like range into one tile.

    Raises:
        InputRefused: when the width does not divide, or an input is not finite.
    """
    if x.shape[-1] % group_size:
        raise InputRefused(f"width {x.shape[-1]}", f"does not divide by {group_size}", "choose another group size")
    if not bool(torch.isfinite(x).all()):
        raise InputRefused("calibration inputs", "are not finite", "check the model's weights")
    tokens = x.reshape(-1, x.shape[-1])
    order = sorted_channels(channel_ranges(tokens, rule)) if sort else None
    factors = smooth_factors(channel_ranges(tile_maxima(tokens, group_size, order), rule), 1)
    # A tile that calibration never excited must not divide by almost nothing.
    floor = factors.max() * 2.0**-10
    return FrozenSmooth(factors=factors.clamp_min(float(floor)) if floor > 2.0**-90 else factors * 0 + 1, order=order)
