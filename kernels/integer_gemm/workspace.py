"""The int32 sums that blocks share when K is split: zero between launches, because the last block leaves them so."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.integer_gemm.operands import Operands
from qtool.kernels.integer_gemm.tilings import Tiling

_SHARED: dict[tuple[torch.device, int], Tensor] = {}
_OUTGROWN: list[Tensor] = []  # captured graphs may still write to them
# K is split only while there are fewer tiles than multiprocessors, so this is enough for up to 256 of them.
LEAST_COUNT = 256 * (128 * 128 + 1)


def shared_sums(operands: Operands, tiling: Tiling, tiles: int) -> Tensor | None:
    """The buffer that `triton_epilogue.finish` asks for; None when no two blocks share a tile."""
    if tiling.split_k == 1:
        return None
    area = tiling.block_m * tiling.block_n
    if not operands.float_sum:
        return _zeroed(tiles * (area + 1), operands.x.device)
    buffer = torch.empty(tiles * (area * tiling.split_k + 1), dtype=torch.float32, device=operands.x.device)
    buffer[-tiles:] = 0  # as int32, the counters
    return buffer


def _zeroed(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros, which the launch has to leave zero. One buffer a stream; launches on one follow."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _SHARED.get(key)
    if held is not None and held.numel() >= count:
        return held
    fresh = torch.zeros(max(count, LEAST_COUNT), dtype=torch.int32, device=device)
    # While a graph is captured nothing runs: the zeros are written by its replays, so nobody else may rely on them.
    if not torch.cuda.is_current_stream_capturing():
        if held is not None:
            _OUTGROWN.append(held)
        _SHARED[key] = fresh
    return fresh
