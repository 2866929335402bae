"""Every tile of the table with one scale a row (two sums) and with groups of 128; the smallest with all the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect
from qtool.kernels.float_gemm import tiling_rows
from qtool.kernels.float_gemm.compile_case import product_case
from qtool.kernels.w4afp8_gemm import CONFIGS
from qtool.kernels.w4afp8_gemm.triton_kernel import w4afp8_gemm_kernel

SIGNATURE = {
    "x": "*fp8e4nv:16",
    "x_scale": "*fp32:16",
    "w": "*u8:16",
    "w_scale": "*fp16:16",
    "bias": "*bf16:16",
    "y": "*bf16:16",
    "sums": "*fp32:16",
    "arrivals": "*i32:16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "groups": "i32",
    "x_row": "i32:16",
    "x_scale_row": "i32:1",
    "w_row": "i32:16",
    "w_scale_row": "i32:1",
    "w_scale_group": "i32:16",
    "y_row": "i32:16",
}
# Group size and two sums, by name.
FORMS = {"row": (0, True), "promoted": (0, False), "g128": (128, False), "g64": (64, False), "g32": (32, False)}
EXPECT = {
    "sm_89": Expect(has=("mma.f8", "cp.async"), lacks=("mma.f16",), at_most={"prmt": 8}),
    # Weights as the operand from registers, and masks in place of every exchange of bytes.
    "sm_90": Expect(has=("wgmma.f8", "wgmma.rs", "cp.async"), lacks=("mma.f8", "mma.f16"), at_most={"prmt": 8}),
}


def _case(row: Mapping[str, Any], form: str) -> Case:
    group, two_sums = FORMS[form]
    return product_case(
        row,
        form,
        kernel=w4afp8_gemm_kernel,
        signature=SIGNATURE,
        constexprs={"GROUP": group, "TWO_SUMS": two_sums},
        expect=EXPECT,
        weight_bits=4,
    )


def _cases() -> Iterator[Case]:
    for row in tiling_rows(CONFIGS):
        smallest = row["capability"] == 90 and row["up_to_m"] == 16
        yield from (_case(row, form) for form in (FORMS if smallest else ("row", "g128")))


CASES = list(_cases())
