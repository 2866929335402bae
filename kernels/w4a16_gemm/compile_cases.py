"""Every tile of the table with each kind of group it is for, with and without zero points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect
from qtool.kernels.float_gemm import tiling_rows
from qtool.kernels.float_gemm.compile_case import product_case
from qtool.kernels.w4a16_gemm import CONFIGS
from qtool.kernels.w4a16_gemm.triton_kernel import w4a16_gemm_kernel

SIGNATURE = {
    "x": "*bf16:16",
    "w": "*u8:16",
    "w_scale": "*fp16:16",
    "w_zero": "*u8:16",
    "bias": "*bf16:16",
    "y": "*bf16:16",
    "sums": "*fp32:16",
    "arrivals": "*i32:16",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
    "groups": "i32",
    "x_row": "i32:16",
    "w_row": "i32:16",
    "w_scale_row": "i32:1",
    "w_scale_group": "i32:16",
    "w_zero_row": "i32:1",
    "w_zero_group": "i32:16",
    "y_row": "i32:16",
}
# Group size and zero points, by the table's name for the form.
FORMS = {
    "row": ((0, False),),
    "group": ((128, False), (128, True)),
    "group64": ((64, False), (64, True)),
    "group32": ((32, False), (32, True)),
}
AMPERE = Expect(has=("mma.f16", "cp.async"))
WGMMA = Expect(has=("wgmma.f16", "cp.async"), lacks=("mma.f16",))


def _case(row: Mapping[str, Any], form: str, group: int, zeros: bool, x: str) -> Case:
    # Fewer than 64 rows of the first operand stay with mma.sync.
    first = row["tile_n"] if row["weights_first"] else row["tile_m"]
    hopper = WGMMA if first >= 64 else AMPERE
    return product_case(
        row,
        f"{form}{' zeros' if zeros else ''} {x}",
        kernel=w4a16_gemm_kernel,
        signature={**SIGNATURE, "x": f"*{x}:16", "y": f"*{x}:16"},
        constexprs={"GROUP": group, "ZEROS": zeros, "WEIGHTS_FIRST": row["weights_first"]},
        expect={"sm_80": AMPERE, "sm_89": AMPERE, "sm_90": hopper},
        weight_bits=4,
        bits=16,
        # Ada runs Ampere's code; one form shows that it compiles there.
        more_targets=("sm_89",) if row["capability"] == 80 and form == "row" else (),
    )


def _cases() -> Iterator[Case]:
    for row in tiling_rows(CONFIGS):
        for form in row["forms"]:
            for group, zeros in FORMS[form]:
                if not zeros or row["up_to_m"] in (16, None):
                    yield _case(row, form, group, zeros, "bf16")
        if row["up_to_m"] == 16:
            yield _case(row, "group", 128, True, "fp16")


CASES = list(_cases())
