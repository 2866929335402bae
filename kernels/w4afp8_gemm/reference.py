"""The product in plain torch: what the kernel computes, but for the order of its float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.float_gemm import GroupScales
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
    if scales.size:
        sums = torch.zeros(x.shape[0], w.shape[0], device=x.device)
        for group, factor in enumerate(scales.values.to(torch.float32).T):
            columns = slice(group * scales.size, (group + 1) * scales.size)
            sums += (x[:, columns] @ w[:, columns].T) * factor
    else:
        sums = (x @ w.T) * scales.values[:, 0].to(torch.float32)
    sums = sums * x_scale[:, None]
    if bias is not None:
        sums = sums + bias.to(torch.float32)
    return sums.to(out_dtype)
