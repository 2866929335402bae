"""Grids for weights: which scale and zero point each group gets, and the codes on that grid.

Integer codes are unsigned and value = scale × (code − zero). A symmetric INT4 weight uses the whole range −8…7
(codes 0…15 around 8), symmetric INT8 uses −127…127 (codes 1…255 around 128); an asymmetric range always contains
zero, so that zero stays exact. FP8 E4M3 has one scale per channel, max|w| / 448. FP4 E2M1 reaches ±6. Where scales are
small floats themselves (scale_formats.py), the search is among those, so that none is rounded afterwards.

The search walks the rows in chunks that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.kernels.dequantize_weight import dequantize_weight
from qtool.kernels.small_floats import E4M3_MAX, cast_e4m3, e2m1_codes, round_e2m1
from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, NumericFormat
from qtool.quantize.artifacts.granularity import PerGroup, group_size_of
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.quantize.quantizers.scale_formats import SCALE_FORMATS
from qtool.quantize.quantizers.scale_search import ScaleSearch

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # subnormal scales are flushed to zero by some kernels
SMALLEST_NORMAL_HALF = torch.finfo(torch.float16).tiny
SHRINK_FACTORS = tuple(1 - 0.02 * step for step in range(1, 26))  # 0.98 … 0.50 of the unclipped scale
# FP4's codes are not evenly spaced, so that a larger scale can fit better too.
FP4_FACTORS = tuple(0.5 + 0.04 * step for step in range(26))
SMALLEST_FACTOR = 2.0**-100  # so that no scale below a factor is subnormal
CHUNK_ELEMENTS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The quantization grid of one weight.

    Attributes:
        scale: [N, G] float32, finite and positive; of groups, float16 values where float16 has them as normal numbers.
        zero_point: [N, G] uint8 for asymmetric integer weights, else None.
        factor: [N, 1] float32, what the scales are multiples of where their format has a factor, else None.
    """

    scale: Tensor
    zero_point: Tensor | None
    factor: Tensor | None = None

    def rows(self, start: int, stop: int) -> Grid:
        """The grid of output channels start…stop − 1."""
        zero, factor = self.zero_point, self.factor
        return Grid(
            scale=self.scale[start:stop],
            zero_point=None if zero is None else zero[start:stop],
            factor=None if factor is None else factor[start:stop],
        )


def choose_grid(
    weight: Tensor,
    scheme: TensorScheme,
    *,
    mse_clip: bool,
    importance: Tensor | None = None,
    factor: Tensor | None = None,
) -> Grid:
    """The grid of a weight, group by group.

    Args:
        weight: [N, K] float32, finite. K need not divide by the group size; the last group is then short.
        scheme: format, granularity, symmetry.
        mse_clip: search the scale that minimises each group's squared error; otherwise nothing is clipped.
        importance: [K], non-negative; weights the squared error per column. None counts all columns alike.
        factor: of the rows [N, 1] where these columns are not the whole weight; None takes `scale_factor`.

    Returns:
        scale and zero_point [N, G]. A group of zeros gets scale 1, or the nearest that its format has.
    """
    if factor is None:
        factor = scale_factor(weight, scheme, mse_clip=mse_clip, importance=importance)
    group = group_size_of(scheme.granularity) or weight.shape[1]
    weights = None if importance is None else in_groups(importance.to(torch.float32).unsqueeze(0), group)
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    search = mse_clip and scheme.format is not FP8_E4M3
    scales, zeros = [], []
    for start in range(0, weight.shape[0], rows):
        groups = in_groups(weight[start : start + rows], group)
        unit, zero = _unclipped(groups, scheme)
        if scheme.scale != "float":
            row = groups.new_ones(()) if factor is None else factor[start : start + rows].unsqueeze(-1)
            scale = _nearest_or_best(groups, unit, row, scheme, weights, search=search)
            zero = _zero_point(groups, scale, scheme)
        elif search:
            found = ScaleSearch(groups, unit, _rounding(scheme, zero), weights)
            scale = found.best_factor(FP4_FACTORS if scheme.format is FP4_E2M1 else SHRINK_FACTORS)
        else:
            scale = unit
        scale = scale.clamp_min(SMALLEST_SCALE).squeeze(-1)
        scales.append(as_stored(scale, scheme))
        zeros.append(zero.squeeze(-1))
    zero_point = None if scheme.symmetric else torch.cat(zeros).to(torch.uint8)
    return Grid(scale=torch.cat(scales), zero_point=zero_point, factor=factor)


