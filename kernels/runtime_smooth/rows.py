"""Smoothed INT4 codes of ragged requests, as a GEMM reads them: ranges, factors and codes in two or three kernels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.quantize_activation.reference import pack_halves
from qtool.kernels.quantize_activation.row_format import ROW_FORMATS
from qtool.kernels.runtime_smooth.integer_factors import IntegerFactors, integer_factors
from qtool.kernels.runtime_smooth.reference import (
    PUBLISHED,
    SMALLEST_FACTOR,
    RangeRule,
    channel_ranges,
    quantize_smoothed,
    smooth_factors,
)
from qtool.kernels.runtime_smooth.requests import Requests

OP = "runtime_smooth"
FORMS = ("int4", "int4_halves")


@dataclass(frozen=True, kw_only=True)
class SmoothedRows:
    """What a smoothed GEMM reads: y_mn = token_range_m / 7 × Σ_G factor_rG × (its int32 partial sum), r m's request.

    Attributes:
        codes: int8 [M, K], or uint8 [M, ⌈K / 128⌉ × 64] for halves.
        token_range: a_t float32 [M].
        factors: s_G float32 [R, G].
        request: int32 [M], the request of each row, an index into `factors`.
        integers: the factors as whole numbers times one base per request, or None.
    """

    codes: Tensor
    token_range: Tensor
    factors: Tensor
    request: Tensor
    integers: IntegerFactors | None


def smooth_rows(
    x: Tensor,
    group_size: int,
    rule: RangeRule = PUBLISHED,
    *,
    requests: Requests | None = None,
    form: str = "int4",
    clip: float = 1.0,
    largest_factor: int | None = None,
) -> SmoothedRows:
    """Codes of requests whose factors are found from the request alone.

    A request of one token has a_t = clip and, bit for bit, the codes of `quantize_int4(x, group_size)`; with integer
    factors it has not, as they are coarser than its tiles' ranges.

    Args:
        x: [M, K] float32, bfloat16 or float16; K divides by group_size.
        group_size: channels per tile, a power of two ≥ 16: the GEMM's K tile.
        rule: how a channel's range is taken. Quantiles and massive ratios have no kernel: their factors come from the
            reference.
        requests: which rows belong together; None takes all rows as one request.
        form: "int4" or "int4_halves".
        clip: a token's range is this share of a_t.
        largest_factor: make the factors whole numbers up to this one (`largest_integer_factor`) times a base.

    Raises:
        UsageError: for shapes that do not fit.
    """
    _check(x, group_size, form)
    requests = requests or Requests.one(len(x), x.device)
    if requests.longest == 1 and largest_factor is None and backend_for(x.device, OP) == "triton":
        return _single_tokens(x, group_size, requests, form, clip)
    factors = request_factors(x, group_size, rule, requests)
    integers = None if largest_factor is None else integer_factors(factors, largest_factor)
    used = factors if integers is None else integers.values()
    codes, token_range = smoothed_codes(x, used, requests.request, form=form, clip=clip)
    return SmoothedRows(
        codes=codes, token_range=token_range, factors=used, request=requests.request, integers=integers
    )


def _single_tokens(x: Tensor, group_size: int, requests: Requests, form: str, clip: float) -> SmoothedRows:
    """Every request is one row, whose tiles' ranges are its factors, whatever the rule: one kernel."""
    from qtool.kernels.runtime_smooth.launch import launch_codes

    shape = (len(requests.starts) - 1, x.shape[1] // group_size)
    factors = torch.full(shape, SMALLEST_FACTOR, dtype=torch.float32, device=x.device)
    codes, token_range = launch_codes(x, factors, requests.request, ROW_FORMATS[form], clip=clip, single=True)
    return SmoothedRows(
        codes=codes, token_range=token_range, factors=factors, request=requests.request, integers=None
    )


def request_factors(x: Tensor, group_size: int, rule: RangeRule, requests: Requests) -> Tensor:
    """s_G of each request: float32 [R, G]; a request without rows gets the smallest factor."""
    simple = rule.quantile >= 1 and rule.massive_ratio is None
    if simple and backend_for(x.device, OP) == "triton":
        from qtool.kernels.runtime_smooth.launch import launch_factors

        return launch_factors(x, group_size, rule.level, requests.starts, requests.longest)
    bounds = requests.starts.tolist()
    found = [
        smooth_factors(channel_ranges(x[begin:end].to(torch.float32), rule), group_size)
        if end > begin
        else smooth_factors(torch.zeros(x.shape[1], device=x.device), group_size)
        for begin, end in pairwise(bounds)
    ]
    return torch.stack(found)


def smoothed_codes(
    x: Tensor, factors: Tensor, request: Tensor, *, form: str = "int4", clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes of rows under given factors, found or frozen.

    Args:
        x: [M, K].
        factors: float32 [R, G], positive.
        request: int32 [M], each row's line of `factors`; all zeros for frozen ones.
        form, clip: as in `smooth_rows`.

    Returns:
        codes (int8 [M, K], or halves) and token_range float32 [M].
    """
    _check(x, x.shape[1] // factors.shape[1], form)
    if backend_for(x.device, OP) == "triton":
        from qtool.kernels.runtime_smooth.launch import launch_codes

        return launch_codes(x, factors, request, ROW_FORMATS[form], clip=clip)
    of_row = factors[request.to(torch.int64)]
    rows = quantize_smoothed(x.to(torch.float32).unsqueeze(-2), of_row, clip=clip)
    finite = torch.isfinite(rows.token_range.squeeze(-2))
    codes = rows.codes.flatten(1).where(finite, torch.zeros(())).to(torch.int8)
    return pack_halves(codes) if ROW_FORMATS[form].halves else codes, rows.token_range.flatten()


def _check(x: Tensor, group_size: int, form: str) -> None:
    faults = [
        (x.dim() != 2, f"x {tuple(x.shape)} is no matrix of rows"),
        (not x.is_floating_point(), f"x is {x.dtype}, not floating point"),
        (group_size < 16 or group_size & (group_size - 1) != 0, f"a tile of {group_size} is no power of two ≥ 16"),
        (form not in FORMS, f"format {form} is none of {', '.join(FORMS)}"),
    ]
    faults.append((not any(wrong for wrong, _ in faults) and bool(x.shape[1] % group_size), "K is no whole tiles"))
    for wrong, why in faults:
        if wrong:
            raise UsageError("smooth_rows", why, "see its docstring")
