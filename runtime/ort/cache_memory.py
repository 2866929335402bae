"""The memory of a key-value cache: taken a page at a time as tokens are written, and given back when it is not needed.

A cache is made for the longest sequence and mostly filled by a short one. Pages of their own, outside the heap, stay
untouched until they are written; small ones, since a head's rows for all tokens would make every large page resident.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT_BYTES = 64
Forms = Mapping[str, tuple[tuple[int, ...], type[np.generic]]]


class CacheMemory:
    """Zeros of the given shapes and types by name, each beginning at a cache line.

    Attributes:
        arrays: views of one mapping, which lives as long as they do.
    """

    def __init__(self, forms: Forms) -> None:
        starts, size = {}, 0
        for name, (shape, dtype) in forms.items():
            starts[name] = size
            size += -(-_nbytes(shape, dtype) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._pages = _map(size)
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(self._pages, dtype, int(np.prod(shape)), starts[name]).reshape(shape)
            for name, (shape, dtype) in forms.items()
        }

    def give_back(self) -> None:
        """Return all pages to the system where it takes them; what the arrays hold afterwards is undefined."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


def _nbytes(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _map(size: int) -> mmap.mmap:
    """Zeros that no other process sees."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages knows no such advice
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
