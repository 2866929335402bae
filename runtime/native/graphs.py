"""Decoding steps as a CUDA graph: recorded once for a batch, replayed with new tokens and positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtool.runtime.native.cache import LayerCache
from qtool.runtime.native.model import NativeModel
from qtool.runtime.native.step import Step

WARM_UPS = 2


class DecodeGraph:
    """One token of each of B sequences; the caches are those it was recorded with.

    Recording runs the step a few times on the tokens of the first call, which stores the same keys and values again.
    """

    def __init__(self, model: NativeModel, caches: list[LayerCache], batch: int) -> None:
        self._model, self._caches = model, caches
        self._ids = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self._first = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def recorded(self) -> bool:
        """Whether there is a graph to replay."""
        return self._graph is not None

    def __call__(self, ids: Tensor, first: Tensor) -> Tensor:
        """ids int64 [B] at positions `first` int32 [B], to logits [B, V] that the next call overwrites."""
        self._ids.copy_(ids)
        self._first.copy_(first)
        if self._graph is None:
            self._record()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        return self._logits

    def _record(self) -> None:
        stream: Any = torch.cuda.Stream(self._model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
        torch.cuda.current_stream(self._model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._step()
        self._graph = graph

    def _step(self) -> Tensor:
        return self._model.logits(self._ids, Step.recorded(self._first), self._caches)
