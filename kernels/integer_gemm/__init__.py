"""What w4a8_gemm, w8a8_gemm and w4a4_gemm share: operands, their checks, tilings, the reference, and the epilogue.

    y[m, n] = Σ_s w_s[n] · x_s[m] · Σ_j∈s (w[n, j] − z_s[n]) · x[m, j] + bias[n]

for segments s of K (one segment, or groups of a multiple of 64 columns). All sums inside a segment are exact int32, and
so is the whole sum when every scale of a segment is an integer (`Operands.float_sum` is false): such a product equals
the reference bit for bit, whatever the tiling. A float sum goes over the segments of a block in order.
"""

from __future__ import annotations

from qtool.kernels.integer_gemm.operands import Operands
from qtool.kernels.integer_gemm.second_level import second_level_scales
from qtool.kernels.integer_gemm.tilings import Tiling, choose_tiling

__all__ = [
    "Operands",
    "Tiling",
    "choose_tiling",
    "second_level_scales",
]
