"""Tile choices of the range kernel, by the length of the longest request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RangesConfiguration:
    """Attributes:
    rows: tokens of one step.
    chunk: tokens of one program.
    warps: of one program.
    """

    rows: int
    chunk: int
    warps: int


def ranges_configuration(longest: int) -> RangesConfiguration:
    """The configuration for requests of up to this many rows."""
    return next(config for most, config in _table() if longest <= most)


@lru_cache(maxsize=1)
def _table() -> tuple[tuple[int, RangesConfiguration], ...]:
    lines = json.loads((Path(__file__).parent / "configs.json").read_text())["ranges"]
    return tuple(
        (line["longest"], RangesConfiguration(rows=line["rows"], chunk=line["chunk"], warps=line["warps"]))
        for line in lines
    )
