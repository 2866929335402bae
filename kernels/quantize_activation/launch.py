"""The launch of the row kernel: its tile, its switches, its outputs."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qtool.kernels.quantize_activation.row_format import PACK_TILE, ROW_FORMATS, RowFormat, stored_columns
from qtool.kernels.quantize_activation.sources import (
    Factors,
    RmsNorm,
    RowHadamard,
    SiluTimes,
    Source,
    factor_matrices,
    factors_of,
)
from qtool.kernels.quantize_activation.triton_kernel import quantize_rows_kernel


def launch_rows(
    rows: Tensor,
    form: RowFormat | None,
    source: Source,
    hadamard: RowHadamard | None,
    group: int,
    clip: float,
    row_sums: bool,
    keep: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes [M, stored], scale [M, G], sums and values of rows [M, K]; arguments as `quantize_rows`, group 0 for none.

    Without a format only the values are made; codes and scale are then without elements.
    """
    rows = unit_stride(rows)
    count, columns = rows.shape
    groups = -(-columns // group) if group else 1
    made = ROW_FORMATS["int8"] if form is None else form
    code_rows = 0 if form is None else count
    codes = torch.empty(code_rows, stored_columns(made, columns), dtype=made.dtype, device=rows.device)
    scale = torch.empty(code_rows, groups, dtype=torch.float32, device=rows.device)
    sums = torch.empty(count, groups, dtype=torch.int32, device=rows.device) if row_sums else None
    kept = None if keep is None else torch.empty(count, columns, dtype=keep, device=rows.device)
    if not count:
        return codes, scale, sums, kept
    norm = source if isinstance(source, RmsNorm) else None
    up = unit_stride(source.up) if isinstance(source, SiluTimes) else rows
    residual = norm.residual if norm is not None else None
    if residual is not None and residual.stride(1) != 1:
        raise ValueError("a residual's columns must lie side by side")
    signs = None if hadamard is None or hadamard.signs is None else hadamard.signs.to(rows.device, torch.float32)
    tile = tile_of(columns, group, made.halves, None if hadamard is None else factors_of(hadamard.plan))
    left, right = (rows, rows) if hadamard is None else factor_matrices(hadamard.plan, rows.device)
    quantize_rows_kernel[(count,)](
        rows,
        up,
        rows if norm is None or norm.gain is None else norm.gain,
        rows if residual is None else residual,
        rows if signs is None else signs,
        left,
        right,
        codes,
        scale,
        scale if sums is None else sums,
        rows if kept is None else kept,
        rows.stride(0),
        up.stride(0),
        0 if residual is None else residual.stride(0),
        columns,
        codes.shape[1],
        groups,
        0.0 if norm is None else norm.epsilon,
        clip,
        1.0 if hadamard is None else hadamard.plan.block**-0.5,
        ROWS=tile.rows,
        WIDTH=tile.columns,
        SOURCE="norm" if norm is not None else "silu" if isinstance(source, SiluTimes) else "plain",
        GAIN=norm is not None and norm.gain is not None,
        RESIDUAL=residual is not None,
        HADAMARD="none" if hadamard is None else "whole" if tile.left else "blocks",
        SIGNED=signs is not None,
        TERMS=1 if source is None and rows.dtype == torch.bfloat16 else 3,
        GROUP=group,
        LARGEST=0.0 if form is None else form.largest,
        INTEGER=made.integer,
        HALVES=made.halves,
        SUMS=row_sums,
        KEPT=kept is not None,
        num_warps=warps_for(tile.rows * tile.columns),
        enable_fp_fusion=False,
    )
    return codes, scale, sums, kept


def tile_of(columns: int, group: int, halves: bool, factors: Factors | None) -> Factors:
    """The tile of a row: the rotation's own, or PACK_TILE columns; never smaller than a group or a packed tile."""
    least = max(group, PACK_TILE if halves else 1)
    if factors is None:
        rows = -(-max(columns, least) // PACK_TILE)
        return Factors(rows=1 << (rows - 1).bit_length(), columns=PACK_TILE, left=0)
    if factors.left or factors.rows * factors.columns >= least:
        return factors
    return Factors(rows=-(-least // factors.columns), columns=factors.columns, left=0)


def warps_for(elements: int) -> int:
    """Warps of a program whose tile has this many elements."""
    return next(warps for most, warps in _warps() if elements <= most)


@lru_cache(maxsize=1)
def _warps() -> tuple[tuple[int, int], ...]:
    table = json.loads((Path(__file__).parent / "configs.json").read_text())
    return tuple((int(most), int(warps)) for most, warps in table["warps"])


def unit_stride(x: Tensor) -> Tensor:
    """A matrix with the columns of a row side by side: itself, or a copy."""
    return x if x.stride(1) == 1 else x.contiguous()
