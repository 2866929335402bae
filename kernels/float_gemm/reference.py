"""The steps that the float products' references share, in plain torch and float32."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.float_gemm.group_scales import GroupScales


def scaled_sums(x: Tensor, w: Tensor, scales: GroupScales) -> Tensor:
    """Σ_g scale[n, g] × Σ_k∈g x[m, k] × w[n, k] of float32 x [M, K] and w [N, K], group after group: [M, N]."""
    if not scales.size:
        return (x @ w.T) * scales.values[:, 0].to(torch.float32)
    sums = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for group, factor in enumerate(scales.values.to(torch.float32).T):
        columns = slice(group * scales.size, (group + 1) * scales.size)
        sums += (x[:, columns] @ w[:, columns].T) * factor
    return sums


def finished(sums: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The sums [M, N] with the bias [N], rounded once."""
    return (sums if bias is None else sums + bias.to(torch.float32)).to(out_dtype)
