"""The launches of the side kernels."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from qtool.kernels.hadamard import HadamardPlan, dense, hadamard_plan
from qtool.kernels.quantize_activation import RowFormat, RowHadamard
from qtool.kernels.quantize_activation.launch import unit_stride
from qtool.kernels.quantize_activation.row_format import PACK_TILE, stored_columns
from qtool.kernels.side_gemm.configuration import side_configuration
from qtool.kernels.side_gemm.triton_kernel import (
    gather_side_kernel,
    partial_side_kernel,
    remainder_kernel,
    side_add_kernel,
)

LEAST_WIDTH = 64
# How many bfloat16 numbers hold one number exactly.
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def launch_side(rows: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """side [M, r] in `dtype`: see `side_rows`."""
    rows, down = unit_stride(rows), down.contiguous()
    count, rank = len(rows), down.shape[1]
    side = torch.empty(count, rank, dtype=dtype, device=rows.device)
    if count:
        partial = _partial(rows, down, PACK_TILE)
        tile = side_configuration().tile(count)
        gather_side_kernel[(-(-count // tile.rows),)](
            partial, side, count, len(partial), ROWS=tile.rows, RANK=rank, PADDED=padded(rank), num_warps=tile.warps
        )
    return side


def _partial(rows: Tensor, down: Tensor, width: int) -> Tensor:
    """x × down over slices of columns: float32 [slices, M, padded rank]."""
    (count, columns), rank = rows.shape, down.shape[1]
    tile = side_configuration().tile(count)
    step = side_configuration().slice_columns(count, columns, width)
    slices = -(-columns // step)
    partial = torch.empty(slices, count, padded(rank), dtype=torch.float32, device=rows.device)
    partial_side_kernel[(-(-count // tile.rows), slices)](
        rows,
        down,
        partial,
        count,
        rows.stride(0),
        columns,
        step,
        ROWS=tile.rows,
        WIDTH=width,
        RANK=rank,
        PADDED=padded(rank),
        TERMS=terms_of(rows, down),
        num_warps=side_configuration().projection_warps,
        enable_fp_fusion=False,
    )
    return partial


def launch_add(y: Tensor, side: Tensor, up: Tensor) -> None:
    """y [M, N] += side × upᵀ in place."""
    rows, columns = y.shape
    if not rows or not columns:
        return
    tile = side_configuration().tile(rows)
    width = side_configuration().output_columns
    side_add_kernel[(-(-columns // width), -(-rows // tile.rows))](
        y,
        side.contiguous(),
        up.contiguous(),
        rows,
        columns,
        y.stride(0),
        ROWS=tile.rows,
        COLUMNS=width,
        RANK=up.shape[1],
        PADDED=padded(up.shape[1]),
        num_warps=4,
        enable_fp_fusion=False,
    )


def launch_quad(
    rows: Tensor,
    directions: Tensor,
    form: RowFormat,
    hadamard: RowHadamard | None,
    dtype: torch.dtype,
    group: int,
    clip: float,
    row_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """side [M, r], codes [M, stored], scale and sums [M, G]: see `project_rows`; group 0 for none."""
    rows, directions = unit_stride(rows), directions.contiguous()
    (count, columns), rank = rows.shape, directions.shape[1]
    groups = -(-columns // group) if group else 1
    device = rows.device
    side = torch.empty(count, rank, dtype=dtype, device=device)
    codes = torch.empty(count, stored_columns(form, columns), dtype=form.dtype, device=device)
    scale = torch.empty(count, groups, dtype=torch.float32, device=device)
    sums = torch.zeros(count, groups, dtype=torch.int32, device=device) if row_sums else None
    if not count:
        return side, codes, scale, sums
    block = 0 if hadamard is None else hadamard.plan.block
    width = max(LEAST_WIDTH, block, group, PACK_TILE if form.halves else 0)
    tile = side_configuration().tile(count)
    step = side_configuration().slice_columns(count, columns, width)
    slices = -(-columns // step)
    signs = None if hadamard is None or hadamard.signs is None else hadamard.signs.to(device, torch.float32)
    partial = _partial(rows, directions, width) if slices > 1 else scale
    maxima = torch.empty(slices, count, dtype=torch.int32, device=device) if slices > 1 and not group else codes
    phases = ["all"] if slices == 1 else ["ranges"] if group else ["ranges", "codes"]
    for phase in phases:
        remainder_kernel[(-(-count // tile.rows), slices)](
            rows,
            directions,
            partial,
            side,
            rows if signs is None else signs,
            rows if hadamard is None else diagonal(hadamard.plan, width, device),
            codes,
            scale,
            scale if sums is None else sums,
            maxima,
            count,
            rows.stride(0),
            columns,
            step,
            slices,
            codes.shape[1],
            groups,
            clip,
            1.0 if hadamard is None else block**-0.5,
            ROWS=tile.rows,
            WIDTH=width,
            RANK=rank,
            PADDED=padded(rank),
            TERMS=terms_of(rows, directions),
            SAME=dtype == directions.dtype,
            ROTATE=hadamard is not None,
            SIGNED=signs is not None,
            PHASE=phase,
            GROUP=group,
            LARGEST=form.largest,
            INTEGER=form.integer,
            HALVES=form.halves,
            SUMS=row_sums,
            num_warps=tile.warps,
            enable_fp_fusion=False,
        )
    return side, codes, scale, sums


def terms_of(rows: Tensor, directions: Tensor) -> int:
    """bfloat16 terms that hold x exactly; 0 where x and the directions have one 16-bit type."""
    return 0 if rows.dtype == directions.dtype else TERMS[rows.dtype]


def padded(rank: int) -> int:
    """The rank as tiles have it."""
    return max(16, 1 << (rank - 1).bit_length())


@lru_cache(maxsize=64)
def diagonal(plan: HadamardPlan, width: int, device: torch.device) -> Tensor:
    """Blocks of the rotation's ±1 on the diagonal of [width, width], bfloat16."""
    signs = dense(hadamard_plan(width, block=plan.block)).sign()
    return signs.to(device, torch.bfloat16)
