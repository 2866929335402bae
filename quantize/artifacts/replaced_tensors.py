"""Numbers of quantized linears that changed after their shards were written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from qtool.quantize.artifacts.checkpoint_writer import SHARD
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.tensor_file import write_tensors


def replace_tensors(folder: Path, changed: Mapping[str, QuantizedTensor]) -> None:
    """Write the shards that hold these linears anew; other tensors keep their bytes.

    Each goes under a new name first and then takes the old one's place, so that another folder's link to the old file
    keeps what it had.

    Args:
        folder: of the shards.
        changed: by module; names, shapes and schemes are those that were written.
    """
    stored = {name: tensor for module, weight in changed.items() for name, tensor in weight.to_tensors(module).items()}
    for path in sorted(folder.glob(SHARD.replace("{:05d}", "*"))):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if stored.keys().isdisjoint(names):
                continue
            tensors = {name: stored[name] if name in stored else file.get_tensor(name) for name in names}
        new = path.with_suffix(".new")
        write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, new)
        new.replace(path)
