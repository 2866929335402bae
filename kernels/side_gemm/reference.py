"""The side product in plain torch: operands rounded to the stored dtype, sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def side_columns(x: Tensor, down: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """side = x × down.

    Args:
        x: the linear's input [..., K] float32.
        down: [K, r] float32.
        dtype: what both operands are stored in: float16, bfloat16, or float32 for no rounding.

    Returns:
        [..., r] float32.
    """
    return _rounded(x, dtype) @ _rounded(down, dtype)


def side_output(side: Tensor, up: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """side × upᵀ: [..., r] and up [N, r] to [..., N] float32; `dtype` as in `side_columns`."""
    return _rounded(side, dtype) @ _rounded(up, dtype).T


def side_gemm(y: Tensor, x: Tensor, down: Tensor, up: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """y + (x × down) × upᵀ for y [..., N], x [..., K], down [K, r], up [N, r]; float32 [..., N]."""
    return y + side_output(side_columns(x, down, dtype=dtype), up, dtype=dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(torch.float32)


def rounded_side(side: Tensor, dtype: torch.dtype) -> Tensor:
    """side in a dtype: float16 saturates instead of overflowing."""
    if dtype is torch.float16:
        largest = torch.finfo(dtype).max
        side = side.clamp(-largest, largest)
    return side.to(dtype)
