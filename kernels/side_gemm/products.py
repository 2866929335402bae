"""The two halves of a side product on stored tensors: the skinny projection, and its addition to an output."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.side_gemm.quad_input import LARGEST_RANK, OP, SIXTEEN_BITS
from qtool.kernels.side_gemm.reference import rounded_side, side_columns, side_output


def side_rows(x: Tensor, down: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """side = x × down, summed in float32: [..., K] to [..., r].

    Args:
        x: [..., K] float32, bfloat16 or float16, taken as it is.
        down: [K, r] float16 or bfloat16, r = 1…128.
        dtype: of the result: float16 (saturating), bfloat16 or float32; None takes that of `down`.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
    """
    stored = down.dtype if dtype is None else dtype
    _check(x, down, down.shape[0] if down.dim() == 2 else 0, "side_rows")
    if stored not in (*SIXTEEN_BITS, torch.float32):
        raise UsageError("side_rows", f"a side is not stored as {stored}", "see its docstring")
    rows = x.reshape(-1, x.shape[-1])
    if backend_for(x.device, OP) == "triton":
        from qtool.kernels.side_gemm.launch import launch_side

        side = launch_side(rows, down, stored)
    else:
        side = rounded_side(side_columns(rows.to(torch.float32), down.to(torch.float32)), stored)
    return side.reshape(*x.shape[:-1], down.shape[1])


def add_side_output(y: Tensor, side: Tensor, up: Tensor) -> Tensor:
    """y += side × upᵀ in place, summed in float32 and rounded to y's dtype once.

    Args:
        y: [..., N] float32, bfloat16 or float16 whose rows lie side by side in memory.
        side: [..., r] and up: [N, r], both float16 or both bfloat16, r = 1…128.

    Returns:
        y.

    Raises:
        UsageError: for shapes or dtypes that do not fit.
    """
    _check(side, up, up.shape[1] if up.dim() == 2 else 0, "add_side_output")
    if side.dtype != up.dtype:
        raise UsageError("add_side_output", f"side is {side.dtype}, up {up.dtype}", "store both in one dtype")
    if y.shape != (*side.shape[:-1], len(up)) or not y.is_contiguous():
        raise UsageError("add_side_output", f"y {tuple(y.shape)} is not contiguous [..., {len(up)}]", "reshape it")
    rows = y.view(-1, len(up))
    flat = side.reshape(-1, side.shape[-1])
    if backend_for(y.device, OP) == "triton":
        from qtool.kernels.side_gemm.launch import launch_add

        launch_add(rows, flat, up)
    else:
        rows.copy_(rows.to(torch.float32) + side_output(flat, up, dtype=up.dtype))
    return y


def _check(x: Tensor, factor: Tensor, width: int, what: str) -> None:
    faults = [
        (not x.is_floating_point() or x.dim() < 1, f"the input is {x.dtype} {tuple(x.shape)}"),
        (factor.dim() != 2 or x.shape[-1] != width, f"a factor {tuple(factor.shape)} for inputs {tuple(x.shape)}"),
        (factor.dtype not in SIXTEEN_BITS, f"the factor is {factor.dtype}, not a 16-bit float"),
        (factor.dim() == 2 and not 1 <= factor.shape[1] <= LARGEST_RANK, "the rank is not 1 to 128"),
    ]
    for wrong, why in faults:
        if wrong:
            raise UsageError(what, why, "see its docstring")
