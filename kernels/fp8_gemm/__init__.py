"""FP8 × FP8: y = (X · Wᵀ) × scales + bias, with E4M3 operands and float32 sums.

Activations have a scale for the tensor, for each token, or for each token and 128 columns; weights have one for the
tensor, for each row, for each row and 128 columns, or for each block of 128 × 128. All of them combine.

    y[m, n] = Σ_b x_scale[m, b] × w_scale[n, b] × Σ_k∈b x[m, k] × w[n, k]        b: 128 columns
    y[m, n] = x_scale[m] × w_scale[n] × Σ_k x[m, k] × w[n, k]                    without block scales

Hopper's FP8 tensor cores add with about 14 bits, so they never add more than 128 columns unless `longest_sum` allows
it: each tile's sum is taken out and added in float32. (On Ada, Triton's compiler leaves the sums of row scales to the
tensor cores.) A K that is cut is added in the order of K, so equal calls give equal bits; another M may choose another
tile and so another order. Tensor cores for E4M3 exist from capability 8.9 on: below it, and on a CPU, the reference
runs (QTOOL_BACKEND=triton refuses instead).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.float_gemm import Tiling, choose_tiling, e4m3_obstacle
from qtool.kernels.fp8_gemm import reference
from qtool.kernels.fp8_gemm.scales import ActivationScale, WeightScale, activation_scale, weight_scale

__all__ = ["ActivationScale", "WeightScale", "fp8_gemm"]

CONFIGS = Path(__file__).parent / "configs.json"
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    w_codes: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    longest_sum: int = 128,
    tiling: Tiling | None = None,
) -> Tensor:
    """Multiply E4M3 activations by E4M3 weights.

    Args:
        x_codes: float8_e4m3fn [M, K], contiguous along K.
        x_scale: float32 [] or [1] (the tensor), [M] or [M, 1] (tokens), or [M, ceil(K / 128)] (blocks).
        w_codes: float8_e4m3fn [N, K], contiguous along K; rows a multiple of 16 bytes apart load fastest.
        w_scale: float32 [] or [1], [N] or [N, 1], [N, ceil(K / 128)], or [ceil(N / 128), ceil(K / 128)].
        bias: [N] of any float type, or None.
        out_dtype: bfloat16, float16 or float32.
        longest_sum: how many columns of K the tensor cores may add by themselves. From the length of a part of K on,
            nothing is taken out before the part's end and the next product overlaps the last, which is faster; without
            block scales only. What is lost is up to 2⁻¹³ of a sum for every 32 columns.
        tiling: in place of the table's, to try others.

    Returns:
        [M, N] of out_dtype.

    Raises:
        UsageError: when shapes or types do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    _check(x_codes, w_codes, bias, out_dtype)
    xs = activation_scale(x_scale, x_codes.shape[0], x_codes.shape[1])
    ws = weight_scale(w_scale, w_codes.shape[0], w_codes.shape[1])
    device = x_codes.device
    if not x_codes.shape[0] or not w_codes.shape[0]:
        return torch.empty(x_codes.shape[0], w_codes.shape[0], dtype=out_dtype, device=device)
    if backend_for(device, "fp8_gemm", unsupported=e4m3_obstacle()) == "reference":
        return reference.fp8_gemm(x_codes, xs, w_codes, ws, bias, out_dtype)
    from qtool.kernels.fp8_gemm.triton_kernel import launch

    (m, k), n = x_codes.shape, w_codes.shape[0]
    form = "block" if xs.blocks or ws.blocks else "fast" if longest_sum >= k else "row"
    tiling = tiling or choose_tiling(CONFIGS, form, device, m, n, k)
    return launch(x_codes, xs, w_codes, ws, bias, out_dtype, tiling, longest_sum)


def _check(x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    for name, codes in (("x_codes", x), ("w_codes", w)):
        if codes.dtype != torch.float8_e4m3fn or codes.dim() != 2 or (codes.stride(1) != 1 and codes.shape[1] > 1):
            raise UsageError(
                f"fp8_gemm: {name}",
                f"{codes.dtype} {tuple(codes.shape)} with strides {codes.stride()}",
                "give a float8_e4m3fn matrix contiguous along K",
            )
    if x.shape[1] != w.shape[1] or not x.shape[1]:
        raise UsageError("fp8_gemm", f"activations have {x.shape[1]} columns and weights {w.shape[1]}")
    if bias is not None and bias.shape != (w.shape[0],):
        raise UsageError("fp8_gemm: bias", f"shape {tuple(bias.shape)}, {w.shape[0]} rows of weights")
    if out_dtype not in OUT_DTYPES:
        raise UsageError("fp8_gemm: out_dtype", f"{out_dtype}", "give bfloat16, float16 or float32")
