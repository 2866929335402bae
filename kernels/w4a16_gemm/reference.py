"""The product in plain torch: what the kernel computes, but for the order of its float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.float_gemm import GroupScales, spread
from qtool.kernels.float_gemm.reference import finished, scaled_sums
from qtool.kernels.pack import HalvesInt4

ZERO_POINT = 8  # of the canonical codes, taken off by HalvesInt4.values already


def w4a16_gemm(
    x: Tensor,
    weight: HalvesInt4,
    scales: GroupScales,
    zero_point: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[M, N] of out_dtype; operands as the public function has checked them."""
    values = weight.values().to(torch.float32)
    if zero_point is not None:
        values = values + (ZERO_POINT - spread(zero_point.to(torch.float32), scales.size, weight.columns))
    return finished(scaled_sums(x.to(torch.float32), values, scales), bias, out_dtype)
