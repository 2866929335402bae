"""The head of a GGUF file (versions 2 and 3, little-endian): metadata and tensor table, every count checked against
the file's size before it is believed. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtool.errors import InputRefused, escape
from qtool.quantize.inputs.file_kind import refuse_disguise
from qtool.quantize.inputs.regular_file import RegularFile

MAGIC = b"GGUF"
MAX_HEAD_BYTES = 2**28
MAX_TENSORS = 2**17
MAX_KEYS = 2**16
MAX_NAME_BYTES = 2**12
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
AGAIN = "download the file again"

_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type, shape (outermost first), and first byte and byte count in the file."""

    type: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class GgufHead:
    """Metadata (arrays as lists or numpy arrays) and tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_head(file: RegularFile) -> GgufHead:
    """Parse and check the head of a GGUF file.

    Raises:
        InputRefused: for anything that the format does not allow, or a version or byte order that is not read.
    """
    start = file.read(0, min(file.size, 512)).tobytes()
    if start[:4] != MAGIC:
        refuse_disguise(file.label, start)
        raise InputRefused(file.label, "is not a GGUF file (its first bytes are not 'GGUF')", AGAIN)
    cursor = _Cursor(file)
    cursor.take(4)
    version = cursor.unsigned(4)
    if version not in (2, 3):
        raise InputRefused(file.label, f"is GGUF version {version}, or big-endian", "convert it to version 3")
    tensor_count, key_count = cursor.unsigned(8), cursor.unsigned(8)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise InputRefused(file.label, f"claims {tensor_count} tensors and {key_count} metadata keys", AGAIN)
    metadata = _metadata(cursor, key_count)
    entries = _entries(cursor, tensor_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise InputRefused(f"{file.label}: general.alignment = {alignment!r:.40}", "is not a power of two", AGAIN)
    return GgufHead(metadata, _place(file, entries, _aligned(cursor.position, alignment), alignment))


class _Cursor:
    """Reads forward; never past the file, never more than MAX_HEAD_BYTES."""

    def __init__(self, file: RegularFile) -> None:
        self.label = file.label
        self.position = 0
        self._data = file.read(0, min(file.size, MAX_HEAD_BYTES))
        self._view = self._data.data

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self._view) - self.position:
            why = f"is truncated: its head wants {count} bytes at {self.position}, {len(self._view)} are there"
            raise InputRefused(self.label, why, AGAIN)
        piece = self._view[self.position : self.position + count]
        self.position += count
        return piece

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self, limit: int = MAX_HEAD_BYTES) -> str:
        length = self.unsigned(8)
        if length > limit:
            raise InputRefused(self.label, f"holds a string of {length} bytes at {self.position}", AGAIN)
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError:
            raise InputRefused(self.label, f"holds a string that is not UTF-8 at {self.position}", AGAIN) from None

    def array(self, kind: int, count: int) -> Any:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text(MAX_NAME_BYTES)
        if key in metadata:
            raise InputRefused(f"{cursor.label}: {key}", "is given twice", AGAIN)
        metadata[key] = _value(cursor, key, cursor.unsigned(4))
    return metadata


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind in _SCALARS:
        return cursor.array(kind, 1)[0].item()
    if kind != _ARRAY:
        raise InputRefused(f"{cursor.label}: {key}", f"has the unknown value type {kind}", AGAIN)
    kind, count = cursor.unsigned(4), cursor.unsigned(8)
    if kind in _SCALARS:
        return cursor.array(kind, count)
    if kind != _STRING:
        raise InputRefused(f"{cursor.label}: {key}", f"is an array of type {kind}, which is not read", AGAIN)
    if count > MAX_HEAD_BYTES // 8:
        raise InputRefused(f"{cursor.label}: {key}", f"claims {count} strings", AGAIN)
    return [cursor.text() for _ in range(count)]


def _entries(cursor: _Cursor, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name to (shape, type number, offset)."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text(MAX_NAME_BYTES)
        if name in entries:
            raise InputRefused(f"{cursor.label}: {name}", "is a duplicate tensor", AGAIN)
        dimensions = cursor.unsigned(4)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise InputRefused(f"{cursor.label}: {name}", f"has {dimensions} dimensions", AGAIN)
        innermost_first = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
        entries[name] = (innermost_first[::-1], cursor.unsigned(4), cursor.unsigned(8))
    return entries


def _place(
    file: RegularFile, entries: Mapping[str, tuple[tuple[int, ...], int, int]], first: int, alignment: int
) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for name, (shape, number, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
        label = f"{file.label}: {name}"
        kind, size = _stored_size(label, shape, number)
        if offset != expected:
            raise InputRefused(label, f"lies at offset {offset}, it must be at {expected}", AGAIN)
        if first + offset + size > file.size:
            why = f"is truncated: the tensor ends at byte {first + offset + size}, the file at {file.size}"
            raise InputRefused(label, why, AGAIN)
        tensors[name] = GgufTensor(kind, shape, first + offset, size)
        expected = _aligned(offset + size, alignment)
    return tensors


def _stored_size(label: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise InputRefused(label, f"has the unknown ggml type {number}", "give the original model") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if 0 in shape or math.prod(shape) >= 2**63:
        raise InputRefused(label, f"has the impossible shape {escape(shape)}", AGAIN)
    if shape[-1] % block:
        raise InputRefused(label, f"has rows of {shape[-1]} values, not a multiple of {kind.name}'s {block}", AGAIN)
    return kind.name, math.prod(shape) // block * block_bytes


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
