"""The product in plain torch: exact integers per segment, then the same float operations as the kernels' epilogue."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import Operands

KERNEL_TILE = 128


def multiply(x: Tensor, w: Tensor, operands: Operands, out_dtype: torch.dtype) -> Tensor:
    """y [M, N].

    Args:
        x: int8 [M, K].
        w: integer [N, K], the weights without scales and with the zero point (8 for 4-bit codes) taken off.
        operands: the scales; its x and w are not looked at.
        out_dtype: of y.
    """
    groups = operands.w_groups
    if groups is not None and operands.integer_groups:
        w = w.to(torch.int16) * spread(groups, operands.w_group_size, operands.columns)
        groups = None
    if groups is None and operands.x_factors is None:
        value = exact_product(x, w).to(torch.float32)
    else:
        value = _by_segments(x, w, operands, groups)
    for scale in (operands.w_scale, None if operands.x_scale is None else operands.x_scale[:, None]):
        value = value if scale is None else value * scale
    return (value if operands.bias is None else value + operands.bias.to(torch.float32)).to(out_dtype)


def spread(per_group: Tensor, group_size: int, columns: int) -> Tensor:
    """[N, G] to [N, K]."""
    return per_group.repeat_interleave(group_size, dim=1)[:, :columns]


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ of integers [M, K] and [N, K] as int64 [M, N], by float products short enough to be exact."""
    # TF32 may be on for float32 on a GPU.
    dtype = torch.float32 if x.device.type == "cpu" else torch.float64
    step = 2 ** (24 if dtype == torch.float32 else 53) // (_largest(x) * _largest(w))
    total = x.new_zeros((x.shape[0], w.shape[0]), dtype=torch.int64)
    for start in range(0, x.shape[1], step):
        total += (x[:, start : start + step].to(dtype) @ w[:, start : start + step].to(dtype).T).to(torch.int64)
    return total


def _by_segments(x: Tensor, w: Tensor, operands: Operands, groups: Tensor | None) -> Tensor:
    factors = operands.x_factors
    width = gcd(KERNEL_TILE, operands.x_group_size, operands.w_group_size if groups is not None else 0)
    dtype = torch.float32 if operands.float_sum else torch.int64
    total = x.new_zeros((x.shape[0], w.shape[0]), dtype=dtype)
    for start in range(0, operands.columns, width):
        part = exact_product(x[:, start : start + width], w[:, start : start + width]).to(dtype)
        if groups is not None:
            part = part * groups[:, start // operands.w_group_size].to(dtype)
        if factors is not None:
            part = part * factors[:, start // operands.x_group_size, None].to(dtype)
        total = total + part
    return total.to(torch.float32)


def _largest(codes: Tensor) -> int:
    return 128 if codes.dtype == torch.int8 or not codes.numel() else max(int(codes.abs().max()), 1)
