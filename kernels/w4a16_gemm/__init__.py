"""4-bit weights × 16-bit activations: y = X · (scales × (codes − zero points))ᵀ + bias, float32 sums.

    y[m, n] = Σ_g w_scale[n, g] × Σ_k∈g x[m, k] × (code[n, k] − zero_point[n, g])

A nibble becomes the integer code − zero_point (−15 … 15) in x's own type, exactly; the scale multiplies a group's
float32 sum, so no scaled weight is ever rounded to 16 bits. A K that is cut is added in the order of K, so equal calls
give equal bits; another M may choose another tile and so another order.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.float_gemm import GroupScales, Tiling, check_matrix, check_product, choose_tiling, group_scales
from qtool.kernels.pack import HalvesInt4
from qtool.kernels.w4a16_gemm import reference

__all__ = ["w4a16_gemm"]

OP = "w4a16_gemm"
# Names in the table of tiles, by group size: what lies in a half of a K tile has a sum of its own.
FORMS = {0: "row", 32: "group32", 64: "group64"}
CONFIGS = Path(__file__).parent / "configs.json"
IN_DTYPES = (torch.bfloat16, torch.float16)


def w4a16_gemm(
    x: Tensor,
    weight: HalvesInt4,
    w_scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    group_size: int | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Multiply 16-bit activations by 4-bit weights.

    Args:
        x: bfloat16 or float16 [M, K], contiguous along K.
        weight: [N, K], twos_complement.
        w_scale: [N] or [N, 1], or with a group size [N, ceil(K / group_size)]; float32, float16 or bfloat16.
        zero_point: uint8 of w_scale's shape, 0 … 15: the canonical code that stands for zero; None: 8 everywhere.
        bias: [N] of any float type, or None.
        out_dtype: bfloat16, float16 or float32; None: x's.
        group_size: columns that share a scale (32, 64 or a multiple of 128 run on the GPU); None: one scale a row.
        tiling: in place of the table's, to try others.

    Returns:
        [M, N] of out_dtype.

    Raises:
        UsageError: when shapes or types do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    out_dtype = out_dtype or x.dtype
    check_matrix(f"{OP}: x", x, IN_DTYPES)
    if weight.encoding != "twos_complement":
        raise UsageError(f"{OP}: weight", f"{weight.encoding} nibbles", "pack it as twos_complement")
    check_product(OP, x, weight.packed.shape[0], weight.columns, bias, out_dtype)
    (m, k), n = x.shape, weight.packed.shape[0]
    scales = group_scales(OP, w_scale, n, k, group_size)
    zeros = _zero_points(zero_point, scales)
    if not m or not n:
        return torch.empty(m, n, dtype=out_dtype, device=x.device)
    if backend_for(x.device, OP, unsupported=scales.obstacle()) == "reference":
        return reference.w4a16_gemm(x, weight, scales, zeros, bias, out_dtype)
    from qtool.kernels.w4a16_gemm.triton_kernel import launch

    form = FORMS.get(scales.size, "group")
    tiling = tiling or choose_tiling(CONFIGS, form, x.device, m, n, k)
    return launch(x, weight, scales, zeros, bias, out_dtype, tiling)


def _zero_points(zero_point: Tensor | None, scales: GroupScales) -> Tensor | None:
    if zero_point is None:
        return None
    zeros = zero_point[:, None] if zero_point.dim() == 1 else zero_point
    if zeros.dtype != torch.uint8 or zeros.shape != scales.values.shape:
        found = f"{zeros.dtype} {tuple(zero_point.shape)}"
        raise UsageError(f"{OP}: zero_point", found, f"give uint8 {list(scales.values.shape)}")
    return zeros
