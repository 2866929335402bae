"""Where a batch's rows stand in the whole text, and which of them the costly statistics look at.

A row is looked at or not by a hash of its sequence and position alone, so that the choice does not depend on how the
text was cut into batches or shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.quantize.artifacts.statistics import Sampling

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The rows of a batch, in order of sequence and position.

    Attributes:
        sequence, position, token: int64 [n], of every row.
        sampling: of how many rows one is looked at.
    """

    sequence: Integers
    position: Integers
    token: Integers
    sampling: Sampling

    @staticmethod
    def of(sequences: Integers, tokens: Integers, sampling: Sampling) -> Places:
        """All rows of sequences numbered [b] with token ids [b, T]."""
        length = tokens.shape[1]
        return Places(
            sequence=np.repeat(sequences, length),
            position=np.tile(np.arange(length), len(sequences)),
            token=tokens.reshape(-1),
            sampling=sampling,
        )

    def __len__(self) -> int:
        return len(self.sequence)

    def take(self, rows: Integers) -> Places:
        """Some of the rows, in ascending order."""
        return Places(
            sequence=self.sequence[rows],
            position=self.position[rows],
            token=self.token[rows],
            sampling=self.sampling,
        )

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(sequence, first row, row after the last) of every sequence."""
        starts = np.flatnonzero(np.diff(self.sequence, prepend=-1))
        stops = [*starts[1:].tolist(), len(self)]
        return [(int(self.sequence[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]

    @cached_property
    def length(self) -> int:
        """Rows of every sequence, where all have as many; else 0."""
        lengths = {stop - start for _, start, stop in self.spans}
        return lengths.pop() if len(lengths) == 1 else 0

    @cached_property
    def for_histogram(self) -> Tensor:
        """int64: rows whose magnitudes are counted."""
        return self._every(self.sampling.histogram)

    @cached_property
    def for_median(self) -> Tensor:
        """int64: rows whose median is taken."""
        return self._every(self.sampling.median)

    @cached_property
    def for_error(self) -> Tensor:
        """int64: rows that are quantized."""
        return self._every(self.sampling.error)

    def _every(self, share: int) -> Tensor:
        return torch.from_numpy(np.flatnonzero(self._hash % np.uint64(share) == 0))

    @cached_property
    def _hash(self) -> npt.NDArray[np.uint64]:
        mixed = self.sequence.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed += (self.position.astype(np.uint64) + np.uint64(1)) * np.uint64(0xC2B2AE3D27D4EB4F)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        return mixed >> np.uint64(32)
