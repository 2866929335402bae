"""What w8a8_gemm ships, for the compile check."""

from __future__ import annotations

from qtool.kernels.integer_gemm.compile_signature import Variant, gemm_cases
from qtool.kernels.w8a8_gemm.triton_kernel import int8_gemm

POINTERS = {
    "x": "*i8:16",
    "x_scale": "*fp32:16",
    "w": "*i8:16",
    "w_scale": "*fp32:16",
    "bias": "*bf16:16",
    "y": "*bf16:16",
    "shared": "*i32:16",
}
STRIDES = {
    "x_stride": "i32:16",
    "x_scale_stride": "i32:1",
    "w_stride": "i32:16",
    "w_scale_stride": "i32:1",
    "y_stride": "i32:16",
}
CHANNEL = Variant(name="channel", form="channel", pointers=POINTERS, batches=(16, 64, 128))
CASES = gemm_cases("w8a8_gemm", int8_gemm, STRIDES, CHANNEL, weight_bits=8)
