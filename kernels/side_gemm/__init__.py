"""A skinny product beside the low-bit one: y += side × upᵀ with side = x × down, r columns wide (8 … 128).

QUAD's leading directions and low-rank compensation both end here. Operands are stored in 16 bits and summed in
float32. Linears that read one input share `down`, so the first product is made once for them.
"""

from __future__ import annotations

from qtool.kernels.side_gemm.reference import side_columns, side_gemm, side_output

__all__ = ["side_columns", "side_gemm", "side_output"]
