"""The tile of a product, out of a kernel's `configs.json`, and into how many parts its K is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

TILE_K = 128
AMPERE, ADA, HOPPER = 80, 89, 90
# What the interpreter pretends to run on: it has no multiprocessors, and the cut of K is worth testing.
H200_PROCESSORS = 132
# A part of fewer tiles along K spends its time filling the pipeline.
LEAST_TILES_A_PART = 4


@dataclass(frozen=True)
class Tiling:
    """The shape of one launch.

    Args:
        tile_m, tile_n: rows of activations and of weights a block multiplies.
        warps, stages: of the block and its pipeline.
        parts: programs that share one tile's K.
        weights_first: the product is W · Xᵀ (wgmma from 64 rows of weights on), else X · Wᵀ.
    """

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    parts: int = 1
    weights_first: bool = True


def choose_tiling(configs: Path, form: str, device: torch.device, m: int, n: int, k: int) -> Tiling:
    """The tiling of a product [m, k] × [n, k].

    Args:
        configs: rows with `forms`, `capability` (the least, as 10 × major + minor), `up_to_m` (null: any), a Tiling's
            fields but for `parts`, and `blocks` (resident a multiprocessor, which the cut of K aims at). The first
            row that fits is taken, so they stand by falling capability and rising M.
        form: the kernel's name for its kind of scales.

    Raises:
        LookupError: when no row fits.
    """
    capability = capability_of(device)
    for row in tiling_rows(configs):
        fits = form in row["forms"] and row["capability"] <= capability
        if fits and (row["up_to_m"] is None or m <= row["up_to_m"]):
            return tiling_for(row, device, m, n, k)
    raise LookupError(f"{configs.parent.name}/{configs.name} has no tile for {form}, M = {m}, capability {capability}")


def tiling_for(row: Mapping[str, Any], device: torch.device, m: int, n: int, k: int) -> Tiling:
    """What a row of a table means for a product [m, k] × [n, k]: its tile, and the cut of K."""
    tiles = -(-m // row["tile_m"]) * -(-n // row["tile_n"])
    return replace(tiling_of(row), parts=_parts(tiles, -(-k // TILE_K), row["blocks"] * processors(device)))


def _parts(tiles: int, k_tiles: int, blocks: int) -> int:
    return max(1, min(blocks // max(tiles, 1), k_tiles // LEAST_TILES_A_PART))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H200's for the interpreter."""
    if device.type != "cuda":
        return H200_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def capability_of(device: torch.device) -> int:
    """10 × major + minor, which picks the rows of a table; Hopper's for the interpreter.

    AMD's GPUs, and NVIDIA's from 12.0 on, have too little shared memory for Hopper's rows: they take older ones.
    """
    if device.type != "cuda":
        return HOPPER
    if torch.version.hip is not None:
        return AMPERE
    major, minor = torch.cuda.get_device_capability(device)
    return ADA if major >= 12 else 10 * major + minor


def tiling_of(row: Mapping[str, Any]) -> Tiling:
    """The tile a row of a table names, with an uncut K."""
    return Tiling(**{name: row[name] for name in ("tile_m", "tile_n", "warps", "stages", "weights_first")})


@cache
def tiling_rows(configs: Path) -> tuple[Mapping[str, Any], ...]:
    """The rows of a table; `choose_tiling` says what they hold."""
    return tuple(json.loads(configs.read_text(encoding="utf-8")))
