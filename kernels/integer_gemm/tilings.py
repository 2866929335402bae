"""How a product is cut into blocks: from the kernel's configs.json, and how many blocks share one tile's K."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qtool.kernels.integer_gemm.operands import Operands

K_TILE = 128
LEAST_K_TILES = 4  # of one block: fewer do not fill its pipeline
BLOCKS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """One block computes block_n × block_m outputs over 1 / split_k of K."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1


def choose_tiling(op: str, operands: Operands, device: torch.device) -> Tiling:
    """The tiling of one product.

    Args:
        op: the kernel folder whose configs.json has rows of (target, form, [largest_m, n, k,] block_m, block_n,
            num_warps, num_stages, [split_k]); the first row that fits is taken, so narrower rows stand first.
        operands: their `form` and shape.
        device: theirs.
    """
    return tiling_of(row_for(op, target_of(device), operands.form, operands.shape), operands.shape, device)


def tiling_of(row: Mapping[str, Any], shape: tuple[int, int, int], device: torch.device) -> Tiling:
    """What a row of configs.json means for a product (M, N, K): its sizes, and its split of K or one that fits."""
    split = row.get("split_k") or _split(row, shape, _multiprocessors(device))
    sizes = {name: row[name] for name in ("block_m", "block_n", "num_warps", "num_stages")}
    return Tiling(**sizes, split_k=split)


def row_for(op: str, target: str, form: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """The row of an operation's configs.json for a target, form and (M, N, K)."""
    m, n, k = shape
    wanted = {"target": target, "form": form, "n": n, "k": k}
    return next(
        row
        for row in _rows(op)
        if m <= row.get("largest_m", m) and all(row.get(name, value) == value for name, value in wanted.items())
    )


def target_of(device: torch.device) -> str:
    """The rows a device takes: "sm_90", "sm_80" (163 KB of shared memory a block), "sm_89" (99 KB) or "gfx942"."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if (9, 0) <= capability < (12, 0):
        return "sm_90"
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_89"


def _split(row: Mapping[str, Any], shape: tuple[int, int, int], multiprocessors: int) -> int:
    """Enough blocks to fill the GPU, each with enough K tiles, none of them empty."""
    m, n, k = shape
    tiles = -(-m // row["block_m"]) * -(-n // row["block_n"])
    k_tiles = -(-k // K_TILE)
    wanted = min(multiprocessors * BLOCKS_PER_MULTIPROCESSOR // tiles, k_tiles // LEAST_K_TILES)
    each = -(-k_tiles // max(wanted, 1))
    return -(-k_tiles // max(each, 1)) or 1


@cache
def _rows(op: str) -> list[dict[str, Any]]:
    path = Path(__file__).parent.parent / op / "configs.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
