"""Every tile of the table with one scale a row (two sums) and with groups of 128; the smallest with all the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.kernels.compile_check.case import Case, Expect, Work
from qtool.kernels.float_gemm import TILE_K, tiling_of, tiling_rows
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
    tiling, target = tiling_of(row), f"sm_{row['capability']}"
    group, two_sums = FORMS[form]
    return Case(
        name=f"{target} {tiling.tile_m}x{tiling.tile_n} {form}",
        kernel=w4afp8_gemm_kernel,
        signature=SIGNATURE,
        constexprs={
            "GROUP": group,
            "BIAS": True,
            "TWO_SUMS": two_sums,
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
        work=Work(read=tiling.tile_n * TILE_K // 2, products=tiling.tile_m * tiling.tile_n * TILE_K),
    )


def _cases() -> Iterator[Case]:
    for row in tiling_rows(CONFIGS):
        smallest = row["capability"] == 90 and row["up_to_m"] == 16
        yield from (_case(row, form) for form in (FORMS if smallest else ("row", "g128")))


CASES = list(_cases())
