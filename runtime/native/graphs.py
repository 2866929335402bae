"""Decoding steps as a CUDA graph: recorded once for a batch, replayed with new tokens and positions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.runtime.native.step import Step

LOGGER = logging.getLogger("qtool.runtime")
WARM_UPS = 2


class DecodeGraph:
    """One token of each of B sequences; the caches are those it was recorded with.

    Recording runs the step a few times on the tokens of the first call, which stores the same keys and values again.

    Args:
        compute: from token ids int64 [B] and their step to what is wanted of them, [B, …], storing keys and values in
            the same memory at every call.
        batch: B.
        device: of all of it.
    """

    def __init__(self, compute: Callable[[Tensor, Step], Tensor], batch: int, device: torch.device) -> None:
        self._compute, self._device = compute, device
        self._ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros(batch, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def __call__(self, ids: Tensor, first: Tensor) -> Tensor:
        """ids int64 [B] at positions `first` int32 [B], to a result that the next call overwrites."""
        self._ids.copy_(ids)
        self._first.copy_(first)
        if self._graph is None:
            self._record()
        assert self._graph is not None and self._found is not None
        self._graph.replay()
        return self._found

    def _record(self) -> None:
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The stream that has warmed up has its zeros (kernels/stream_zeros); on another, every launch would fill some.
        with torch.cuda.graph(graph, stream=stream):
            self._found = self._step()
        self._graph = graph

    def _step(self) -> Tensor:
        return self._compute(self._ids, Step.recorded(self._first))


def replayed(graph: DecodeGraph, ids: Tensor, first: Sequence[int]) -> Tensor | None:
    """A step by its graph, see DecodeGraph; None, and why in the log, when it cannot be recorded."""
    try:
        return graph(ids, torch.tensor(first, dtype=torch.int32))
    except RuntimeError as error:
        if graph.recorded:
            raise
        LOGGER.warning("decoding without CUDA graphs: %s", str(error).splitlines()[0])
        return None
