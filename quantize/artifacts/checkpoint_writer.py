"""Writing a quantized checkpoint's tensors, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.tensor_file import DTYPE_NAMES, Streamed, row_pieces, write_tensors
from qtool.quantize.artifacts.weights import WeightSource

SHARD = "tensors-{:05d}.safetensors"
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class CheckpointWriter:
    """Writes a checkpoint's tensors into a staging folder, one numbered shard per call, so that a stage holds one
    decoder block at a time. `details` is what the manifest needs to know of them.

    Args:
        folder: the staging folder.
        config: the model's.
        kv: what the key-value cache will store; None: floats.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], kv: CacheScheme | None = None) -> None:
        self.folder = folder
        self._config = dict(config)
        self._kv = kv
        self._shards = 0
        self._quantized: dict[str, dict[str, Any]] = {}
        self._floats: dict[str, str] = {}

    def add(
        self, quantized: Mapping[str, QuantizedTensor], floats: Mapping[str, Tensor | Streamed]
    ) -> dict[str, Any]:
        """Write one shard. Keys are module names (quantized) and tensor names (floats, in their stored dtype).

        Returns:
            What `restore` wants, for a later run that finds the shard written.
        """
        tensors: dict[str, Tensor | Streamed] = {name: t.contiguous() for name, t in floats.items()}
        described: dict[str, dict[str, Any]] = {}
        for module, weight in quantized.items():
            tensors |= {key: t.contiguous() for key, t in weight.to_tensors(module).items()}
            described[module] = {"scheme": weight.scheme.to_json(), "shape": list(weight.shape)}
            if weight.transform is not None:
                beside = weight.transform.to_tensors()
                tensors |= {f"{weight.site}.{key}": t.contiguous() for key, t in beside.items()}
                described[module]["transform"] = {
                    "site": weight.site,
                    "header": weight.transform.header(),
                    "tensors": sorted(beside),
                    "side_width": weight.transform.side_width,
                }
            if weight.low_rank is not None:
                described[module]["low_rank"] = int(weight.low_rank.up.shape[1])
        shard = SHARD.format(self._shards)
        write_tensors(tensors, self.folder / shard)
        stored = {name: DTYPE_NAMES[t.dtype] for name, t in floats.items()}
        record = {"shard": shard, "quantized": described, "float": stored}
        self.restore(record)
        return record

    def restore(self, record: Mapping[str, Any]) -> None:
        """Count a shard that lies in the folder already."""
        self._quantized |= record["quantized"]
        self._floats |= record["float"]
        self._shards += 1

    @property
    def details(self) -> dict[str, Any]:
        """The manifest's details: config, quantized modules with scheme and shape, float tensors with dtype, cache."""
        cache = {} if self._kv is None else {"kv": self._kv.model_dump(mode="json")}
        return {"config": self._config, "quantized": self._quantized, "float": self._floats, **cache}


def float_tensor(source: WeightSource, name: str, shape: Sequence[int]) -> Tensor | Streamed:
    """A float tensor in the dtype that holds it exactly, as it is stored; a large one is read while it is written."""
    dtype, pieces = DTYPES[source.stored_dtype(name)], list(row_pieces(shape))
    if len(pieces) == 1:
        return torch.from_numpy(source.read(name)).to(dtype)

    def rows() -> Iterator[Tensor]:
        for piece in pieces:
            yield torch.from_numpy(source.read_rows(name, piece.start, piece.stop)).to(dtype)

    return Streamed(dtype=dtype, shape=tuple(shape), pieces=rows)
