"""The error of quantizing rows with scales found at run time: one per token, or one per token and block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qtool.kernels.quantize_activation import (
    fake_quantize_fp4,
    fake_quantize_fp8,
    fake_quantize_int4,
    fake_quantize_int8,
)
from qtool.quantize.artifacts.formats import NumericFormat
from qtool.quantize.artifacts.site_statistics import DYNAMIC_CANDIDATES

_ROUND_TRIP: Mapping[str, Callable[[Tensor, int | None], Tensor]] = {
    "int8": lambda rows, size: fake_quantize_int8(rows, group_size=size),
    "int4": lambda rows, size: fake_quantize_int4(rows, group_size=size),
    "fp8_e4m3": lambda rows, size: fake_quantize_fp8(rows, group_size=size),
    "fp4_e2m1": lambda rows, size: fake_quantize_fp4(rows, group_size=size),
}


def candidate_errors(rows: Tensor) -> Tensor:
    """Sums over rows [n, C] as SiteStatistics.errors has them: float64 [1 + candidates, 2]."""
    errors = [round_trip(rows, fmt, block).sub_(rows) for fmt, block in DYNAMIC_CANDIDATES]
    return torch.stack([_sums(values) for values in (rows, *errors)])


def round_trip(rows: Tensor, fmt: NumericFormat, block: int) -> Tensor:
    """Rows [n, C] quantized symmetrically and back, as the runtimes do it, scale = max|x| / qmax.

    Args:
        rows: float32.
        fmt: the format.
        block: values that share a scale; 0: the row. A last short block has a scale of its own.
    """
    return _ROUND_TRIP[fmt.name](rows, block or None)


def _sums(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return torch.stack([flat.abs().sum(dtype=torch.float64), flat.double().dot(flat.double())])
