"""The FP8 product in plain torch: what the kernel computes, but for the order of its float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.float_gemm.reference import finished
from qtool.kernels.fp8_gemm.scales import BLOCK, ActivationScale, WeightScale


def fp8_gemm(
    x_codes: Tensor,
    x_scale: ActivationScale,
    w_codes: Tensor,
    w_scale: WeightScale,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """[M, N] of out_dtype; operands as the public function has checked them."""
    n, k = w_codes.shape
    rows = w_scale.values.repeat_interleave(w_scale.rows, dim=0)[:n]
    if x_scale.blocks or w_scale.blocks:
        sums = torch.zeros(x_codes.shape[0], n, device=x_codes.device)
        for block in range(-(-k // BLOCK)):
            columns = slice(block * BLOCK, (block + 1) * BLOCK)
            product = x_codes[:, columns].to(torch.float32) @ w_codes[:, columns].to(torch.float32).T
            xs = x_scale.values[:, block if x_scale.blocks else 0]
            ws = rows[:, block if w_scale.blocks else 0]
            sums += product * (xs[:, None] * ws)
    else:
        product = x_codes.to(torch.float32) @ w_codes.to(torch.float32).T
        sums = product * rows[:, 0] * x_scale.values
    return finished(sums, bias, out_dtype)
