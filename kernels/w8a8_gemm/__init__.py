"""int8 weights × int8 activations, per channel times per token or per tensor: one exact int32 sum, scaled at the end.

    y[m, n] = w_scale[n] · x_scale[m] · Σ_j w[n, j] · x[m, j] + bias[n]

Bit-equal to the reference and independent of the batch and of the tiling.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.dispatch import backend_for
from qtool.kernels.integer_gemm.operands import checked
from qtool.kernels.integer_gemm.output import output_for
from qtool.kernels.integer_gemm.tilings import Tiling, choose_tiling
from qtool.kernels.w8a8_gemm import reference

__all__ = ["w8a8_gemm"]


def w8a8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """y = (x_codes × x_scale) · (weight × w_scale)ᵀ + bias.

    Args:
        x_codes: int8 [M, K].
        x_scale: float32 [M], [M, 1] or one number.
        weight: int8 [N, K].
        w_scale: float32 [N], [N, 1] or one number.
        bias: float [N].
        out_dtype: bfloat16, float16 or float32.
        out: the output [M, N] to write, rows contiguous.
        tiling: None for the configured one.

    Returns:
        [M, N]. Scales that are not finite propagate; a token whose scale and codes are zero gives the bias.

    Raises:
        ValueError: when shapes or types do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    operands = checked(x_codes, x_scale, weight, w_scale, bias=bias)
    y = output_for(operands, out_dtype, out)
    if backend_for(y.device, "w8a8_gemm", unsupported=operands.unsupported) == "reference":
        return y.copy_(reference.multiply(operands, out_dtype))
    from qtool.kernels.w8a8_gemm import triton_kernel

    if y.numel():
        triton_kernel.multiply(operands, y, tiling or choose_tiling("w8a8_gemm", operands, y.device))
    return y
