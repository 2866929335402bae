"""Rows to codes in plain torch: what the Triton kernel computes, in the same order of roundings."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qtool.kernels.hadamard import apply
from qtool.kernels.pack.halves import nibbles_in_halves
from qtool.kernels.quantize_activation.blocks import in_blocks
from qtool.kernels.quantize_activation.row_format import SMALLEST_RANGE, RowFormat
from qtool.kernels.quantize_activation.sources import RmsNorm, RowHadamard, SiluTimes, Source


def prepared(x: Tensor, source: Source, hadamard: RowHadamard | None) -> Tensor:
    """The values to be quantized, [M, K] float32; writes the residual."""
    values = x.to(torch.float32)
    if isinstance(source, RmsNorm):
        values = _normalized(values, source)
    elif isinstance(source, SiluTimes):
        values = silu(values) * source.up.to(torch.float32)
    return values if hadamard is None else apply(values, hadamard.plan, hadamard.signs)


def _normalized(values: Tensor, norm: RmsNorm) -> Tensor:
    if norm.residual is not None:
        norm.residual.copy_(values + norm.residual.to(torch.float32))
        values = norm.residual.to(torch.float32)
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + norm.epsilon)
    return values if norm.gain is None else values * norm.gain.to(torch.float32)


def quantized(
    values: Tensor, form: RowFormat, *, group_size: int | None, clip: float, row_sums: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [M, K] (or bytes [M, ⌈K / 128⌉ × 64]), scale and sums [M, G] of values [M, K] float32."""
    blocks = in_blocks(values, group_size)
    limit = blocks.abs().amax(dim=-1, keepdim=True) * clip
    if form.integer:
        codes, scale = _integers(blocks, limit, form.largest)
    else:
        scale = torch.where(limit > SMALLEST_RANGE, limit / form.largest, torch.ones_like(limit))
        codes = torch.clamp(blocks / scale, -form.largest, form.largest).to(torch.float8_e4m3fn)
    sums = codes.to(torch.int32).sum(dim=-1, dtype=torch.int32) if row_sums else None
    # Eight-bit floats are cut as bytes: not every operation of torch knows them.
    whole = codes.view(torch.int8).flatten(1)[:, : values.shape[1]].contiguous()
    stored = pack_halves(whole) if form.halves else whole.view(form.dtype)
    return stored, scale.squeeze(-1), sums


def _integers(blocks: Tensor, limit: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    usable = (limit > SMALLEST_RANGE) & torch.isfinite(limit)
    # A number over a tensor is torch's reciprocal times the number: two roundings.
    by = torch.full_like(limit, largest) / limit
    rounded = torch.round(blocks * torch.where(usable, by, torch.zeros_like(limit)))
    codes = torch.where(usable, rounded.clamp(-largest, largest), torch.zeros_like(rounded))
    return codes.to(torch.int8), limit / largest


def pack_halves(codes: Tensor) -> Tensor:
    """int8 codes −8…7 [M, K] to bytes uint8 [M, ⌈K / 128⌉ × 64], as `RowFormat.halves` says."""
    return nibbles_in_halves((codes & 15).view(torch.uint8))
