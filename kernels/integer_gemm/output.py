"""The tensor a product is written to."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import FLOATS, Operands


def output_for(operands: Operands, out_dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The caller's tensor [M, N], checked, or a fresh one.

    Raises:
        ValueError: when the type is none the kernels write, or `out` has another shape, type or spread-out rows.
    """
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype {out_dtype}: float32, float16 or bfloat16")
    rows, outs, _ = operands.shape
    if out is None:
        return torch.empty((rows, outs), dtype=out_dtype, device=operands.x.device)
    if out.shape != (rows, outs) or out.dtype != out_dtype or (out.stride(1) != 1 and out.numel()):
        found = f"{out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        raise ValueError(f"out wants {out_dtype} [{rows}, {outs}] with contiguous rows, got {found}")
    return out
