"""A skinny product beside the low-bit one: y += side × upᵀ with side = x × down, r columns wide (8 … 128).

QUAD's leading directions and low-rank compensation both end here. Operands are stored in 16 bits and summed in
float32. Linears that read one input share `down`, so the first product is made once for them.

`side_columns`, `side_output` and `side_gemm` are the reference arithmetic. On stored tensors: `side_rows` is the first
product, `add_side_output` the second, and `project_rows` is QUAD's whole input: the side, what it leaves, rotated and
quantized.
"""

from __future__ import annotations

from qtool.kernels.side_gemm.products import add_side_output, side_rows
from qtool.kernels.side_gemm.quad_input import ProjectedRows, project_rows
from qtool.kernels.side_gemm.reference import side_columns, side_gemm, side_output

__all__ = [
    "ProjectedRows",
    "add_side_output",
    "project_rows",
    "side_columns",
    "side_gemm",
    "side_output",
    "side_rows",
]
