"""The product in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm import reference
from qtool.kernels.integer_gemm.operands import Operands


def multiply(operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """y [M, N] of int8 weights and activations."""
    return reference.multiply(operands.x, operands.w, operands, out_dtype)
