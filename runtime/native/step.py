"""The tokens of one step: rows of several sequences, one after the other, each with its place in its sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.kernels.runtime_smooth import Requests


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is computed at once. B sequences, M rows in all, at most T of one sequence; rows have no padding.

    Attributes:
        first: int32 [B], the position of each sequence's first row.
        counts: int32 [B], rows of each sequence.
        positions: int64 [M], of each row in its sequence.
        requests: which rows are one request.
        longest: T.
        sequence: int64 [M], of each row; None when all sequences have T rows.
        spans: (first position, rows) of each sequence as numbers; None while a graph is recorded.
    """

    first: Tensor
    counts: Tensor
    positions: Tensor
    requests: Requests
    longest: int
    sequence: Tensor | None
    spans: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, first: Sequence[int], counts: Sequence[int], device: torch.device) -> Step:
        """Sequences that continue at `first` with `counts` tokens."""
        spans = tuple(zip(first, counts, strict=True))
        positions = [position for begin, count in spans for position in range(begin, begin + count)]
        longest = max(counts)
        sequence = None
        if min(counts) < longest:
            rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
            sequence = rows.to(device)
        return cls(
            first=torch.tensor(first, dtype=torch.int32, device=device),
            counts=torch.tensor(counts, dtype=torch.int32, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            requests=Requests.of_lengths(list(counts), device),
            longest=longest,
            sequence=sequence,
            spans=spans,
        )

    @classmethod
    def recorded(cls, first: Tensor) -> Step:
        """One token of every sequence, at positions `first` int32 [B] that change between replays of a graph."""
        requests = Requests.single_tokens(len(first), first.device)
        return cls(
            first=first,
            counts=torch.ones_like(first),
            positions=first.to(torch.int64),
            requests=requests,
            longest=1,
            sequence=None,
            spans=None,
        )

    @property
    def single(self) -> bool:
        """Whether every sequence has one row."""
        return self.longest == 1 and self.sequence is None

    def padded(self, rows: Tensor) -> Tensor:
        """[M, …] to [B, T, …], zeros behind shorter sequences."""
        batch = len(self.first)
        if self.sequence is None:
            return rows.reshape(batch, self.longest, *rows.shape[1:])
        out = rows.new_zeros(batch, self.longest, *rows.shape[1:])
        out[self.sequence, self._within()] = rows
        return out

    def packed(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        if self.sequence is None:
            return padded.flatten(0, 1)
        return padded[self.sequence, self._within()]

    def _within(self) -> Tensor:
        assert self.sequence is not None
        return self.positions - self.first.to(torch.int64)[self.sequence]
