"""Memory in which the parts of a K that was cut leave their sums and count their arrivals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.float_gemm.tilings import Tiling

SMALLEST = 4096


class Workspace(NamedTuple):
    """`sums`: float32 [tiles × parts × tile_elements], not initialized; `arrivals`: int32, zero, at least [tiles]."""

    sums: Tensor
    arrivals: Tensor


_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}
_OUTGROWN: list[Tensor] = []  # captured graphs may still count in them


def workspace_for(device: torch.device, tiles: int, parts: int, tile_elements: int) -> Workspace:
    """A workspace for one launch on the current stream.

    The counters live on and are zero between launches, since the last part to arrive resets them. Each stream has its
    own; graphs captured on one stream must not be replayed at once.
    """
    sums = torch.empty(tiles * parts * tile_elements, dtype=torch.float32, device=device)
    return Workspace(sums, _arrivals(device, tiles))


def workspace_of_product(device: torch.device, m: int, n: int, tiling: Tiling) -> tuple[int, Workspace]:
    """How many tiles a product [m, n] has, and the workspace for them (not a real one when K is not cut)."""
    tiles = -(-n // tiling.tile_n) * -(-m // tiling.tile_m)
    elements = tiling.tile_n * tiling.tile_m if tiling.parts > 1 else 1
    return tiles, workspace_for(device, tiles if tiling.parts > 1 else 1, tiling.parts, elements)


def _arrivals(device: torch.device, tiles: int) -> Tensor:
    if device.type != "cuda":
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _ARRIVALS.get(key)
    if held is not None and held.numel() >= tiles:
        return held
    fresh = torch.zeros(max(tiles, SMALLEST), dtype=torch.int32, device=device)
    # A graph's capture writes no zeros, only its replays do: nobody else may rely on these.
    if not torch.cuda.is_current_stream_capturing():
        if held is not None:
            _OUTGROWN.append(held)
        _ARRIVALS[key] = fresh
    return fresh
