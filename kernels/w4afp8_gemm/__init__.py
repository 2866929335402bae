"""4-bit weights × FP8 activations: y = (X · Wᵀ) × scales + bias, E4M3 tensor cores, float32 sums.

    y[m, n] = x_scale[m] × Σ_g w_scale[n, g] × Σ_k∈g x[m, k] × w[n, k]         w: −7 … 7, sign and magnitude

A sign-magnitude nibble becomes E4M3 by masks alone: the byte s0000mmm reads as ±mmm × 2⁻⁹, and the 2⁹ is put back at
the end, exactly. The two nibbles of a byte are two halves of a K tile, and each half has a sum of its own: a product
then feeds nothing but the next one, so Hopper unpacks weights while its tensor cores still multiply.

Those tensor cores add with about 14 bits. `longest_sum` bounds the columns they may add by themselves; where a part of
K is longer, and with group scales, each tile of 128 columns is taken out and added in float32 (which waits for it). A K
that is cut is added in the order of K, so equal calls give equal bits; another M may choose another tile and so another
order. Below capability 8.9 there is no E4M3 product: the reference runs (QTOOL_BACKEND=triton refuses instead).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.float_gemm import Tiling, check_matrix, check_product, choose_tiling, group_scales
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4afp8_gemm import reference

__all__ = ["w4afp8_gemm"]

OP = "w4afp8_gemm"
CONFIGS = Path(__file__).parent / "configs.json"


def w4afp8_gemm(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: HalvesInt4,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    group_size: int | None = None,
    longest_sum: int = 2048,
    tiling: Tiling | None = None,
) -> Tensor:
    """Multiply E4M3 activations by 4-bit weights.

    Args:
        x_codes: float8_e4m3fn [M, K], contiguous along K.
        x_scale: float32 [M] or [M, 1].
        weight: [N, K], sign_magnitude.
        w_scale: [N] or [N, 1], or with a group size [N, ceil(K / group_size)]; float32, float16 or bfloat16.
        bias: [N] of any float type, or None.
        out_dtype: bfloat16, float16 or float32.
        group_size: columns that share a scale (32, 64 or a multiple of 128 run on the GPU); None: one scale a row.
        longest_sum: how many columns of K the tensor cores may add by themselves, in two sums of half as many; what is
            lost is up to 2⁻¹³ of a sum for every 32 of its columns.
        tiling: in place of the table's, to try others.

    Returns:
        [M, N] of out_dtype.

    Raises:
        UsageError: when shapes or types do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    check_matrix(f"{OP}: x_codes", x_codes, (torch.float8_e4m3fn,))
    if weight.encoding != "sign_magnitude":
        raise UsageError(f"{OP}: weight", f"{weight.encoding} nibbles", "pack it as sign_magnitude")
    check_product(OP, x_codes, weight.packed.shape[0], weight.columns, bias, out_dtype)
    (m, k), n = x_codes.shape, weight.packed.shape[0]
    if x_scale.dtype != torch.float32 or x_scale.shape not in ((m,), (m, 1)):
        raise UsageError(f"{OP}: x_scale", f"{x_scale.dtype} {tuple(x_scale.shape)}", f"give float32 [{m}]")
    scales = group_scales(OP, w_scale, n, k, group_size)
    xs = x_scale.reshape(m)
    device = x_codes.device
    if not m or not n:
        return torch.empty(m, n, dtype=out_dtype, device=device)
    if backend_for(device, OP, unsupported=scales.obstacle(), e4m3=True) == "reference":
        return reference.w4afp8_gemm(x_codes, xs, weight, scales, bias, out_dtype)
    from qtool.kernels.w4afp8_gemm.triton_kernel import launch

    form = "group" if scales.size else "row"
    tiling = tiling or choose_tiling(CONFIGS, form, device, m, n, k)
    return launch(x_codes, xs, weight, scales, bias, out_dtype, tiling, longest_sum)
