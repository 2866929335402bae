"""The launches of Runtime Smooth's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.quantize_activation.launch import unit_stride, warps_for
from qtool.kernels.quantize_activation.row_format import PACK_TILE, RowFormat, stored_columns
from qtool.kernels.runtime_smooth.configuration import ranges_configuration
from qtool.kernels.runtime_smooth.reference import SMALLEST_FACTOR
from qtool.kernels.runtime_smooth.triton_kernel import (
    smoothed_codes_kernel,
    tile_ranges_kernel,
    token_levels_kernel,
)


def launch_factors(x: Tensor, group_size: int, level: bool, starts: Tensor, longest: int) -> Tensor:
    """s_G float32 [R, G]: see `request_factors`."""
    x = unit_stride(x)
    rows, columns = x.shape
    tiles, requests = columns // group_size, len(starts) - 1
    ranges = torch.zeros(requests, tiles, dtype=torch.int32, device=x.device)
    if rows and requests:
        config = ranges_configuration(longest)
        levels = torch.empty(rows, dtype=torch.float32, device=x.device) if level and longest > 1 else None
        if levels is not None:
            block = min(4096, 1 << (columns - 1).bit_length())
            token_levels_kernel[(rows,)](
                x, levels, x.stride(0), columns, BLOCK=block, num_warps=warps_for(block), enable_fp_fusion=False
            )
        chunks = -(-longest // config.chunk)
        tile_ranges_kernel[(tiles, requests, chunks)](
            x,
            x if levels is None else levels,
            starts,
            ranges,
            x.stride(0),
            tiles,
            config.chunk,
            GROUP=group_size,
            ROWS=config.rows,
            LEVEL=levels is not None,
            num_warps=config.warps,
            enable_fp_fusion=False,
        )
    return ranges.view(torch.float32).clamp_min(SMALLEST_FACTOR)


def launch_codes(
    x: Tensor, factors: Tensor, request: Tensor, form: RowFormat, *, clip: float, single: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes and token ranges: see `smoothed_codes`; `single`: every request is one row, `factors` is written."""
    x = unit_stride(x)
    rows, columns = x.shape
    factors = factors.contiguous()
    tiles = factors.shape[1]
    group = columns // tiles
    codes = torch.empty(rows, stored_columns(form, columns), dtype=form.dtype, device=x.device)
    token_range = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        padded = max(1 << (tiles - 1).bit_length(), PACK_TILE // group if form.halves else 1)
        smoothed_codes_kernel[(rows,)](
            x,
            factors,
            request,
            codes,
            token_range,
            x.stride(0),
            columns,
            codes.shape[1],
            tiles,
            clip,
            GROUP=group,
            TILES=padded,
            HALVES=form.halves,
            SINGLE=single,
            num_warps=warps_for(padded * group),
            enable_fp_fusion=False,
        )
    return codes, token_range
