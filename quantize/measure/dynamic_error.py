"""The error of quantizing rows with scales found at run time: one per token, or one per token and block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtool.quantize.artifacts.formats import FP4_E2M1, NumericFormat
from qtool.quantize.artifacts.site_statistics import DYNAMIC_CANDIDATES


def candidate_errors(rows: Tensor) -> Tensor:
    """Sums over rows [n, C] as SiteStatistics.errors has them: float64 [1 + candidates, 2]."""
    exact = {block: _blocks(rows, block) for _, block in DYNAMIC_CANDIDATES}
    amax = {block: blocks.abs().amax(dim=2, keepdim=True) for block, blocks in exact.items()}
    errors = [_round_trip(exact[block], amax[block], fmt).sub_(exact[block]) for fmt, block in DYNAMIC_CANDIDATES]
    return torch.stack([_sums(values) for values in (rows, *errors)])


def round_trip(rows: Tensor, fmt: NumericFormat, block: int) -> Tensor:
    """Rows [n, C] quantized symmetrically and back, scale = max|x| / qmax.

    Args:
        rows: float32.
        fmt: the format.
        block: values that share a scale; 0: the row. A last short block has a scale of its own.
    """
    blocks = _blocks(rows, block)
    back = _round_trip(blocks, blocks.abs().amax(dim=2, keepdim=True), fmt)
    return back.reshape(rows.shape[0], -1)[:, : rows.shape[1]]


def _blocks(rows: Tensor, block: int) -> Tensor:
    """[n, blocks, size], the last block filled up with zeros."""
    width = rows.shape[1]
    size = block or width
    padded = nn.functional.pad(rows, (0, -width % size)) if width % size else rows
    return padded.reshape(rows.shape[0], -1, size)


def _round_trip(blocks: Tensor, amax: Tensor, fmt: NumericFormat) -> Tensor:
    scale = amax / fmt.qmax
    scale = torch.where(scale > 0, scale, 1.0)
    return _on_grid(blocks / scale, fmt).mul_(scale)


def _on_grid(scaled: Tensor, fmt: NumericFormat) -> Tensor:
    if fmt.kind == "int":
        return scaled.round_().clamp_(-fmt.qmax, fmt.qmax)
    if fmt is FP4_E2M1:
        # Steps of ½ below 2, of 1 below 4, of 2 above; rounding half to even in each.
        magnitude = scaled.abs()
        step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        return ((scaled / step).round_() * step).clamp_(-fmt.qmax, fmt.qmax)
    return scaled.clamp_(-fmt.qmax, fmt.qmax).to(torch.float8_e4m3fn).float()


def _sums(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return torch.stack([flat.abs().sum(dtype=torch.float64), flat.double().dot(flat.double())])
