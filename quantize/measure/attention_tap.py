"""A tap on attention: what it is given after rotary positions, and how much of it falls on the first tokens.

While the tap is open the network's attention function is ours, which calls the one that was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.quantize.artifacts.attention_function import named_attention, register_attention
from qtool.quantize.artifacts.sink_statistics import KEYS, SHORT, SINK_THRESHOLD, SinkStatistics

NAME = "qtool_measure"
QUERIES_AT_ONCE = 512
STRIDE = 4  # over the whole length every fourth query is asked

# Given sequences, queries (both slices) and a number of keys: attention weights [sequences, H, queries, keys].
Weights = Callable[[slice, slice, int], Tensor]
# Called with the attention module, its queries [b, H, T, c], keys [b, H_kv, T, c] and weights.
See = Callable[[nn.Module, Tensor, Tensor, Weights], None]


@contextmanager
def tapped_attention(network: PreTrainedModel, see: See) -> Iterator[None]:
    """While open, every attention that runs is shown to `see`."""
    config = network.config
    before = config._attn_implementation

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = named_attention(before, module)(module, query, key, value, mask, **kwargs)
        see(module, query, key, _computed(query, key, mask, kwargs) if weights is None else _given(weights))
        return output, None

    if before is None:
        yield  # a family without attention
        return
    register_attention(NAME, attend, masks_like=before)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _given(weights: Tensor) -> Weights:
    return lambda which, queries, keys: weights[which, :, queries, :keys]


def _computed(query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> Weights:
    """Weights computed anew, a few queries at a time, for attention functions that do not give them."""
    repeats = query.shape[1] // key.shape[1]
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5

    def rows(which: slice, queries: slice, keys: int) -> Tensor:
        every_key = key[which, :, : queries.stop].repeat_interleave(repeats, dim=1)
        scores = (query[which, :, queries] * scaling) @ every_key.transpose(2, 3)
        later = torch.arange(queries.stop) > torch.arange(queries.start, queries.stop, queries.step)[:, None]
        scores.masked_fill_(later, -torch.inf)
        if mask is not None:
            window = mask[which if mask.shape[0] > 1 else slice(None), :, queries, : queries.stop]
            scores = scores.masked_fill_(~window, -torch.inf) if window.dtype == torch.bool else scores.add_(window)
        return scores.softmax(dim=-1)[..., :keys]

    return rows


def sink_statistics(weights: Weights, query: Tensor) -> SinkStatistics:
    """The sinks of one batch: all sequences over their first SHORT tokens, the first one over its whole length."""
    batch, _, length, _ = query.shape
    short = _importance(weights, slice(None), min(SHORT, length), 1, stride=1)
    full = _importance(weights, slice(0, 1), length, min(KEYS, length), stride=STRIDE)
    importance = np.zeros((query.shape[1], KEYS))
    importance[:, : full.shape[2]] = full[0].double().numpy()
    return SinkStatistics(
        sequences=np.array([batch, 1]),
        first_short=(short[:, :, 0] > SINK_THRESHOLD).sum(dim=0).numpy(),
        first_full=(full[:, :, 0] > SINK_THRESHOLD).sum(dim=0).numpy(),
        any_full=(full > SINK_THRESHOLD).any(dim=2).sum(dim=0).numpy(),
        importance=importance,
    )


def _importance(weights: Weights, which: slice, length: int, keys: int, *, stride: int) -> Tensor:
    """[sequences, H, keys]: the mean weight that the queries at and after a key give it; every `stride`-th is asked,
    counted from the last."""
    asked = torch.arange((length - 1) % stride, length, stride)
    total: Tensor | None = None
    for start in range(int(asked[0]), length, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, length)
        part = weights(which, slice(start, stop, stride), keys).sum(dim=2)
        part = nn.functional.pad(part, (0, keys - part.shape[-1]))
        total = part if total is None else total + part
    assert total is not None
    return total / (len(asked) - torch.searchsorted(asked, torch.arange(keys)))
