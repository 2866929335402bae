"""The header of a safetensors file, checked to the letter of the format before anything is allocated.

Layout: 8 bytes little-endian header length N, N bytes of JSON that start with "{", then the tensors' bytes, back to
back without hole or overlap. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.inputs.file_kind import refuse_disguise
from qtool.quantize.inputs.regular_file import RegularFile
from qtool.quantize.inputs.strict_json import parse_json_object

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_BYTES = 2**63
AGAIN = "download the file again"

BITS: dict[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: its safetensors dtype, shape, and first byte and byte count in the file; `transposed`
    when the bytes there are those of its transpose."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    transposed: bool = False


def read_header(file: RegularFile) -> dict[str, TensorRecord]:
    """Every tensor of a safetensors file.

    Raises:
        InputRefused: when the file is not exactly what the format allows; the message names file and field.
    """
    head = file.read(0, min(file.size, 512)).tobytes()
    refuse_disguise(file.label, head)
    if len(head) < 8:
        raise InputRefused(file.label, "is too short to be a safetensors file", AGAIN)
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        why = f"claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}"
        raise InputRefused(file.label, why, "this is no safetensors file, or a damaged one")
    if 8 + length > file.size:
        why = f"is truncated: the header takes {length} bytes, the file has {file.size}"
        raise InputRefused(file.label, why, AGAIN)
    return parse_header(file.label, file.read(8, length).tobytes(), file.size)


def parse_header(label: str, header: bytes, file_size: int) -> dict[str, TensorRecord]:
    """Check header bytes against the size of their file; see `read_header`."""
    if header[:1] != b"{":
        raise InputRefused(f"{label}: header", "does not start with '{'", AGAIN)
    data = parse_json_object(f"{label}: header", header)
    _check_metadata(label, data.pop("__metadata__", None))
    first = 8 + len(header)
    records = {name: _record(f"{label}: {name}", entry, first) for name, entry in data.items()}
    _check_ranges(label, records, first, file_size)
    return records


def _check_metadata(label: str, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputRefused(f"{label}: __metadata__", "is not a map of strings", AGAIN)


def _record(label: str, entry: Any, first: int) -> TensorRecord:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputRefused(label, "its entry must hold dtype, shape and data_offsets, and nothing else", AGAIN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputRefused(f"{label}: dtype {dtype!r:.40}", "is not a safetensors dtype", AGAIN)
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputRefused(f"{label}: shape", "is not a list of non-negative integers", AGAIN)
    if not _counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0] or offsets[1] >= MAX_BYTES:
        raise InputRefused(f"{label}: data_offsets", "is not a range of bytes", AGAIN)
    size = offsets[1] - offsets[0]
    if math.prod(shape) * BITS[dtype] != 8 * size:  # integers of any length: nothing overflows
        raise InputRefused(label, f"{dtype} of shape {shape!s:.80} does not take the {size} bytes of its range", AGAIN)
    return TensorRecord(dtype, tuple(shape), first + offsets[0], size)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_BYTES for item in value)


def _check_ranges(label: str, records: dict[str, TensorRecord], first: int, file_size: int) -> None:
    expected = first
    for name, record in sorted(records.items(), key=lambda item: (item[1].start, item[1].size)):
        if record.start != expected:
            kind = "overlaps the tensor before it" if record.start < expected else "leaves a hole before it"
            raise InputRefused(f"{label}: {name}: data_offsets", kind, AGAIN)
        expected += record.size
    if expected > file_size:
        why = f"is truncated: its tensors end at byte {expected}, the file at {file_size}"
        raise InputRefused(label, why, AGAIN)
    if expected < file_size:
        raise InputRefused(label, f"has {file_size - expected} bytes after the last tensor", AGAIN)
