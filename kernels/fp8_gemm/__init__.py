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

from qtool.kernels.dispatch import backend_for
from qtool.kernels.float_gemm import Tiling, check_matrix, check_product, choose_tiling
from qtool.kernels.fp8_gemm import reference
from qtool.kernels.fp8_gemm.scales import ActivationScale, WeightScale, activation_scale, weight_scale

__all__ = ["ActivationScale", "WeightScale", "fp8_gemm"]

CONFIGS = Path(__file__).parent / "configs.json"
E4M3 = (torch.float8_e4m3fn,)


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
    check_matrix("fp8_gemm: x_codes", x_codes, E4M3)
    check_matrix("fp8_gemm: w_codes", w_codes, E4M3)
    (m, k), n, device = x_codes.shape, w_codes.shape[0], x_codes.device
    check_product("fp8_gemm", x_codes, n, w_codes.shape[1], bias, out_dtype)
    xs, ws = activation_scale(x_scale, m, k), weight_scale(w_scale, n, k)
    if not m or not n:
        return torch.empty(m, n, dtype=out_dtype, device=device)
    if backend_for(device, "fp8_gemm", e4m3=True) == "reference":
        return reference.fp8_gemm(x_codes, xs, w_codes, ws, bias, out_dtype)
    from qtool.kernels.fp8_gemm.triton_kernel import launch

    form = "block" if xs.blocks or ws.blocks else "fast" if longest_sum >= k else "row"
    tiling = tiling or choose_tiling(CONFIGS, form, device, m, n, k)
    return launch(x_codes, xs, w_codes, ws, bias, out_dtype, tiling, longest_sum)
