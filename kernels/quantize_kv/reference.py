"""The codes of a key-value cache in plain torch; c is head_dim."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.small_floats import E4M3_MAX


@dataclass(frozen=True, kw_only=True)
class KVCodes:
    """Quantized keys or values.

    Attributes:
        codes: [..., c] uint8, or float8_e4m3fn.
        scale: [..., 1] float16, zero for a range too small to be stored.
        offset: [..., 1] float16, the value of code 0; None for symmetric codes.
        zero_code: the code of zero where there is no offset: 8 or 128; 0 for FP8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    zero_code: int


def quantize_kv_int(x: Tensor, *, bits: int, symmetric: bool) -> KVCodes:
    """Integer codes of keys or values.

    Args:
        x: [..., c], floating point; computed in float32 (float64 stays).
        bits: 4 or 8.
        symmetric: zero is the middle code; otherwise an offset is stored.
    """
    x = _wide(x)
    zero_code, top = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        scale = _half(x.abs().amax(dim=-1, keepdim=True) / (zero_code - 1))
        codes = (_rounded(x, scale) + zero_code).clamp(1, top)
        return KVCodes(codes=_bytes(codes), scale=scale, offset=None, zero_code=zero_code)
    offset = _half(x.amin(dim=-1, keepdim=True))
    above = x - offset.to(x.dtype)
    scale = _half(above.amax(dim=-1, keepdim=True).clamp_min(0) / top)
    codes = _rounded(above, scale).clamp(0, top)
    return KVCodes(codes=_bytes(codes), scale=scale, offset=offset, zero_code=0)


def quantize_kv_fp8(x: Tensor) -> KVCodes:
    """FP8 E4M3 codes of keys or values [..., c]."""
    x = _wide(x)
    scale = _half(x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX)
    codes = (x / _divisor(scale, x)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return KVCodes(codes=codes, scale=scale, offset=None, zero_code=0)


def dequantize_kv(stored: KVCodes) -> Tensor:
    """What the codes stand for, [..., c] float32."""
    values = (stored.codes.to(torch.float32) - stored.zero_code) * stored.scale.to(torch.float32)
    return values if stored.offset is None else values + stored.offset.to(torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16)


def _divisor(scale: Tensor, x: Tensor) -> Tensor:
    """The stored scale in x's dtype; infinite where it is zero, so that every quotient is zero."""
    wide = scale.to(x.dtype)
    return torch.where(wide == 0, torch.inf, wide)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return torch.round(x / _divisor(scale, x))


def _bytes(codes: Tensor) -> Tensor:
    return codes.nan_to_num(0).to(torch.uint8)  # NaN is in the scale
