"""Runtime Smooth's shipped configurations, for 4096 columns in tiles of 128."""

from __future__ import annotations

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.quantize_activation.launch import warps_for
from qtool.kernels.runtime_smooth.configuration import ranges_configuration
from qtool.kernels.runtime_smooth.triton_kernel import (
    smoothed_codes_kernel,
    tile_ranges_kernel,
    token_levels_kernel,
)

COLUMNS, TILE = 4096, 128
TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")
OPTIONS = {"enable_fp_fusion": False}
ONE_ATOMIC = dict.fromkeys(TARGETS[:3], Expect(has=("red.global",), at_most={"red.global": 1}, min_blocks=6))


def _ranges(longest: int) -> Case:
    config = ranges_configuration(longest)
    return Case(
        name=f"ranges up to {longest} rows",
        kernel=tile_ranges_kernel,
        signature={
            "x": "*bf16:16",
            "levels": "*fp32:16",
            "starts": "*i32:16",
            "ranges": "*i32:16",
            "x_stride": "i32:16",
            "tiles": "i32",
            "chunk": "i32:16",
        },
        constexprs={"GROUP": TILE, "ROWS": config.rows, "LEVEL": True},
        num_warps=config.warps,
        options=OPTIONS,
        expect=ONE_ATOMIC,
        work=Work(read=config.chunk * TILE * 2),
    )


def _codes(name: str, *, halves: bool, single: bool) -> Case:
    return Case(
        name=name,
        kernel=smoothed_codes_kernel,
        signature={
            "x": "*bf16:16",
            "factors": "*fp32:16",
            "request": "*i32:16",
            "codes": "*u8:16" if halves else "*i8:16",
            "token_range": "*fp32:16",
            "x_stride": "i32:16",
            "columns": "i32:16",
            "code_columns": "i32:16",
            "tiles": "i32:16",
            "clip": "fp32",
        },
        constexprs={"GROUP": TILE, "TILES": COLUMNS // TILE, "HALVES": halves, "SINGLE": single},
        num_warps=warps_for(COLUMNS),
        num_stages=1,
        options=OPTIONS,
        expect=dict.fromkeys(TARGETS, Expect(max_convert_layout=4, min_blocks=4)),
        work=Work(read=COLUMNS * 3),
    )


CASES = [
    Case(
        name="levels 4096",
        kernel=token_levels_kernel,
        signature={"x": "*bf16:16", "levels": "*fp32:16", "x_stride": "i32:16", "columns": "i32:16"},
        constexprs={"BLOCK": COLUMNS},
        num_warps=warps_for(COLUMNS),
        options=OPTIONS,
        work=Work(read=COLUMNS * 2),
    ),
    _ranges(16),
    _ranges(4096),
    _codes("codes 4096", halves=False, single=False),
    _codes("codes 4096 halves", halves=True, single=False),
    _codes("codes 4096 single tokens", halves=True, single=True),
]
