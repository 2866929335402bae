"""4-bit packings: the canonical one on disk, and the one our GPU kernels read, made from it when a model is loaded."""

from __future__ import annotations

from qtool.kernels.pack.canonical import pack_int4, unpack_int4
from qtool.kernels.pack.halves import Encoding, HalvesInt4, from_halves, to_halves

__all__ = ["Encoding", "HalvesInt4", "from_halves", "pack_int4", "to_halves", "unpack_int4"]
