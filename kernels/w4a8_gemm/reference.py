"""The product in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm import reference
from qtool.kernels.integer_gemm.operands import Operands
from qtool.kernels.pack import HalvesInt4

ZERO_CODE = 8


def multiply(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """y [M, N] of int4 weights and int8 or packed int4 activations."""
    packed = operands.x.dtype == torch.uint8
    x = HalvesInt4(operands.x, operands.columns).values() if packed else operands.x
    w = HalvesInt4(operands.w, operands.columns).values()
    zero = operands.zero_point
    if zero is not None:
        offset = zero.to(torch.int16) - ZERO_CODE
        whole = zero.dim() == 1
        w = w - (offset[:, None] if whole else reference.spread(offset, operands.w_group_size, operands.columns))
    return reference.multiply(x, w, operands, out_dtype)
