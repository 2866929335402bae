"""Grids for weights: which scale and zero point each group gets, and the codes on that grid.

Integer codes are unsigned and value = scale × (code − zero). A symmetric INT4 weight uses the whole range −8…7
(codes 0…15 around 8), symmetric INT8 uses −127…127 (codes 1…255 around 128); an asymmetric range always contains
zero, so that zero stays exact. FP8 E4M3 has one scale per channel, max|w| / 448.

The clip search works in units of the unclipped scale, so that it neither overflows nor underflows for any finite
weight, and walks the rows in chunks that stay in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.kernels.dequantize_weight import dequantize_weight
from qtool.quantize.artifacts.formats import NumericFormat
from qtool.quantize.artifacts.granularity import PerGroup, group_size_of
from qtool.quantize.artifacts.scheme import TensorScheme

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # subnormal scales are flushed to zero by some kernels
SMALLEST_NORMAL_HALF = torch.finfo(torch.float16).tiny
SHRINK_FACTORS = tuple(1 - 0.02 * step for step in range(26))  # 1.00 … 0.50 of the unclipped scale
REFITS = 2
CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The quantization grid of one weight.

    Attributes:
        scale: [N, G] float32, finite and positive; of groups, float16 values where float16 has them as normal numbers.
        zero_point: [N, G] uint8 for asymmetric integer weights, else None.
    """

    scale: Tensor
    zero_point: Tensor | None


def choose_grid(weight: Tensor, scheme: TensorScheme, *, mse_clip: bool, importance: Tensor | None = None) -> Grid:
    """The grid of a weight, group by group.

    Args:
        weight: [N, K] float32, finite. K need not divide by the group size; the last group is then short.
        scheme: format, granularity, symmetry.
        mse_clip: search the scale that minimises each group's squared error; otherwise nothing is clipped.
        importance: [K], non-negative; weights the squared error per column. None counts all columns alike.

    Returns:
        scale and zero_point [N, G]. A group of zeros gets scale 1.
    """
    group = group_size_of(scheme.granularity) or weight.shape[1]
    weights = None if importance is None else _groups(importance.to(torch.float32).unsqueeze(0), group)
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    scales, zeros = [], []
    for chunk in torch.split(weight, rows):
        groups = _groups(chunk, group)
        scale, zero = _unclipped(groups, scheme)
        if mse_clip and scheme.format.kind == "int":
            scale = _shrink(groups, scale, zero, scheme, weights)
        scale = scale.clamp_min(SMALLEST_SCALE).squeeze(-1)
        scales.append(_in_16_bits(scale) if isinstance(scheme.granularity, PerGroup) else scale)
        zeros.append(zero.squeeze(-1))
    zero_point = None if scheme.symmetric else torch.cat(zeros).to(torch.uint8)
    return Grid(scale=torch.cat(scales), zero_point=zero_point)


