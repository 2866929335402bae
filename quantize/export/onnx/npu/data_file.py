"""One file of tensors beside the graphs, each stored once, whichever graph asks first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qtool.quantize.export.onnx.external_data import ALIGNMENT_BYTES, INLINE_BELOW_BYTES

Array = npt.NDArray[Any]


class DataFile:
    """Tensors by name. Big ones go into the file as they come, piece by piece; small ones stay in the graph."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")
        self._known: dict[str, TensorProto] = {}

    def tensor(
        self, name: str, data_type: int, shape: Iterable[int], pieces: Callable[[], Iterable[Array]]
    ) -> TensorProto:
        """The initializer of this name; `pieces` (already in their stored bytes) are read the first time only."""
        if name not in self._known:
            self._known[name] = self._write(name, data_type, shape, pieces())
        return self._known[name]

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def _write(self, name: str, data_type: int, shape: Iterable[int], pieces: Iterable[Array]) -> TensorProto:
        tensor = TensorProto(name=name, data_type=data_type, dims=list(shape))
        iterator = iter(pieces)
        first = next(iterator).tobytes()
        second = next(iterator, None)
        if second is None and len(first) < INLINE_BELOW_BYTES:
            tensor.raw_data = first
            return tensor
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT_BYTES))
        offset = self._file.tell()
        self._file.write(first)
        if second is not None:
            self._file.write(second.tobytes())
        for piece in iterator:
            self._file.write(piece.tobytes())
        entries = {"location": self._path.name, "offset": offset, "length": self._file.tell() - offset}
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def pack_int4(codes: Array) -> Array:
    """Signed codes −8…7 of any shape as ONNX stores them: flat, two a byte, the first in the low nibble."""
    flat = codes.astype(np.int8).reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.int8(0))
    low, high = flat[0::2].astype(np.uint8) & 15, flat[1::2].astype(np.uint8) & 15
    packed: Array = low | (high << 4)
    return packed


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Infer every shape, check, and write."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    path.write_bytes(inferred.SerializeToString(deterministic=True))
