"""Every tile of the table with the scales it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.float_gemm import TILE_K, tiling_of, tiling_rows
from qtool.kernels.fp8_gemm import CONFIGS
from qtool.kernels.fp8_gemm.triton_kernel import fp8_gemm_kernel

SIGNATURE = {
    "x": "*fp8e4nv:16",
    "x_scale": "*fp32:16",
    "w": "*fp8e4nv:16",
    "w_scale": "*fp32:16",
    "bias": "*bf16:16",
    "y": "*bf16:16",
    "sums": "*fp32:16",
    "arrivals": "*i32:16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "x_row": "i32:16",
    "x_scale_row": "i32",
    "x_scale_block": "i32",
    "w_row": "i32:16",
    "w_scale_row": "i32",
    "w_scale_block": "i32",
    "y_row": "i32:16",
}
# The scales of each form: blocks of activations, blocks of weights, rows of weights in one, sums taken out.
ROW, FAST = (False, False, 1, True), (False, False, 1, False)
BLOCK = (True, True, 128, True)
FORMS = {"row": ROW, "fast": FAST, "block": BLOCK}
EXPECT = {
    "sm_89": Expect(has=("mma.f8", "cp.async"), lacks=("mma.f16",)),
    "sm_90": Expect(has=("wgmma.f8", "cp.async"), lacks=("mma.f8", "mma.f16")),
}


def _case(row: Mapping[str, Any], form: str) -> Case:
    tiling, target = tiling_of(row), f"sm_{row['capability']}"
    x_blocks, w_blocks, w_rows, promote = FORMS[form]
    return Case(
        name=f"{target} {tiling.tile_m}x{tiling.tile_n} {form}",
        kernel=fp8_gemm_kernel,
        signature=SIGNATURE,
        constexprs={
            "X_BLOCKS": x_blocks,
            "W_BLOCKS": w_blocks,
            "W_ROWS": w_rows,
            "BIAS": True,
            "PROMOTE": promote,
            "WEIGHTS_FIRST": tiling.weights_first,
            "WHOLE_K": True,
            # Few tokens make few tiles: their K is cut.
            "PARTS": 2 if tiling.tile_m <= 32 else 1,
            "BM": tiling.tile_m,
            "BN": tiling.tile_n,
            "BK": TILE_K,
        },
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        targets=(target,),
        expect=EXPECT,
        work=Work(read=tiling.tile_n * TILE_K, products=tiling.tile_m * tiling.tile_n * TILE_K),
    )


def _cases() -> Iterator[Case]:
    for row in tiling_rows(CONFIGS):
        # Ada's code is the same with and without sums taken out: its compiler puts them back.
        skipped = "fast" if row["capability"] == 89 else ""
        yield from (_case(row, form) for form in row["forms"] if form != skipped)


CASES = list(_cases())
