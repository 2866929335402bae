"""What stands in transformers' model in the place of its decoder and its head: the native runtime's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from qtool.errors import UsageError
from qtool.kernels.runtime_smooth import Requests
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.runtime.native.graphs import DecodeGraph, replayed
from qtool.runtime.native.model import NativeModel
from qtool.runtime.native.session import announce
from qtool.runtime.native.step import Step
from qtool.runtime.pretrained.padding import token_counts
from qtool.runtime.pretrained.sequences import Memory, MemoryPool, NativeCache


class Loaded:
    """A checkpoint's native model, and the memory of its caches.

    Args:
        checkpoint: read again whenever the model goes to another device or dtype.
        max_length: positions that there are.
    """

    native: NativeModel
    memory: MemoryPool

    def __init__(self, checkpoint: QuantizedCheckpoint, max_length: int) -> None:
        self._checkpoint, self._max_length = checkpoint, max_length
        self.graphs = False

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load onto a device, in a dtype of activations."""
        device = torch.empty(0, device=device).device  # "cuda" is cuda:0 from here on
        self.native = NativeModel(self._checkpoint, device, dtype, self._max_length)
        self.memory = MemoryPool(self.native)
        self.graphs = device.type == "cuda" and self.native.recordable
        announce(self.native)

    def decoded(self, ids: Tensor, first: list[int], memory: Memory) -> Tensor | None:
        """One token of every sequence by a CUDA graph, to [B, d]; None where there are none."""
        if not self.graphs:
            return None
        native, layers = self.native, memory.layers

        def compute(tokens: Tensor, step: Step) -> Tensor:
            return native.hidden(native.embedded(tokens), step, layers)

        memory.graph = memory.graph or DecodeGraph(compute, len(ids), native.device)
        found = replayed(memory.graph, ids, first)
        if found is None:
            self.graphs, memory.graph = False, None
            return None
        return found.clone()


class NativeDecoder(nn.Module):
    """The embedding, the blocks and the last norm.

    Args:
        loaded: shared with the head.
        config: transformers' model's.
    """

    def __init__(self, loaded: Loaded, config: Any) -> None:
        super().__init__()
        self._loaded, self.config = loaded, config
        self.embed_tokens = Embedding(loaded)
        # Empty: by it transformers knows the model's device and dtype, and we that it is moved.
        here = torch.empty(0, device=loaded.native.device, dtype=loaded.native.dtype)
        self.place = nn.Parameter(here, requires_grad=False)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NativeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoder.

        Args:
            input_ids: int64 [B, T]; or inputs_embeds [B, T, d].
            attention_mask: [B, columns so far + T], zero where there is padding, on either side; None: no padding.
            position_ids: [B or 1, T]; they must count up by one over a sequence's tokens.
            past_key_values: of an earlier call of this model.
            use_cache: hand out the cache.
            options: of what transformers' decoder can hand out beside, nothing may be asked for.

        Raises:
            UsageError: for what this decoder does not do.
        """
        self._check(past_key_values, options)
        native = self._loaded.native
        if (input_ids is None) == (inputs_embeds is None):
            raise UsageError("input_ids and inputs_embeds", "one of them is wanted", "pass input_ids")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        batch, length = given.shape[:2]
        cache = past_key_values if past_key_values is not None else NativeCache(self._loaded.memory)
        real, counts = token_counts(attention_mask, position_ids, (batch, length), cache.columns)
        first, memory = cache.advance(counts, length)
        given = given.to(native.device)
        rows = given.flatten(0, 1) if real is None else given[real.to(native.device)]
        found = None
        if length == 1 and inputs_embeds is None:
            found = self._loaded.decoded(rows, first, memory)
        if found is None:
            x = native.embedded(rows) if inputs_embeds is None else rows.to(native.dtype)
            found = native.hidden(x, Step.of(first, counts, native.device), memory.layers)
        hidden = found.reshape(batch, length, -1) if real is None else _spread(found, real.to(native.device))
        kept = cache if self._wanted(use_cache) else None
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=kept)

    def _wanted(self, use_cache: bool | None) -> bool:
        return bool(self.config.use_cache if use_cache is None else use_cache)

    def _check(self, cache: Any, options: dict[str, Any]) -> None:
        if cache is not None and not isinstance(cache, NativeCache):
            why = f"a {type(cache).__name__} cannot hold this model's keys and values"
            raise UsageError("past_key_values", why, "leave it out: the model makes its own and hands it out")
        if cache is not None and cache.pool is not self._loaded.memory:
            why = "another model made it, or this one before it was moved"
            raise UsageError("past_key_values", why, "start without it")
        for name in ("output_hidden_states", "output_attentions"):
            asked = options.get(name)
            if asked or (asked is None and getattr(self.config, name, False)):
                raise UsageError(name, "the kernels keep none", "use qtool measure, or the float model")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NativeDecoder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        native, place = self._loaded.native, self.place
        if (place.device, place.dtype) != (native.device, native.dtype):
            self._loaded.place(place.device, place.dtype)
        return self


class Embedding(nn.Module):
    """The rows of the embedding, which are the head's where they are tied."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self._loaded = loaded

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 […] to […, d]."""
        found = self._loaded.native.embedded(input_ids.flatten().to(self._loaded.native.device))
        return found.reshape(*input_ids.shape, -1)


class Head(nn.Module):
    """The head's product, in float32."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__()
        self._loaded = loaded

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, d] to logits [B, T, V]; rows of one sequence are one request."""
        batch, length = hidden.shape[:2]
        requests = Requests.of_lengths([length] * batch, hidden.device)
        (logits,) = self._loaded.native.head(hidden.flatten(0, 1), None, requests)
        return logits.reshape(batch, length, -1)


def _spread(rows: Tensor, real: Tensor) -> Tensor:
    """[M, d] to [B, T, d], zeros where there is padding."""
    out = rows.new_zeros(*real.shape, rows.shape[1])
    out[real] = rows
    return out
