"""Attention of whole prompts, by torch: a token sees what it would see if the prompt were decoded token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtool.kernels.kv_attention.options import ScoreOptions
from qtool.kernels.quantize_kv.cache import KVCache
from qtool.kernels.quantize_kv.cache_reference import read_codes, rotated


def prompt_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    rotated_query: bool = False,
) -> Tensor:
    """Attend from all tokens of prompts that start at position 0 and have just been written to the cache.

    Keys and values go into torch's product in the queries' type, so what codes stand for is rounded to it.

    Args:
        query: [B, H, T, c].
        key: [B, H_kv, T, c] as they were given to `write_kv`.
        value: alike.
        cache: they were written to. Prompts of fewer than T tokens stand at the left; what lies behind them comes out
            as anything.
        scale: as in `decode_attention`, and so are softcap, window and sink_logits.
        rotated_query: the queries have gone through the cache's rotation; otherwise they do here.

    Returns:
        [B, H, T, c] in the query's dtype.
    """
    if cache.rotate and not rotated_query:
        query = rotated(query)
    tokens = query.shape[2]
    every = slice(None)
    seen_key, seen_value = (read_codes(x, every, 0, tokens).to(query.dtype) for x in (cache.keys, cache.values))
    coded, exact = _masks(tokens, cache, window, query.device)
    if cache.sink + cache.recent:
        key = rotated(key) if cache.rotate else key
        seen_key = torch.cat((seen_key, key.to(query.dtype)), dim=2)
        seen_value = torch.cat((seen_value, value.to(query.dtype)), dim=2)
        coded = torch.cat((coded, exact), dim=1)
    options = ScoreOptions(
        scale=query.shape[3] ** -0.5 if scale is None else scale,
        softcap=softcap,
        window=window,
        sink_logits=sink_logits,
    )
    if softcap is None and sink_logits is None:
        return scaled_dot_product_attention(
            query, seen_key, seen_value, attn_mask=coded, scale=options.scale, enable_gqa=True
        )
    return _attend(query, seen_key, seen_value, coded, options)


def _masks(tokens: int, cache: KVCache, window: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which keys each token sees through codes, and which exactly: [T, T] each."""
    at = torch.arange(tokens, device=device)
    asking, asked = at[:, None], at[None, :]
    seen = asked <= asking
    if window is not None:
        seen &= asked > asking - window
    exact = (asked < cache.sink) | (asked > asking - cache.recent)
    return seen & ~exact, seen & exact


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: ScoreOptions) -> Tensor:
    """What torch's own function has no argument for, in float32."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.to(torch.float32).repeat_interleave(shared, dim=1) for x in (key, value))
    scores = (query.to(torch.float32) @ key.mT) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sink_logits is not None:
        logits = options.sink_logits.to(torch.float32)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, logits), dim=-1)
    shares = scores.softmax(dim=-1)[..., : key.shape[2]]
    return (shares @ value).to(query.dtype)
