"""What w4a4_gemm ships, for the compile check."""

from __future__ import annotations

from qtool.kernels.integer_gemm.compile_signature import gemm_cases
from qtool.kernels.w4a8_gemm.compile_cases import HOPPER, ONE_BLOCK, STRIDES, variant
from qtool.kernels.w4a8_gemm.triton_kernel import int4_weight_gemm

SMOOTH = {"X_INT4": True, "X_GROUP": 128, "X_SHARED": True}
VARIANTS = [
    variant("channel", "channel", {"x": "*u8:16"}, {"X_INT4": True}, batches=(16, 64, 128)),
    variant(
        "smooth integer", "integer", {"x": "*u8:16", "x_factors": "*i32:16"}, SMOOTH, sm_90=ONE_BLOCK, targets=HOPPER
    ),
    variant(
        "smooth float", "float", {"x": "*u8:16", "x_factors": "*fp32:16"}, SMOOTH, sm_90=ONE_BLOCK, targets=HOPPER
    ),
]
CASES = [
    case
    for each in VARIANTS
    for case in gemm_cases("w4a4_gemm", int4_weight_gemm, STRIDES, each, weight_bits=4)
]
