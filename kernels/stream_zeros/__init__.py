"""int32 zeros that launches on one stream share: each leaves them zero for the next.

Blocks that divide a sum count their arrivals in them, or add into them; the last to arrive writes the zeros back.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stream_zeros"]

_HELD: dict[tuple[torch.device, int], Tensor] = {}
_OUTGROWN: list[Tensor] = []  # captured graphs may still write to them


def stream_zeros(count: int, device: torch.device, *, least: int) -> Tensor:
    """At least `count` int32 zeros on the current stream of a device, which the launch has to leave zero.

    Graphs captured on one stream must not be replayed at once.

    Args:
        count: wanted now.
        device: on any but a GPU the zeros are new.
        least: made at once, so that later launches find enough.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _HELD.get(key)
    if held is not None and held.numel() >= count:
        return held
    fresh = torch.zeros(max(count, least), dtype=torch.int32, device=device)
    # While a graph is captured nothing runs: the zeros are written by its replays, so nobody else may rely on them.
    if not torch.cuda.is_current_stream_capturing():
        if held is not None:
            _OUTGROWN.append(held)
        _HELD[key] = fresh
    return fresh
