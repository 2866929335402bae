"""Activations to codes and back, exactly as the runtimes do it.

Integers: scale = max|a| / 127, code = round-half-even(a × (127 / max|a|)) in −127…127, an all-zero range gives
scale 0 and codes 0; a range too small to be divided by counts as zero. Per token and block this is what ONNX
Runtime's MatMulNBits computes at accuracy_level 4.
INT4 is the same with 7 in place of 127: codes −7…7, so that a range is symmetric and −8 never occurs. Its range may be
a share of max|a|: sixteen levels are better spent on a token's ordinary values.
FP4 E2M1: scale = max|a| / 6, code = a / scale rounded to the nearest of ±{0, ½, 1, 1½, 2, 3, 4, 6}, ties to even.
FP8 E4M3: scale = max|a| / 448, code = cast(a / scale), saturating. NaN and infinity propagate.
MXFP4, MXFP8 and NVFP4 have blocks of 32 and 16 whose scales are small floats (block_scaled.py).

`fake_quantize_*` are floats for the reference runtime. `quantize_rows` makes the stored codes that a low-bit GEMM
reads, with a norm, an activation function or a rotation in front of them, in one kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.quantize_activation.block_scaled import (
    fake_quantize_mxfp4,
    fake_quantize_mxfp8,
    fake_quantize_nvfp4,
)
from qtool.kernels.quantize_activation.blocks import in_blocks, whole_rows
from qtool.kernels.quantize_activation.row_format import ROW_FORMATS, SMALLEST_RANGE, RowFormat
from qtool.kernels.quantize_activation.rows import QuantizedRows, prepare_rows, quantize_rows
from qtool.kernels.quantize_activation.sources import RmsNorm, RowHadamard, SiluTimes
from qtool.kernels.small_floats import E2M1_MAX, E4M3_MAX, cast_e4m3, round_e2m1

__all__ = [
    "ROW_FORMATS",
    "QuantizedRows",
    "RmsNorm",
    "RowFormat",
    "RowHadamard",
    "SiluTimes",
    "fake_quantize_fp4",
    "fake_quantize_fp8",
    "fake_quantize_fp8_static",
    "fake_quantize_int4",
    "fake_quantize_int8",
    "fake_quantize_int8_static",
    "fake_quantize_mxfp4",
    "fake_quantize_mxfp8",
    "fake_quantize_nvfp4",
    "prepare_rows",
    "quantize_int4",
    "quantize_int8",
    "quantize_rows",
]

INT8_MAX = 127.0
INT4_MAX = 7.0


def quantize_int8(x: Tensor, *, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric INT8 per token, or per token and block of `group_size` along K.

    Args:
        x: [..., K] float32.
        group_size: block width; None takes the whole row. A short last block is allowed.

    Returns:
        codes [..., G, group] (float32 holding integers; the last block padded with zeros) and scale [..., G, 1].
    """
    return _quantize_integer(x, INT8_MAX, group_size)


def fake_quantize_int8(x: Tensor, *, group_size: int | None = None) -> Tensor:
    """`quantize_int8` and back: the float values [..., K] that the integer GEMM really multiplies."""
    codes, scale = quantize_int8(x, group_size=group_size)
    return whole_rows(codes * scale, x)


def quantize_int4(x: Tensor, *, group_size: int | None = None, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric INT4 per token, or per token and block of `group_size` along K; shapes as `quantize_int8`.

    Args:
        clip: the range is this share of max|a|; larger values take the outermost code.
    """
    return _quantize_integer(x, INT4_MAX, group_size, clip)


def fake_quantize_int4(x: Tensor, *, group_size: int | None = None, clip: float = 1.0) -> Tensor:
    """`quantize_int4` and back: the float values [..., K] that the integer GEMM really multiplies."""
    codes, scale = quantize_int4(x, group_size=group_size, clip=clip)
    return whole_rows(codes * scale, x)


def fake_quantize_fp4(x: Tensor, *, group_size: int | None = None) -> Tensor:
    """Dynamic FP4 E2M1 per token, or per token and block of `group_size` along K, and back. [..., K] to [..., K]."""
    blocks = in_blocks(x, group_size)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(amax > SMALLEST_RANGE, amax / E2M1_MAX, torch.ones_like(amax))
    return whole_rows(round_e2m1(blocks / scale) * scale, x)


def fake_quantize_int8_static(x: Tensor, scale: Tensor) -> Tensor:
    """Symmetric INT8 with a stored per-tensor scale; values beyond ±127 × scale clip. [..., K] to [..., K]."""
    return torch.clamp(torch.round(x / scale), -INT8_MAX, INT8_MAX) * scale


def fake_quantize_fp8(x: Tensor, *, group_size: int | None = None) -> Tensor:
    """Dynamic FP8 E4M3 per token, or per token and block of `group_size` along K, and back. [..., K] to [..., K]."""
    blocks = in_blocks(x, group_size)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(amax > SMALLEST_RANGE, amax / E4M3_MAX, torch.ones_like(amax))
    return whole_rows(cast_e4m3(blocks / scale) * scale, x)


def fake_quantize_fp8_static(x: Tensor, scale: Tensor) -> Tensor:
    """FP8 E4M3 with a stored per-tensor scale, and back. [..., K] to [..., K]."""
    return cast_e4m3(x / scale) * scale


def _quantize_integer(
    x: Tensor, largest: float, group_size: int | None, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    blocks = in_blocks(x, group_size)
    limit = blocks.abs().amax(dim=-1, keepdim=True) * clip
    # A number over a tensor is torch's reciprocal times the number: two roundings.
    by = torch.full_like(limit, largest) / limit
    # limit × 0 is zero for a small range, and NaN for NaN.
    codes = torch.round(blocks * torch.where(limit > SMALLEST_RANGE, by, limit * 0))
    return codes if clip == 1.0 else codes.clamp(-largest, largest), limit / largest
