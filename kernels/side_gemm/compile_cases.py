"""The side kernels' shipped configurations: rank 64, a bfloat16 input, float16 directions as checkpoints have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtool.kernels.compile_check.case import NVIDIA, Case, Expect
from qtool.kernels.side_gemm.configuration import side_configuration
from qtool.kernels.side_gemm.triton_kernel import (
    gather_side_kernel,
    partial_side_kernel,
    remainder_kernel,
    side_add_kernel,
)

RANK = 64
OPTIONS = {"enable_fp_fusion": False}
MMA = Expect(has=("mma.f16", "cp.async"))
MFMA = Expect(has=("mfma.f16",))
PRODUCTS = {**dict.fromkeys(NVIDIA, MMA), "gfx942": MFMA}


def _tiled(name: str, kernel: Any, rows: int, signature: dict[str, str], constexprs: dict[str, Any]) -> Case:
    tile = side_configuration().tile(rows)
    return Case(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={"ROWS": tile.rows, "RANK": RANK, "PADDED": RANK, **constexprs},
        num_warps=tile.warps,
        options=OPTIONS,
        expect=PRODUCTS,
    )


def _partial(rows: int) -> Case:
    signature = {
        "x": "*bf16:16",
        "down": "*fp16:16",
        "partial": "*fp32:16",
        "rows": "i32",
        "x_stride": "i32:16",
        "columns": "i32:16",
        "slice_columns": "i32:16",
    }
    case = _tiled(f"projection m{rows}", partial_side_kernel, rows, signature, {"WIDTH": 128, "TERMS": 1})
    return replace(case, num_warps=side_configuration().projection_warps)


def _quad(rows: int, phase: str, *, group: int = 0) -> Case:
    signature = {
        "x": "*bf16:16",
        "down": "*fp16:16",
        "partial": "*fp32:16",
        "sides": "*fp16:16",
        "signs": "*fp32:16",
        "right": "*bf16:16",
        "codes": "*u8:16",
        "scales": "*fp32:16",
        "sums": "*i32:16",
        "maxima": "*i32:16",
        "rows": "i32",
        "x_stride": "i32:16",
        "columns": "i32:16",
        "slice_columns": "i32:16",
        "slices": "i32",
        "code_columns": "i32:16",
        "groups": "i32",
        "clip": "fp32",
        "shrink": "fp32",
    }
    constexprs = {
        "WIDTH": 128,
        "TERMS": 1,
        "SAME": True,
        "ROTATE": True,
        "SIGNED": True,
        "PHASE": phase,
        "GROUP": group,
        "LARGEST": 7.0,
        "INTEGER": True,
        "HALVES": True,
        "SUMS": False,
    }
    name = f"quad {phase} m{rows}" + (f" g{group}" if group else "")
    case = _tiled(name, remainder_kernel, rows, signature, constexprs)
    # With eight warps of 64 lanes it has too few registers on AMD; few rows have four.
    return case if rows <= 16 else replace(case, targets=NVIDIA)


def _add(rows: int) -> Case:
    tile = side_configuration().tile(rows)
    return Case(
        name=f"add m{rows}",
        kernel=side_add_kernel,
        signature={
            "y": "*bf16:16",
            "side": "*bf16:16",
            "up": "*bf16:16",
            "rows": "i32",
            "columns": "i32:16",
            "y_stride": "i32:16",
        },
        constexprs={
            "ROWS": tile.rows,
            "COLUMNS": side_configuration().output_columns,
            "RANK": RANK,
            "PADDED": RANK,
        },
        options=OPTIONS,
        # The output's columns come first, so that few rows still fill a warp group's tile.
        expect={
            **dict.fromkeys(NVIDIA[:2], Expect(has=("mma.f16",))),
            "sm_90": Expect(has=("wgmma.f16",)),
            "gfx942": MFMA,
        },
    )


CASES = [
    _partial(16),
    _partial(4096),
    Case(
        name="gather m16",
        kernel=gather_side_kernel,
        signature={"partial": "*fp32:16", "sides": "*fp16:16", "rows": "i32", "slices": "i32"},
        constexprs={"ROWS": 16, "RANK": RANK, "PADDED": RANK},
    ),
    _quad(16, "ranges"),
    _quad(16, "ranges", group=128),
    _quad(16, "codes"),
    _quad(4096, "all"),
    _quad(4096, "all", group=128),
    _add(16),
    _add(4096),
]
