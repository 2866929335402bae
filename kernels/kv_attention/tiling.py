"""How a sequence is cut for decode attention, out of `configs.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qtool.kernels.float_gemm.tilings import capability_of
from qtool.kernels.quantize_kv.cache import KVCache

CONFIGS = Path(__file__).parent / "configs.json"


@dataclass(frozen=True)
class DecodeTiling:
    """The shape of one launch. All of it but `queries` says where a sequence is cut, and so what its last bits are.

    Args:
        tokens: of a tile.
        least_tiles: of a part; shorter sequences have one part.
        most_parts: of a sequence; longer parts beyond.
        warps, stages: of the block and its pipeline.
        queries: heads of queries in a block, a power of two.
    """

    tokens: int
    least_tiles: int
    most_parts: int
    warps: int
    stages: int
    queries: int

    def parts(self, longest: int) -> int:
        """Parts that a sequence of up to `longest` tokens has at most."""
        return max(1, min(self.most_parts, -(-longest // (self.tokens * self.least_tiles))))


def decode_tiling(cache_: KVCache, shared: int, dtype: torch.dtype) -> DecodeTiling:
    """The tiling for a model on a device. No length and no batch has a say, so that they change no bits.

    Args:
        cache_: a layer's.
        shared: query heads a head of keys.
        dtype: of the queries.

    Raises:
        LookupError: when no row fits.
    """
    groups = any(stored.scale.shape[-1] > 1 for stored in (cache_.keys, cache_.values))
    capability = capability_of(cache_.keys.codes.device)
    return tiling_of(capability, cache_.head_dim, shared, groups=groups, sixteen_bits=dtype.itemsize == 2)


def tiling_of(capability: int, head_dim: int, shared: int, *, groups: bool, sixteen_bits: bool) -> DecodeTiling:
    """The first row of the table that fits.

    Args:
        capability: 10 × major + minor.
        head_dim: channels of a head.
        shared: query heads a head of keys.
        groups: channels of a head have several scales.
        sixteen_bits: queries of bfloat16 or float16; otherwise float32.

    Raises:
        LookupError: when no row fits.
    """
    for row in _rows():
        fits = row["capability"] <= capability and head_dim <= row["up_to_c"] and row["sixteen_bits"] == sixteen_bits
        if fits and (row["groups"] or not groups):
            least, most = row["queries"]
            queries = min(max(least, 1 << (shared - 1).bit_length()), most)
            names = ("tokens", "least_tiles", "most_parts", "warps", "stages")
            return DecodeTiling(**{name: row[name] for name in names}, queries=queries)
    raise LookupError(f"{CONFIGS.parent.name}/{CONFIGS.name} has no tile for {head_dim} channels")


@cache
def _rows() -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(CONFIGS.read_text(encoding="utf-8")))