def scale_factor(
    weight: Tensor, scheme: TensorScheme, *, mse_clip: bool, importance: Tensor | None = None
) -> Tensor | None:
    """What a whole weight's scales are multiples of, [N, 1] float32, where their format has such a number.

    "e4m3": max|w| / (448 × qmax), one for all rows. "shift" and "integer": a row's factor that clips nothing, or with
    `mse_clip` the multiple of it whose best scales have the least (weighted) squared error. With zero points a smaller
    factor would leave INT8's range, so that none is tried.
    """
    if scheme.scale == "e4m3":
        step = weight.abs().amax() / (E4M3_MAX * scheme.format.qmax)
        return (step.clamp_min(SMALLEST_FACTOR) if step > 0 else torch.ones(())).expand(weight.shape[0], 1)
    if scheme.scale == "float" or SCALE_FORMATS[scheme.scale].factor is None:
        return None
    group = group_size_of(scheme.granularity) or weight.shape[1]
    weights = None if importance is None else in_groups(importance.to(torch.float32).unsqueeze(0), group)
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    return torch.cat([_row_factor(in_groups(c, group), scheme, weights, mse_clip) for c in torch.split(weight, rows)])


def _row_factor(groups: Tensor, scheme: TensorScheme, importance: Tensor | None, mse_clip: bool) -> Tensor:
    form = SCALE_FORMATS[scheme.scale]
    assert form.factor is not None
    unit, _ = _unclipped(groups, scheme)
    largest = _positive(form.factor(groups, unit, scheme.symmetric)).clamp_min(SMALLEST_FACTOR)
    if not mse_clip or not scheme.symmetric:
        return form.rounded(largest).squeeze(-1)
    search = ScaleSearch(groups, unit, _moving_rounding(scheme), importance)
    best, least = largest, torch.full_like(largest, torch.inf)
    for multiple in form.multiples:
        factor = form.rounded(largest * multiple)
        error = search.best_of(form.near(unit, factor, form.steps))[1]
        found = (error.sqrt() * (unit / largest)).square().sum(dim=1, keepdim=True)
        better = found < least
        best, least = torch.where(better, factor, best), torch.where(better, found, least)
    return best.squeeze(-1)


def _nearest_or_best(
    groups: Tensor, unit: Tensor, factor: Tensor, scheme: TensorScheme, importance: Tensor | None, *, search: bool
) -> Tensor:
    form = SCALE_FORMATS[scheme.scale]
    if not search:
        return form.near(unit, factor, form.steps[:1])[0]
    search_in = ScaleSearch(groups, unit, _moving_rounding(scheme), importance)
    return search_in.best_of(form.near(unit, factor, form.steps))[0]


def encode(weight: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """Codes [N, K] of a weight [N, K] on a grid: round half to even, saturating. See `stored_codes`."""
    group = group_size_of(scheme.granularity) or weight.shape[1]
    rows = max(1, CHUNK_ELEMENTS // max(weight.shape[1], 1))
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme.format))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        groups = in_groups(weight[part], group)
        zero = zero_of(scheme) if grid.zero_point is None else grid.zero_point[part].to(torch.float32).unsqueeze(-1)
        found = to_codes(groups / grid.scale[part].unsqueeze(-1), zero, scheme)
        codes[part] = stored_codes(found.flatten(1)[:, : weight.shape[1]], scheme.format)
    return codes


