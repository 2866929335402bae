"""The int32 sums that blocks share when K is split: zero between launches, because the last block leaves them so."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import Operands
from qtool.kernels.integer_gemm.tilings import Tiling
from qtool.kernels.stream_zeros import stream_zeros

# K is split only while there are fewer tiles than multiprocessors, so this is enough for up to 256 of them.
LEAST_COUNT = 256 * (128 * 128 + 1)


def shared_sums(operands: Operands, tiling: Tiling, tiles: int) -> Tensor | None:
    """The buffer that `triton_epilogue.finish` asks for; None when no two blocks share a tile."""
    if tiling.split_k == 1:
        return None
    area = tiling.block_m * tiling.block_n
    if not operands.float_sum:
        return stream_zeros(tiles * (area + 1), operands.x.device, least=LEAST_COUNT)
    buffer = torch.empty(tiles * (area * tiling.split_k + 1), dtype=torch.float32, device=operands.x.device)
    buffer[-tiles:] = 0  # as int32, the counters
    return buffer