def encode(weight: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Codes [N, K] of a weight [N, K] on a grid: round half to even, saturating.

    uint8 for integer formats, float8_e4m3fn for FP8.
    """
    group = group_size_of(scheme.granularity) or weight.shape[1]
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme.format))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        groups = _groups(weight[part], group)
        zero = zero_of(scheme) if grid.zero_point is None else grid.zero_point[part].to(torch.float32).unsqueeze(-1)
        found = to_codes(groups / grid.scale[part].unsqueeze(-1), zero, scheme)
        codes[part] = found.flatten(1)[:, : weight.shape[1]].to(codes.dtype)
    return codes


def decode(codes: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """The weight [N, K] float32 that codes on a grid stand for."""
    return dequantize_weight(
        codes,
        grid.scale,
        grid.zero_point,
        group_size=group_size_of(scheme.granularity),
        zero_code=int(zero_of(scheme)),
    )


def to_codes(ratio: Tensor, zero: Tensor | float, scheme: TensorScheme) -> Tensor:
    """Codes as float32 numbers for weight / scale; `zero` is added before saturating (0 for float formats)."""
    fmt = scheme.format
    if fmt.kind == "float":
        return ratio.clamp(-fmt.qmax, fmt.qmax).to(torch.float8_e4m3fn).to(torch.float32)
    return ratio.round().add_(zero).clamp_(_lowest_code(scheme), fmt.max_code)


def zero_of(scheme: TensorScheme) -> float:
    """The code of zero where no zero point is stored."""
    return float(scheme.format.zero_code) if scheme.format.kind == "int" else 0.0


def code_dtype(fmt: NumericFormat) -> torch.dtype:
    """The dtype codes are kept in."""
    return torch.uint8 if fmt.kind == "int" else torch.float8_e4m3fn


def _lowest_code(scheme: TensorScheme) -> int:
    narrow = scheme.symmetric and scheme.format.bits == 8
    return 1 if narrow else 0


def _groups(rows: Tensor, group: int) -> Tensor:
    short = -rows.shape[1] % group
    if short:
        rows = pad(rows, (0, short))
    return rows.reshape(rows.shape[0], -1, group)


def _unclipped(groups: Tensor, scheme: TensorScheme) -> tuple[Tensor, Tensor]:
    """The smallest scale that clips nothing, and the code of zero, both [n, G, 1]."""
    fmt = scheme.format
    high = groups.amax(dim=-1, keepdim=True).clamp_min(0)
    low = groups.amin(dim=-1, keepdim=True).clamp_max(0)
    zero = torch.full_like(high, zero_of(scheme))
    if not scheme.symmetric:
        scale = _positive(high / fmt.max_code - low / fmt.max_code)
        return scale, (-low / scale).round_().clamp_(0, fmt.max_code)
    below = fmt.zero_code - _lowest_code(scheme) if fmt.kind == "int" else fmt.qmax
    return _positive(torch.maximum(high / fmt.qmax, -low / below)), zero


def _in_16_bits(scale: Tensor) -> Tensor:
    """Scales rounded to float16 where it holds them with its full precision: one for every group is a cost."""
    rounded = scale.to(torch.float16).to(torch.float32)
    return torch.where((rounded >= SMALLEST_NORMAL_HALF) & rounded.isfinite(), rounded, scale)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.clamp_min(SMALLEST_SCALE), torch.ones_like(scale))


def _shrink(
    groups: Tensor, scale: Tensor, zero: Tensor, scheme: TensorScheme, importance: Tensor | None
) -> Tensor:
    """The scale with the least (weighted) squared error among the shrunk ones and their least-squares refits."""
    ratio = groups / scale
    low, high = _lowest_code(scheme) - zero, scheme.format.max_code - zero

    def rounded(factor: Tensor | float) -> Tensor:
        return torch.maximum(torch.minimum((ratio / factor).round_(), high), low)

    def error(codes: Tensor, factor: Tensor | float) -> Tensor:
        square = (codes * factor).sub_(ratio).square_()
        return (square if importance is None else square.mul_(importance)).sum(dim=-1, keepdim=True)

    best = torch.ones_like(scale)
    least = error(rounded(1.0), 1.0)
    for factor in SHRINK_FACTORS[1:]:
        found = error(rounded(factor), factor)
        better = found < least
        best = torch.where(better, torch.full_like(best, factor), best)
        least = torch.where(better, found, least)
    for _ in range(REFITS):
        codes = rounded(best)
        weighted = codes if importance is None else codes * importance
        square = (weighted * codes).sum(dim=-1, keepdim=True)
        refit = (weighted * ratio).sum(dim=-1, keepdim=True) / torch.where(square > 0, square, torch.ones_like(square))
        usable = (square > 0) & (refit > 0)
        refit = torch.where(usable, refit, best)
        found = error(rounded(refit), refit)
        better = found < least
        best, least = torch.where(better, refit, best), torch.where(better, found, least)
    return scale * best
