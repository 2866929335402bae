"""`Session` over the native model: several sequences of their own lengths, a cache of fixed size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.dispatch import backend_for
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.runtime.native.cache import LayerCache
from qtool.runtime.native.graphs import DecodeGraph, replayed
from qtool.runtime.native.model import NativeModel
from qtool.runtime.native.step import Step
from qtool.runtime.session import IntArray, check_tokens

LOGGER = logging.getLogger("qtool.runtime")
FLOATS = {"cpu": torch.float32, "cuda": torch.bfloat16}


class NativeSession:
    """See Session. On "cpu" every operation runs as its plain-torch reference, on the same layouts as on a GPU.

    Args:
        source: a checkpoint, or a float model.
        device: "cpu", "cuda" or "cuda:0" and so on.
        max_length: positions of a sequence.
        dtype: of activations and of what stayed in float; None: float32 on a CPU, bfloat16 on a GPU.
        graphs: on a GPU, record decoding steps as CUDA graphs.

    Raises:
        EnvironmentFault: when there is no such GPU.
        UsageError: for a device, family or length that it does not run.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        device: str = "cpu",
        max_length: int,
        dtype: torch.dtype | None = None,
        graphs: bool = True,
    ) -> None:
        where = native_device(device)
        self._caches: list[LayerCache] = []
        self._graph: DecodeGraph | None = None
        self._batch = 0
        self._model: NativeModel | None = NativeModel(source, where, dtype or FLOATS[where.type], max_length)
        self._graphs = where.type == "cuda" and self._model.recordable and graphs
        self._description = announce(self._model)
        self.reset()

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return self._open.vocab_size

    @property
    def max_length(self) -> int | None:
        """See Session."""
        return self._open.max_length

    @property
    def description(self) -> str:
        """See Session."""
        return self._description

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._open.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each sequence's cache."""
        return tuple(self._lengths)

    def prefill(self, tokens: IntArray, lengths: Sequence[int] | None = None) -> FloatArray:
        """See Session.

        Args:
            tokens: [B, T].
            lengths: how many of each sequence's T tokens count, the leading ones, at least 1; None: all. Logits behind
                them are zero.
        """
        return _numpy(self.prefill_on_device(tokens, lengths))

    def prefill_on_device(self, tokens: IntArray, lengths: Sequence[int] | None = None) -> Tensor:
        """`prefill`, its logits left on the device."""
        check_tokens(tokens, dims=2, vocab_size=self.vocab_size)
        batch, longest = tokens.shape
        counts = [longest] * batch if lengths is None else [int(length) for length in lengths]
        if len(counts) != batch or not all(1 <= count <= longest for count in counts):
            raise UsageError(f"lengths {counts}", f"are not {batch} numbers of 1 to {longest}", "fix the call")
        step = Step.of(self._advance(batch, counts), counts, self._open.device)
        ids = torch.from_numpy(np.concatenate([row[:count] for row, count in zip(tokens, counts, strict=True)]))
        with torch.inference_mode():
            return step.padded(self._open.logits(ids.to(self._open.device), step, self._caches))

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        return _numpy(self.decode_on_device(tokens))

    def decode_on_device(self, tokens: IntArray) -> Tensor:
        """`decode`, its logits left on the device; the next call may overwrite them."""
        check_tokens(tokens, dims=1, vocab_size=self.vocab_size)
        counts, device = [1] * len(tokens), self._open.device
        first = self._advance(len(tokens), counts)
        ids = torch.from_numpy(tokens).to(device)
        with torch.inference_mode():
            if self._graphs and (found := self._replayed(ids, first)) is not None:
                return found
            return self._open.logits(ids, Step.of(first, counts, device), self._caches)

    def reset(self) -> None:
        """See Session. The next prefill may have another number of sequences."""
        self._lengths: list[int] = []

    def close(self) -> None:
        """See Session."""
        self._model = None
        self._caches, self._graph = [], None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _open(self) -> NativeModel:
        assert self._model is not None, "the session is closed"
        return self._model

    def _replayed(self, ids: Tensor, first: list[int]) -> Tensor | None:
        """A decoding step as a graph; None, once and for all, when it cannot be recorded."""
        model, caches = self._open, self._caches
        self._graph = self._graph or DecodeGraph(
            lambda tokens, step: model.logits(tokens, step, caches), len(ids), model.device
        )
        found = replayed(self._graph, ids, first)
        if found is None:
            self._graphs, self._graph = False, None
        return found

    def _advance(self, batch: int, counts: list[int]) -> list[int]:
        """Make room for so many tokens of each sequence, and count them; returns the positions of the first ones."""
        model = self._open
        if not self._lengths:
            self._make_caches(batch)
            self._lengths = [0] * batch
        if len(self._lengths) != batch:
            raise UsageError(f"{batch} sequences", f"the cache holds {len(self._lengths)}", "reset the session first")
        first = self._lengths
        last = [begin + count for begin, count in zip(first, counts, strict=True)]
        if max(last) > model.max_length:
            raise UsageError(f"{max(last)} tokens", f"the KV cache holds {model.max_length}", "ask for fewer")
        self._lengths = last
        return first

    def _make_caches(self, batch: int) -> None:
        if batch != self._batch:
            self._graph = None
            self._caches = self._open.caches(batch)
            self._batch = batch


def native_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: for a name that is no device of ours.
        EnvironmentFault: when there is no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r}", "unknown", "use cpu or cuda") from None
    if device.type not in FLOATS:
        raise UsageError(f"device {name!r}", "has no kernels", "use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"--device {name}", "torch sees no GPU", "use --device cpu, which runs references")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"--device {name}", f"there are {torch.cuda.device_count()} GPUs", "use another number")
    return device


def announce(model: NativeModel) -> str:
    """Log what runs, and as a warning what runs dequantized; returns the first on one line."""
    operations = ", ".join(f"{count} {op}" for op, count in sorted(model.operations().items()))
    cache = "float" if model.kv is None else str(model.kv)
    floats = str(model.dtype).removeprefix("torch.")
    what = {"reference": "references", "triton": "Triton kernels"}[backend_for(model.device, "quantize_activation")]
    reasons = "".join(f"; {count} dequantized: {reason}" for reason, count in sorted(model.dequantized().items()))
    line = f"native runtime on {model.device} ({what}), {floats}, cache {cache}: {operations}{reasons}"
    LOGGER.info("%s", line)
    for reason, count in sorted(model.dequantized().items()):
        LOGGER.warning("%d linears run dequantized in float32: %s", count, reason)
    return line


def _numpy(logits: Tensor) -> FloatArray:
    array: Any = logits.to("cpu", torch.float32).numpy()
    return array
