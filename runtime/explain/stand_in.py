"""A copy of a model without its weights: what ONNX Runtime optimizes is the graph, not the numbers in it.

Tensors of SMALL_BYTES and more all point into one file that is a single hole: it takes no disk, and reading it takes no
memory. Smaller ones keep their numbers, because fusions look at them (scales, zero points, axes, epsilons).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import onnx

from qtool.errors import InputRefused, UsageError
from qtool.runtime.explain.graph import BITS, TYPE_NAMES, graphs_of

SMALL_BYTES = 64 * 1024
HOLE = "weights"
_NUMBERS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def read_graph(path: Path) -> Any:
    """A model file's graph (onnx.ModelProto); tensors kept beside the file are not read.

    Raises:
        UsageError: the file does not exist.
        InputRefused: it is not an ONNX model.
    """
    if not path.is_file():
        raise UsageError(path, "does not exist or is no file", "give a package or an .onnx file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf and onnx each raise their own
        raise InputRefused(path, "is not an ONNX model", "give a file that an exporter wrote") from error
    if not model.graph.node:
        raise InputRefused(path, "holds no graph", "give a file that an exporter wrote, not a Git LFS pointer")
    return model


def write_stand_in(model: Any, source: Path, folder: Path) -> Path:
    """Write the copy into a folder and return its path. The model itself loses its large tensors' numbers.

    Args:
        model: from `read_graph`.
        source: the file that it was read from; small tensors beside it are read.
        folder: exists, empty.

    Raises:
        InputRefused: a tensor lies outside the model's folder or beyond the end of its file.
    """
    hole = 0
    for graph in graphs_of(model.graph):
        for tensor in graph.initializer:
            size = _size_bytes(tensor)
            if tensor.data_type == onnx.TensorProto.STRING:
                continue
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                data = _open_beside(tensor, source, size)
                if size < SMALL_BYTES:
                    tensor.raw_data = _read(data, tensor, size)
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]
            if size >= SMALL_BYTES:
                hole = max(hole, size)
                _point_into_hole(tensor, size)
    with (folder / HOLE).open("wb") as file:
        file.truncate(hole)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _size_bytes(tensor: Any) -> int:
    elements = 1
    for dimension in tensor.dims:
        elements *= dimension
    return -(-elements * BITS.get(TYPE_NAMES.get(tensor.data_type, ""), 8) // 8)


def _point_into_hole(tensor: Any, size: int) -> None:
    for field in _NUMBERS:
        tensor.ClearField(field)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", HOLE), ("offset", "0"), ("length", str(size))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _entries(tensor: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _open_beside(tensor: Any, source: Path, size: int) -> Path:
    """The file that holds a tensor's numbers; the hub's cache is made of links, so links are followed."""
    entries = _entries(tensor)
    location = Path(entries.get("location", ""))
    label = f"{source}: {tensor.name}"
    if not location.name or location.is_absolute() or ".." in location.parts:
        raise InputRefused(label, f"is stored in {location}", "keep data inside the model's folder")
    path = source.parent / location
    if not path.is_file():
        raise InputRefused(label, f"{path} is missing", "fetch the model's data files too")
    try:
        offset = int(entries.get("offset", "0"))
    except ValueError:
        offset = -1
    status = path.stat()
    if offset < 0 or not stat.S_ISREG(status.st_mode) or offset + size > status.st_size:
        raise InputRefused(label, f"does not lie inside {location}", "fetch or export the model again")
    return path


def _read(path: Path, tensor: Any, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, int(_entries(tensor).get("offset", "0")))
    finally:
        os.close(descriptor)
