"""A large square matrix that becomes its own reversal in half the memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

CHUNK = 2**20


class InPlace:
    """Room for a float64 matrix [K, K].

    Attributes:
        matrix: it, all zeros at first.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, max(8 * size * size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._size = size
        self.matrix = torch.frombuffer(self._memory, dtype=torch.float64, count=size * size).view(size, size)

    def reversed_float32(self) -> Tensor:
        """The matrix with its rows and columns in reverse order, rounded to float32, in its own place: `matrix` is
        lost, and the second half of the memory goes back to the system."""
        count = self._size * self._size
        flat = self.matrix.view(-1)
        for start in range(0, count // 2, CHUNK):
            stop = min(start + CHUNK, count // 2)
            front = flat[start:stop].flip(0)
            flat[start:stop] = flat[count - stop : count - start].flip(0)
            flat[count - stop : count - start] = front
        narrow = torch.frombuffer(self._memory, dtype=torch.float32, count=count)
        for start in range(0, count, CHUNK):  # number i is written where number i / 2 was
            stop = min(start + CHUNK, count)
            narrow[start:stop] = flat[start:stop].to(torch.float32)
        used = -(-4 * count // mmap.PAGESIZE) * mmap.PAGESIZE
        if used < len(self._memory):
            self._memory.madvise(mmap.MADV_DONTNEED, used, len(self._memory) - used)
        return narrow.view(self._size, self._size)
