"""Decode attention over a quantized cache in plain torch float32: what the kernel computes, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.kv_attention.options import ScoreOptions
from qtool.kernels.quantize_kv.cache import KVCache
from qtool.kernels.quantize_kv.cache_reference import read_cache


def decode_reference(query: Tensor, cache: KVCache, lengths: Tensor, options: ScoreOptions) -> Tensor:
    """As `decode_attention`, behind the rotation of the queries already. Sequence by sequence: none sees another."""
    heads, head_dim = query.shape[1:]
    out = torch.zeros_like(query)
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        key, value = read_cache(cache, row, length)
        asked = query[row].to(torch.float32).reshape(cache.heads, heads // cache.heads, head_dim)
        scores = (asked @ key.mT) * options.scale
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        if options.window is not None:
            scores[..., : max(length - options.window, 0)] = -torch.inf
        out[row] = (_shares(scores, options.sink_logits) @ value).reshape(heads, head_dim).to(out.dtype)
    return out


def _shares(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """The softmax; a learned logit a head takes its share and gives nothing."""
    if sink_logits is None:
        return scores.softmax(dim=-1)
    logits = sink_logits.to(scores.dtype).reshape(*scores.shape[:-1], 1)
    return torch.cat((scores, logits), dim=-1).softmax(dim=-1)[..., :-1]
