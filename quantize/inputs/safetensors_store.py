"""Tensors in safetensors shards, read by exact range into fresh memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.inputs.regular_file import PIECE_BYTES, Bytes, RegularFile
from qtool.quantize.inputs.safetensors_header import TensorRecord

FLOATS = ("F32", "F16", "BF16")
Placed = tuple[RegularFile, TensorRecord]


class SafetensorsStore:
    """A TensorStore over checked headers.

    Memory: mapping the files would keep every page ever touched resident, so tensors are read by range instead.
    """

    def __init__(self, files: Sequence[RegularFile], tensors: Mapping[str, Placed]) -> None:
        self.files = files
        self.dtypes = {name: record.dtype for name, (_, record) in tensors.items()}
        self.elements = sum(math.prod(record.shape) for _, record in tensors.values())
        self._tensors = tensors

    def load(self, name: str) -> FloatArray:
        """See TensorStore."""
        file, record = self._tensors[name]
        values = widen(file.read(record.start, record.size), record.dtype)
        if record.transposed:
            return np.ascontiguousarray(values.reshape(record.shape[::-1]).T)
        return values.reshape(record.shape)

    def load_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """See TensorStore."""
        file, record = self._tensors[name]
        if record.transposed:
            return np.ascontiguousarray(self.load(name)[start:stop])
        row_bytes = record.size // record.shape[0]
        raw = file.read(record.start + start * row_bytes, (stop - start) * row_bytes)
        return widen(raw, record.dtype).reshape(stop - start, *record.shape[1:])


def widen(raw: Bytes, dtype: str) -> FloatArray:
    """Little-endian bytes of an F32, F16 or BF16 tensor to float32, flat. Exact."""
    if dtype == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.view("<f2").astype(np.float32)
    words = raw.view("<u2").astype(np.uint32)
    words <<= 16
    return words.view(np.float32)


def check_shapes(label: str, tensors: Mapping[str, Placed], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what the files hold with what the config asks for.

    Raises:
        InputRefused: a missing or extra tensor, a wrong shape, or a dtype that is no float format of a model.
    """
    missing = [name for name in wanted if name not in tensors]
    if missing:
        why = f"is missing from the weights ({len(missing)} of {len(wanted)} tensors are)"
        raise InputRefused(f"{label}: {missing[0]}", why, "check config.json, or download the model again")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        why = f"is not part of the architecture in config.json ({len(extra)} such tensors)"
        raise InputRefused(f"{label}: {extra[0]}", why, "check config.json")
    for name, shape in wanted.items():
        file, record = tensors[name]
        if record.shape != shape:
            why = f"has shape {record.shape}, config.json asks for {shape}"
            raise InputRefused(f"{file.label}: {name}", why, "check config.json")
        if record.dtype not in FLOATS:
            why = f"is stored as {record.dtype}"
            raise InputRefused(f"{file.label}: {name}", why, f"convert the model to {', '.join(FLOATS)}")


def same_bytes(one: Placed, other: Placed) -> bool:
    """True when two tensors have the same dtype, shape and bytes; compared in pieces."""
    (file, record), (other_file, other_record) = one, other
    if (record.dtype, record.shape) != (other_record.dtype, other_record.shape):
        return False
    for start in range(0, record.size, PIECE_BYTES):
        count = min(PIECE_BYTES, record.size - start)
        left = file.read(record.start + start, count)
        if not np.array_equal(left, other_file.read(other_record.start + start, count)):
            return False
    return True
