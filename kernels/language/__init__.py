"""What our Triton kernels share, above all the operations that Triton's interpreter gets wrong.

Imports triton: only modules that hold jit functions may import this package, and a public function imports those when
it launches. Casts to and from small floats and products of matrices are taken from here, or are written like those
here, so that a kernel computes the same interpreted on a CPU and compiled for a GPU.

    INTERPRETED     a constexpr: TRITON_INTERPRET was set when this package was imported; usable in kernels and outside
    uses_assembly   whether a launch on this device may use inline assembly; pass it as a kernel's `ASM: tl.constexpr`
    widen           bfloat16, float16 or E4M3 to float32, right after the load
    to_bf16, to_e4m3, to_int8     float32 to the small type, to nearest, ties to even, saturating where the type can
    unpack_x16, unpack_e4m3       a byte's two nibbles as two tensors
    dot_int8, dot_e4m3, dot_bf16  acc + a · b with the sum in int32 or float32
"""

from __future__ import annotations

from qtool.kernels.language.casts import to_bf16, to_e4m3, to_int8, widen
from qtool.kernels.language.dots import dot_bf16, dot_e4m3, dot_int8
from qtool.kernels.language.interpreted import INTERPRETED, uses_assembly
from qtool.kernels.language.unpack import unpack_e4m3, unpack_x16

__all__ = [
    "INTERPRETED",
    "dot_bf16",
    "dot_e4m3",
    "dot_int8",
    "to_bf16",
    "to_e4m3",
    "to_int8",
    "unpack_e4m3",
    "unpack_x16",
    "uses_assembly",
    "widen",
]
