"""Writing a safetensors file piece by piece, so that a tensor need not be in memory to be written.

The bytes are those of safetensors' own writer: tensors of wide elements first, then by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# By the order in which safetensors lays tensors out.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ORDER = list(DTYPE_NAMES)
LARGE_ELEMENTS = 2**25  # from here on a tensor goes through memory in pieces of rows
PIECE_ELEMENTS = 2**22


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A tensor that is made while it is written.

    Attributes:
        dtype: of all pieces.
        shape: of the whole.
        pieces: makes the rows, piece by piece, in order; it may be called more than once.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    def numel(self) -> int:
        """Elements of the whole."""
        return prod(self.shape)

    def element_size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def contiguous(self) -> Streamed:
        """Itself: pieces are written contiguously."""
        return self


def row_pieces(shape: Sequence[int], *, large: int | None = None, piece: int | None = None) -> Iterator[slice]:
    """Rows of a tensor of this shape, in pieces where it is large.

    Args:
        shape: of the whole.
        large: elements up to which it is one piece; None: LARGE_ELEMENTS.
        piece: elements in a piece, rounded down to whole rows; None: PIECE_ELEMENTS.
    """
    rows, width = int(shape[0]), prod(shape[1:])
    whole = rows * width <= (LARGE_ELEMENTS if large is None else large)
    step = max(rows, 1) if whole else max(1, (piece or PIECE_ELEMENTS) // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def write_tensors(
    tensors: Mapping[str, Tensor | Streamed], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Args:
        tensors: contents by name; those in memory must be contiguous.
        path: the new file.
        metadata: of the whole file; Hugging Face's loaders look for {"format": "pt"}.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            tensor = tensors[name]
            written = 0
            for piece in tensor.pieces() if isinstance(tensor, Streamed) else (tensor,):
                written += file.write(raw_bytes(piece))
            assert written == tensor.numel() * tensor.element_size(), name


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    flat: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data
