"""Memory in which the parts of a K that was cut leave their sums and count their arrivals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.kernels.float_gemm.tilings import Tiling
from qtool.kernels.stream_zeros import stream_zeros

SMALLEST = 4096


class Workspace(NamedTuple):
    """`sums`: float32 [tiles × parts × tile_elements], not initialized; `arrivals`: int32, zero, at least [tiles]."""

    sums: Tensor
    arrivals: Tensor


def workspace_for(device: torch.device, tiles: int, parts: int, tile_elements: int) -> Workspace:
    """A workspace for one launch on the current stream.

    The counters are zero between launches, since the last part to arrive resets them.
    """
    sums = torch.empty(tiles * parts * tile_elements, dtype=torch.float32, device=device)
    return Workspace(sums, stream_zeros(tiles, device, least=SMALLEST))


def workspace_of_product(device: torch.device, m: int, n: int, tiling: Tiling) -> tuple[int, Workspace]:
    """How many tiles a product [m, n] has, and the workspace for them (not a real one when K is not cut)."""
    tiles = -(-n // tiling.tile_n) * -(-m // tiling.tile_m)
    elements = tiling.tile_n * tiling.tile_m if tiling.parts > 1 else 1
    return tiles, workspace_for(device, tiles if tiling.parts > 1 else 1, tiling.parts, elements)

