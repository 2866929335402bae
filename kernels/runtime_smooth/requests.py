"""Which rows of a batch belong to one request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Requests:
    """The requests of a batch's rows; made once a step and shared by every layer.

    Attributes:
        starts: int32 [R + 1], where each request's rows begin; the last is the number of rows M.
        request: int32 [M], the request of each row.
        longest: no request has more rows than this.
    """

    starts: Tensor
    request: Tensor
    longest: int

    @classmethod
    def one(cls, rows: int, device: torch.device) -> Requests:
        """All rows are one request."""
        starts = torch.arange(2, dtype=torch.int32, device=device) * rows
        return cls(starts=starts, request=torch.zeros(rows, dtype=torch.int32, device=device), longest=rows)

    @classmethod
    def single_tokens(cls, rows: int, device: torch.device) -> Requests:
        """Every row is a request: decoding."""
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return cls(starts=starts, request=starts[:-1], longest=1)

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device) -> Requests:
        """Requests of these many rows each, one after the other."""
        counts = torch.tensor(lengths, dtype=torch.int64)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        request = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        longest = max(lengths, default=0)
        return cls(starts=starts.to(device, torch.int32), request=request.to(device, torch.int32), longest=longest)
