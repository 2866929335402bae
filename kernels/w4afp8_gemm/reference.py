"""The product in plain torch: what the kernel computes, but for the order of its float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.float_gemm import GroupScales
from qtool.kernels.float_gemm.reference import finished, scaled_sums
from qtool.kernels.pack import HalvesInt4


def w4afp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: HalvesInt4,
    scales: GroupScales,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[M, N] of out_dtype; operands as the public function has checked them."""
    x, w = x_codes.to(torch.float32), weight.values().to(torch.float32)
    return finished(scaled_sums(x, w, scales) * x_scale[:, None], bias, out_dtype)
