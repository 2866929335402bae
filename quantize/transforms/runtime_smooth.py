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
        clip: a token's range is this share of its largest smoothed value.
    """

    group_size: int
    rule: RangeRule = PUBLISHED
    order: Tensor | None = None
    sort_live: bool = False
    clip: float = 1.0

    def quantize(self, x: Tensor) -> SmoothedCodes:
        """x [..., T, K] to codes; each [T, K] is one request."""
        ranges = channel_ranges(x, self.rule)
        order = sorted_channels(ranges) if self.sort_live else self.order
        return quantize_smoothed(x, smooth_factors(ranges, self.group_size, order), order=order, clip=self.clip)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """What the product really multiplies, [..., T, K]."""
        return smoothed_values(self.quantize(x))


def smooth_request(x: Tensor, group_size: int, rule: RangeRule, *, clip: float = 1.0) -> Tensor:
    """x [B, T, K] as the INT4 product of a smoothed layer sees it; each [T, K] is one request, and its channels stay in
    their order. At T = 1 it is INT4 per token and block, whatever the rule.

    Raises:
        InputRefused: for rows that may be of several requests, and a width that does not divide.
    """
    if x.dim() < 3 and x.shape[0] > 1:
        why = "reads rows of several requests at once, so none has factors of its own"
        raise InputRefused("a linear with runtime_smooth", why, "use runtime_smooth: frozen for it")
    _require_tiles(x.shape[-1], group_size)
    return RuntimeSmooth(group_size=group_size, rule=rule, clip=clip).fake_quantize(x)


def _require_tiles(width: int, group_size: int) -> None:
    if width % group_size:
        raise InputRefused(f"width {width}", f"does not divide by {group_size}", "choose another group size")


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
    _require_tiles(x.shape[-1], group_size)
    if not bool(torch.isfinite(x).all()):
        raise InputRefused("calibration inputs", "are not finite", "check the model's weights")
    tokens = x.reshape(-1, x.shape[-1])
    order = sorted_channels(channel_ranges(tokens, rule)) if sort else None
    return FrozenSmooth(factors=frozen_factors(tile_maxima(tokens, group_size, order), rule), order=order)


def frozen_factors(maxima: Tensor, rule: RangeRule = FROZEN) -> Tensor:
    """One factor for every tile, from the largest |x| of each token in each tile: [tokens, G] to [G]."""
    factors = smooth_factors(channel_ranges(maxima, rule), 1)
    # A tile that calibration never excited must not divide by almost nothing.
    floor = factors.max() * 2.0**-10
    return factors.clamp_min(float(floor)) if floor > 2.0**-90 else factors * 0 + 1
