"""Attention of one new token a sequence over a quantized cache (kernels/quantize_kv).

    out[h] = Σ_t softmax_t(cap(scale × q[h] · k[t])) v[t]        t: the positions the sequence has, or its last `window`

Keys and values are what their codes stand for, or the tokens themselves where the cache keeps them in 16 bits: the
first and the latest ones. Codes enter the products exactly and their scales are applied to scores and shares, so
nothing of the cache is rounded to 16 bits on the way (with groups of channels, what they stand for is).

A sequence's result has the same bits whatever sequences are beside it, in every run, since it is cut into parts by its
own length alone and the parts are added in order. `prompt_attention` is a whole prompt's, by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.kv_attention.options import ScoreOptions
from qtool.kernels.kv_attention.prompt import prompt_attention
from qtool.kernels.kv_attention.reference import decode_reference
from qtool.kernels.kv_attention.tiling import DecodeTiling, decode_tiling
from qtool.kernels.quantize_kv.cache import KVCache
from qtool.kernels.quantize_kv.cache_reference import rotated
from qtool.kernels.quantize_kv.write import unsupported

__all__ = ["DecodeTiling", "decode_attention", "decode_tiling", "prompt_attention"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def decode_attention(
    query: Tensor,
    cache: KVCache,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    rotated_query: bool = False,
    longest: int | None = None,
    tiling: DecodeTiling | None = None,
) -> Tensor:
    """Attend from each sequence's last token.

    Args:
        query: [B, H, c] of the cache's float type, H a multiple of the cache's heads: heads h·H/H_kv … ask head h.
        cache: of this layer; the token itself is in it already.
        lengths: int32 [B], positions of each sequence, its last token's included; 0 for a place without a sequence,
            whose output is zero.
        scale: of q · k; None: 1 / √c.
        softcap: bends scores to ±softcap by tanh; None: not.
        window: only the last so many positions are seen; None: all.
        sink_logits: [H], a learned score a head that takes its share of the softmax and gives nothing; None: none.
        rotated_query: the query has gone through the cache's rotation (`write_kv` does it); otherwise it does here.
        longest: no length is above it; the capacity if None. It trims the launch and changes no bits.
        tiling: in place of the table's, to try others.

    Returns:
        [B, H, c] in the query's dtype.

    Raises:
        UsageError: when shapes, types or devices do not fit.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    _check(query, cache, lengths, softcap, window, sink_logits)
    if cache.rotate and not rotated_query:
        query = rotated(query)
    scale = query.shape[2] ** -0.5 if scale is None else scale
    options = ScoreOptions(scale=scale, softcap=softcap, window=window, sink_logits=sink_logits)
    if not query.numel():
        return torch.empty_like(query)
    backend = backend_for(query.device, "kv_attention", unsupported=unsupported(cache), e4m3=cache.e4m3)
    if backend == "reference":
        return decode_reference(query, cache, lengths, options)
    from qtool.kernels.kv_attention.triton_kernel import decode_triton

    shared = query.shape[1] // cache.heads
    tiling = tiling or decode_tiling(cache, shared, query.dtype)
    longest = cache.capacity if longest is None else min(longest, cache.capacity)
    return decode_triton(query.contiguous(), cache, lengths.contiguous(), options, longest=longest, tiling=tiling)


def _check(
    query: Tensor,
    cache: KVCache,
    lengths: Tensor,
    softcap: float | None,
    window: int | None,
    sink_logits: Tensor | None,
) -> None:
    device = cache.keys.codes.device
    shape = tuple(query.shape)
    if query.dim() != 3 or (shape[0], shape[2]) != (cache.batch, cache.head_dim) or shape[1] % cache.heads:
        places = f"{cache.batch} sequences of {cache.heads} heads of {cache.head_dim} channels"
        raise UsageError("decode_attention: query", f"{shape} for a cache of {places}")
    if query.dtype != cache.exact_keys.dtype or query.dtype not in FLOATS:
        raise UsageError("decode_attention: query", f"{query.dtype}, the cache's floats are {cache.exact_keys.dtype}")
    if lengths.dtype != torch.int32 or lengths.shape != (cache.batch,):
        given = f"{lengths.dtype} {tuple(lengths.shape)}"
        raise UsageError("decode_attention: lengths", given, f"give int32 [{cache.batch}]")
    if sink_logits is not None and sink_logits.shape != (shape[1],):
        raise UsageError("decode_attention: sink_logits", f"{tuple(sink_logits.shape)} for {shape[1]} heads")
    if any(x is not None and x.device != device for x in (query, lengths, sink_logits)):
        raise UsageError("decode_attention", f"operands beside the cache's device, {device}")
    if (softcap is not None and softcap <= 0) or (window is not None and window < 1):
        raise UsageError("decode_attention", f"softcap {softcap}, window {window}", "give positive ones or None")
