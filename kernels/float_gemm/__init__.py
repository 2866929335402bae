"""What fp8_gemm, w4afp8_gemm and w4a16_gemm share: checks, scales of groups, and how a product is cut into blocks.

A product [M, K] × [N, K] becomes ceil(N / tile_n) × ceil(M / tile_m) tiles. Few tiles leave multiprocessors idle, so K
is cut too; each part leaves its sum in a workspace and the last to arrive adds them in the order of K, whatever the
order of arrival: the same operands give the same bits in every run.
"""

from __future__ import annotations

from qtool.kernels.float_gemm.group_scales import GroupScales, group_scales, spread
from qtool.kernels.float_gemm.operands import check_matrix, check_product
from qtool.kernels.float_gemm.tilings import TILE_K, Tiling, choose_tiling, tiling_rows
from qtool.kernels.float_gemm.workspace import workspace_of_product

__all__ = [
    "TILE_K",
    "GroupScales",
    "Tiling",
    "check_matrix",
    "check_product",
    "choose_tiling",
    "group_scales",
    "spread",
    "tiling_rows",
    "workspace_of_product",
]
