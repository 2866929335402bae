"""What w4a8_gemm ships, for the compile check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qtool.kernels.compile_check import Expect
from qtool.kernels.integer_gemm.compile_signature import Variant, gemm_cases
from qtool.kernels.w4a8_gemm.triton_kernel import int4_weight_gemm

POINTERS: dict[str, str | None] = {
    "x": "*i8:16",
    "x_scale": "*fp32:16",
    "x_factors": None,
    "x_sums": None,
    "w": "*u8:16",
    "w_scale": "*fp32:16",
    "w_groups": None,
    "zero_point": None,
    "bias": "*bf16:16",
    "y": "*bf16:16",
    "shared": "*i32:16",
}
STRIDES = {
    "x_stride": "i32:16",
    "x_scale_stride": "i32:1",
    "x_factors_stride_m": "i32:1",
    "x_factors_stride_g": "i32:16",
    "w_stride": "i32:16",
    "w_scale_stride": "i32:1",
    "w_groups_stride_n": "i32:1",
    "w_groups_stride_g": "i32:16",
    "zero_stride_n": "i32:1",
    "zero_stride_g": "i32:16",
    "y_stride": "i32:16",
}
PLAIN = {
    "X_INT4": False,
    "X_GROUP": 0,
    "X_SHARED": False,
    "W_GROUP": 0,
    "INTEGER_GROUPS": False,
    "FLOAT_SUM": False,
    "ZERO_IN_LOOP": False,
    "ZERO_GROUP": 0,
}
# The weights go from shared memory to registers, are unpacked there, and stay there.
IN_REGISTERS = Expect(has=("wgmma.s8", "wgmma.rs", "cp.async"), lacks=("mma.s8",), min_blocks=2)
# A sum beside the tile's own takes the registers of a second block at 128 tokens.
ONE_BLOCK = replace(IN_REGISTERS, min_blocks=1)
# What differs from a compiled neighbour in a few operations is compiled for one target.
HOPPER = ("sm_90",)


def variant(name: str, form: str, pointers: dict[str, str | None], constexprs: dict[str, Any], **more: Any) -> Variant:
    """The plain product with these operands and switches beside, or instead."""
    if form == "float":
        pointers = {"shared": "*fp32:16", **pointers}
        constexprs = {"FLOAT_SUM": True, **constexprs}
    return Variant(
        name=name,
        form=form,
        pointers={**POINTERS, **pointers},
        constexprs={**PLAIN, **constexprs},
        **{"sm_90": IN_REGISTERS, **more},
    )


INTEGERS = {"W_GROUP": 128, "INTEGER_GROUPS": True}
VARIANTS = [
    variant("channel", "channel", {}, {}, batches=(16, 32, 64, 128)),
    variant("channel zero", "channel", {"zero_point": "*u8:16", "x_sums": "*i32:16"}, {}, targets=HOPPER),
    variant("integer128", "integer", {"w_groups": "*u8:16"}, INTEGERS, targets=("sm_80", "sm_90", "gfx942")),
    variant("integer64", "integer", {"w_groups": "*u8:16"}, {**INTEGERS, "W_GROUP": 64}, targets=HOPPER),
    variant(
        "integer128 zero",
        "integer",
        {"w_groups": "*u8:16", "zero_point": "*u8:16"},
        {**INTEGERS, "ZERO_IN_LOOP": True, "ZERO_GROUP": 128},
        targets=HOPPER,
    ),
    variant(
        "float128",
        "float",
        {"w_groups": "*fp16:16", "w_scale": None},
        {"W_GROUP": 128},
        batches=(16, 64),
        targets=("sm_80", "sm_90", "gfx942"),
    ),
    variant(
        "float64", "float", {"w_groups": "*fp16:16", "w_scale": None}, {"W_GROUP": 64}, sm_90=ONE_BLOCK, targets=HOPPER
    ),
    variant(
        "token64", "float", {"x_factors": "*fp32:16", "x_scale": None}, {"X_GROUP": 64}, sm_90=ONE_BLOCK, targets=HOPPER
    ),
    variant(
        "smooth integer",
        "integer",
        {"x_factors": "*i32:16"},
        {"X_GROUP": 128, "X_SHARED": True},
        sm_90=ONE_BLOCK,
        targets=HOPPER,
    ),
    variant(
        "smooth float",
        "float",
        {"x_factors": "*fp32:16"},
        {"X_GROUP": 128, "X_SHARED": True},
        sm_90=ONE_BLOCK,
        targets=HOPPER,
    ),
]
CASES = [
    case
    for each in VARIANTS
    for case in gemm_cases("w4a8_gemm", int4_weight_gemm, STRIDES, each, weight_bits=4)
]
