"""int4 weights times int8 or packed int4 activations, by the kernel or the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.dispatch import backend_for
from qtool.kernels.integer_gemm.operands import Operands
from qtool.kernels.integer_gemm.output import output_for
from qtool.kernels.integer_gemm.tilings import Tiling, choose_tiling
from qtool.kernels.w4a8_gemm import reference


def int4_weight_product(
    op: str, operands: Operands, out_dtype: torch.dtype, out: Tensor | None, tiling: Tiling | None
) -> Tensor:
    """y [M, N] for the operation `op`, whose configs.json gives the tiling when there is none."""
    y = output_for(operands, out_dtype, out)
    if backend_for(y.device, op, unsupported=operands.unsupported) == "reference":
        return y.copy_(reference.multiply(operands, out_dtype))
    from qtool.kernels.w4a8_gemm import triton_kernel

    if y.numel():
        triton_kernel.multiply(operands, y, tiling or choose_tiling(op, operands, y.device))
    return y
