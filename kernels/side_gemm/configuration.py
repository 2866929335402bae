"""Tile choices of the side kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class SideTile:
    """Attributes:
    rows: of one program.
    warps: of one program.
    """

    rows: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class SideConfiguration:
    """Attributes:
    programs: what a launch aims at.
    projection_warps: of one program of the skinny projection.
    tiles: by the most rows they are for.
    output_columns: of one program that adds a side product to an output.
    """

    programs: int
    projection_warps: int
    tiles: tuple[tuple[int, SideTile], ...]
    output_columns: int

    def tile(self, rows: int) -> SideTile:
        """The tile for this many rows."""
        return next(tile for most, tile in self.tiles if rows <= most)

    def slice_columns(self, rows: int, columns: int, width: int) -> int:
        """Columns of one slice, whole tiles of `width`: as many slices as bring the launch to `programs`."""
        row_tiles = -(-rows // self.tile(rows).rows)
        column_tiles = -(-columns // width)
        slices = max(1, min(column_tiles, self.programs // row_tiles))
        return -(-column_tiles // slices) * width


@lru_cache(maxsize=1)
def side_configuration() -> SideConfiguration:
    """The committed choices."""
    table = json.loads((Path(__file__).parent / "configs.json").read_text())
    tiles = tuple((line["most"], SideTile(rows=line["rows"], warps=line["warps"])) for line in table["tiles"])
    return SideConfiguration(
        programs=table["programs"],
        projection_warps=table["projection_warps"],
        tiles=tiles,
        output_columns=table["output_columns"],
    )
