"""Every tile of the table with the scales it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect
from qtool.kernels.float_gemm import tiling_rows
from qtool.kernels.float_gemm.compile_case import product_case
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
    x_blocks, w_blocks, w_rows, promote = FORMS[form]
    return product_case(
        row,
        form,
        kernel=fp8_gemm_kernel,
        signature=SIGNATURE,
        constexprs={
            "X_BLOCKS": x_blocks,
            "W_BLOCKS": w_blocks,
            "W_ROWS": w_rows,
            "PROMOTE": promote,
            "WEIGHTS_FIRST": row["weights_first"],
        },
        expect=EXPECT,
        weight_bits=8,
    )


def _cases() -> Iterator[Case]:
    for row in tiling_rows(CONFIGS):
        # Ada's code is the same with and without sums taken out: its compiler puts them back.
        skipped = "fast" if row["capability"] == 89 else ""
        yield from (_case(row, form) for form in row["forms"] if form != skipped)


CASES = list(_cases())