def decode(codes: Tensor, grid: Grid, scheme: TensorScheme) -> Tensor:
    """The weight [N, K] float32 that codes on a grid stand for."""
    return dequantize_weight(
        codes,
        grid.scale,
        grid.zero_point,
        group_size=group_size_of(scheme.granularity),
        zero_code=int(zero_of(scheme)),
        e2m1=scheme.format is FP4_E2M1,
    )


def to_codes(ratio: Tensor, zero: Tensor | float, scheme: TensorScheme) -> Tensor:
    """What codes stand for, as float32 numbers, for weight / scale: whole numbers, or small floats. `zero` is added to
    whole numbers before saturating."""
    fmt = scheme.format
    if fmt.kind == "float":
        return round_e2m1(ratio) if fmt is FP4_E2M1 else cast_e4m3(ratio)
    return ratio.round().add_(zero).clamp_(lowest_code(scheme), fmt.max_code)


def zero_of(scheme: TensorScheme) -> float:
    """The code of zero where no zero point is stored."""
    return float(scheme.format.zero_code) if scheme.format.kind == "int" else 0.0


def code_dtype(fmt: NumericFormat) -> torch.dtype:
    """The dtype codes are kept in."""
    return torch.float8_e4m3fn if fmt is FP8_E4M3 else torch.uint8


def stored_codes(values: Tensor, fmt: NumericFormat) -> Tensor:
    """The codes of what `to_codes` found: uint8 for integers and (bit patterns) FP4, float8_e4m3fn for FP8."""
    return e2m1_codes(values) if fmt is FP4_E2M1 else values.to(code_dtype(fmt))


def lowest_code(scheme: TensorScheme) -> int:
    """The first code in use of an integer format: 1 of symmetric INT8, else 0."""
    narrow = scheme.symmetric and scheme.format.bits == 8
    return 1 if narrow else 0


def in_groups(rows: Tensor, group: int) -> Tensor:
    """Rows [n, K] to [n, G, group], a short last group filled up with zeros."""
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
        return scale, _zero_point(groups, scale, scheme)
    below = fmt.zero_code - lowest_code(scheme) if fmt.kind == "int" else fmt.qmax
    return _positive(torch.maximum(high / fmt.qmax, -low / below)), zero


def _zero_point(groups: Tensor, scale: Tensor | float, scheme: TensorScheme) -> Tensor:
    """The code of zero [n, G, 1] under a scale: such that the smallest weight gets the first code."""
    low = groups.amin(dim=-1, keepdim=True).clamp_max(0)
    if scheme.symmetric:
        return torch.full_like(low, zero_of(scheme))
    return (-low / scale).round_().clamp_(0, scheme.format.max_code)


def as_stored(scale: Tensor, scheme: TensorScheme) -> Tensor:
    """Scales of any shape as a checkpoint holds them: plain ones of groups are rounded to float16 where it holds them
    with its full precision, because one for every group is a cost."""
    if scheme.scale != "float" or not isinstance(scheme.granularity, PerGroup):
        return scale
    rounded = scale.to(torch.float16).to(torch.float32)
    return torch.where((rounded >= SMALLEST_NORMAL_HALF) & rounded.isfinite(), rounded, scale)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale.clamp_min(SMALLEST_SCALE), torch.ones_like(scale))


def _rounding(scheme: TensorScheme, zero: Tensor) -> Callable[[Tensor], Tensor]:
    """Weights in units of a scale to what their codes stand for."""
    if scheme.format.kind == "float":
        return lambda ratio: to_codes(ratio, 0.0, scheme)
    low, high = lowest_code(scheme) - zero, scheme.format.max_code - zero
    return lambda ratio: torch.maximum(torch.minimum(ratio.round_(), high), low)


def _moving_rounding(scheme: TensorScheme) -> Callable[[Tensor], Tensor]:
    """The same where the zero point moves with the scale."""
    return lambda ratio: _rounding(scheme, _zero_point(ratio, 1.0, scheme))(ratio)
