"""Runtime Smooth in plain torch. Shapes: x [..., T, K]; G = K / group tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.quantize_activation import INT4_MAX

SMALLEST_FACTOR = 2.0**-100  # the factor of a tile of zeros: the published 1e-5 would crush quiet tiles


@dataclass(frozen=True, kw_only=True)
class RangeRule:
    """How a channel's range is taken over the tokens of a request.

    Attributes:
        quantile: 1.0 is the maximum (published); q < 1 the smallest value that at least q × T tokens do not exceed.
        massive_ratio: a token whose largest |x| exceeds this multiple of the median token's largest |x| is left out;
            None leaves no token out. The median token itself always stays, so at one token nothing is left out.
        level: divide each token by its own root mean square first: a_t takes up a token's size anyway, so that factors
            need only follow its shape. A single token is not levelled, which keeps the one-token rule to the bit.
    """

    quantile: float = 1.0
    massive_ratio: float | None = None
    level: bool = False


PUBLISHED = RangeRule()


def channel_ranges(x: Tensor, rule: RangeRule = PUBLISHED) -> Tensor:
    """The range of each channel over its own request's tokens: [..., T, K] to [..., K]. T ≥ 1."""
    size = x.abs()
    if rule.massive_ratio is not None:
        largest = size.amax(dim=-1, keepdim=True)
        median = largest.median(dim=-2, keepdim=True).values
        # Zero never raises a range; the quantile below counts these tokens as quiet ones.
        size = torch.where(largest > rule.massive_ratio * median, torch.zeros_like(size), size)
    if rule.level and x.shape[-2] > 1:
        size = size * _levelling(size)
    if rule.quantile >= 1:
        return size.amax(dim=-2)
    rank = max(1, -int(-rule.quantile * x.shape[-2] // 1))
    return size.kthvalue(rank, dim=-2).values


def _levelling(size: Tensor) -> Tensor:
    """1 / RMS of each token, 1 for a token of zeros or one that is not finite."""
    mean_square = size.square().mean(dim=-1, keepdim=True)
    usable = (mean_square > 0) & mean_square.isfinite()
    return torch.where(usable, mean_square, torch.ones_like(mean_square)).rsqrt()


def tile_maxima(x: Tensor, group_size: int, order: Tensor | None = None) -> Tensor:
    """The largest |x| of each token in each tile, [..., T, K] to [..., T, G]; order as in `smooth_factors`."""
    rows = None if order is None else order.unsqueeze(-2)
    return _tiles(_ordered(x, rows), group_size).abs().amax(dim=-1)


def sorted_channels(ranges: Tensor) -> Tensor:
    """The channels by falling range, ties by index: [..., K] to int64 [..., K]."""
    return torch.sort(ranges, dim=-1, descending=True, stable=True).indices


def smooth_factors(ranges: Tensor, group_size: int, order: Tensor | None = None) -> Tensor:
    """s_G: the largest range in each tile of `group_size` channels, taken in `order`. [..., K] to [..., G].

    Args:
        ranges: [..., K]; K must divide by group_size. For ranges of tiles, `channel_ranges(tile_maxima(x))`, give
            group_size 1.
        group_size: channels per tile, the GEMM's K block.
        order: int64 [K] (frozen) or [..., K] (found from the same request), or None for the stored order.
    """
    tiles = _tiles(_ordered(ranges, order), group_size)
    return tiles.amax(dim=-1).clamp_min(SMALLEST_FACTOR)


@dataclass(frozen=True, kw_only=True)
class SmoothedCodes:
    """A smoothed, quantized input.

    Attributes:
        codes: [..., T, G, group] float32 holding integers −7…7, channels in `order`.
        token_range: a_t [..., T, 1], the token's range after smoothing.
        factors: s_G [..., G] or [G].
        order: the channel order of the codes, None for the stored one.
    """

    codes: Tensor
    token_range: Tensor
    factors: Tensor
    order: Tensor | None

    @property
    def step(self) -> Tensor:
        """What one code is worth, s_G × a_t / 7: [..., T, G]."""
        return self.factors.unsqueeze(-2) * self.token_range / INT4_MAX


def quantize_smoothed(
    x: Tensor, factors: Tensor, *, order: Tensor | None = None, clip: float = 1.0
) -> SmoothedCodes:
    """INT4 codes of x [..., T, K] under factors [G] or [..., G]; order as in `smooth_factors`.

    Args:
        x, factors, order: see above.
        clip: a token's range is this share of a_t; larger values take the outermost code.
    """
    group = x.shape[-1] // factors.shape[-1]
    rows = None if order is None else order.unsqueeze(-2)
    tiles = _tiles(_ordered(x, rows), group)
    relative = tiles.abs().amax(dim=-1) / factors.unsqueeze(-2)
    token_range = relative.amax(dim=-1, keepdim=True) * clip
    whole = factors.unsqueeze(-2) * token_range
    # A number over a tensor is torch's reciprocal times the number: two roundings.
    by = torch.full_like(whole, INT4_MAX) / whole
    # whole × 0 is zero for a row of zeros, and NaN for NaN.
    multiplier = torch.where(whole > SMALLEST_FACTOR, by, whole * 0)
    codes = torch.round(tiles * multiplier.unsqueeze(-1))
    codes = codes if clip == 1.0 else codes.clamp(-INT4_MAX, INT4_MAX)
    return SmoothedCodes(codes=codes, token_range=token_range, factors=factors, order=order)


def smoothed_values(smoothed: SmoothedCodes) -> Tensor:
    """What the codes stand for, in the stored channel order: [..., T, K] float32."""
    values = (smoothed.codes * smoothed.step.unsqueeze(-1)).flatten(-2)
    if smoothed.order is None:
        return values
    order = smoothed.order.unsqueeze(-2).expand(values.shape)
    return torch.empty_like(values).scatter_(-1, order, values)


def smoothed_gemm(smoothed: SmoothedCodes, weight: Tensor) -> Tensor:
    """y [..., T, N] by tiles: one integer-like partial product per tile, scaled by s_G × a_t / 7 and added in order.

    Args:
        smoothed: an input with one order for all requests.
        weight: [N, K] float32 in the stored order; its own scales may be multiplied in, or held back per channel.
    """
    columns = weight if smoothed.order is None else weight[:, smoothed.order]
    tiles = _tiles(columns, smoothed.codes.shape[-1])
    y = smoothed.codes.new_zeros(*smoothed.codes.shape[:-2], len(weight))
    for tile in range(tiles.shape[1]):
        partial = smoothed.codes[..., tile, :] @ tiles[:, tile].T
        y = y + partial * smoothed.step[..., tile : tile + 1]
    return y


def _tiles(x: Tensor, group_size: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, group_size)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.gather(-1, order.expand(x.shape))
