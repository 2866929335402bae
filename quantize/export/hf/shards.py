"""safetensors shards behind an index, as Hugging Face's loaders expect them, written one at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qtool.quantize.artifacts.store import sync_file, write_file
from qtool.quantize.artifacts.tensor_file import Streamed, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 * 10**9


class ShardWriter:
    """Collects tensors and writes a shard whenever they are large; `close` gives the files their names.

    Args:
        folder: where they go.
        shard_bytes: from here on a shard is full.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, shard_bytes
        self._waiting: dict[str, Tensor | Streamed] = {}
        self._written: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor | Streamed]) -> None:
        """Tensors that belong into one shard."""
        self._waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        if sum(_nbytes(tensor) for tensor in self._waiting.values()) >= self._limit:
            self._flush()

    def close(self) -> None:
        """Write what waits, name the shards, and write their index where there are several."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._written[0][0].rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._written, start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self._folder / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(self._folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

    def _flush(self) -> None:
        if not self._waiting:
            return
        path = self._folder / f"shard-{len(self._written)}.safetensors"
        write_tensors(self._waiting, path, metadata={"format": "pt"})
        sync_file(path)
        self._total += sum(_nbytes(tensor) for tensor in self._waiting.values())
        self._written.append((path, sorted(self._waiting)))
        self._waiting = {}


def _nbytes(tensor: Tensor | Streamed) -> int:
    return tensor.numel() * tensor.element_size()
