"""Every tile of the table with each kind of group it is for, with and without zero points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.float_gemm import TILE_K, tiling_of, tiling_rows
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
    tiling, target = tiling_of(row), f"sm_{row['capability']}"
    # Fewer than 64 rows of the first operand stay with mma.sync.
    first = tiling.tile_n if tiling.weights_first else tiling.tile_m
    hopper = WGMMA if first >= 64 else AMPERE
    return Case(
        name=f"{target} {tiling.tile_m}x{tiling.tile_n} {form}{' zeros' if zeros else ''} {x}",
        kernel=w4a16_gemm_kernel,
        signature={**SIGNATURE, "x": f"*{x}:16", "y": f"*{x}:16"},
        constexprs={
            "GROUP": group,
            "ZEROS": zeros,
            "BIAS": True,
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
        # Ada runs Ampere's code; one form shows that it compiles there.
        targets=(target, "sm_89") if target == "sm_80" and form == "row" else (target,),
        expect={"sm_80": AMPERE, "sm_89": AMPERE, "sm_90": hopper},
        work=Work(read=tiling.tile_n * TILE_K // 2, products=tiling.tile_m * tiling.tile_n * TILE_K, bits=16),
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
