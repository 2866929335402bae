"""Storing new tokens in a quantized cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.dispatch import backend_for
from qtool.kernels.quantize_kv.cache import KVCache
from qtool.kernels.quantize_kv.cache_reference import rotated, write_reference

LEAST_CHANNELS, MOST_CHANNELS = 16, 256
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def write_kv(
    cache: KVCache,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor | None = None,
    *,
    query: Tensor | None = None,
) -> Tensor | None:
    """Quantize new keys and values into the cache, in place.

    Args:
        cache: of this layer; its keys are rotated here if it says so.
        key: [B, H_kv, T, c] behind the rotary positions, float.
        value: alike.
        starts: int32 [B], the position of every sequence's first new token.
        counts: int32 [B], how many of the T are new, the leading ones; None: all. A GPU does not write positions beyond
            the capacity, and does not say so: whoever counts tokens checks.
        query: [B, H, T, c], to be rotated along with the keys.

    Returns:
        The queries to ask this cache with, None if none are given; the same tensor if the cache does not rotate.

    Raises:
        UsageError: when shapes, types or devices do not fit.
        ValueError: by the reference, when a sequence outgrows the cache.
        EnvironmentFault: when QTOOL_BACKEND asks for Triton where it cannot run.
    """
    _check(cache, key, value, query)
    starts, counts = _positions(key, starts, counts)
    head_dim = cache.head_dim
    in_kernel = cache.rotate and head_dim & (head_dim - 1) == 0
    backend = backend_for(key.device, "quantize_kv", unsupported=unsupported(cache), e4m3=cache.e4m3)
    triton = backend == "triton"
    if cache.rotate and not (triton and in_kernel):
        key, query = rotated(key), None if query is None else rotated(query)
    if not triton:
        write_reference(cache, key, value, starts, counts)
        return query
    from qtool.kernels.quantize_kv.triton_kernel import write_triton

    key, value = _rows(key), _rows(value)
    if key.numel():
        found = write_triton(cache, key, value, starts, counts, None if query is None else _rows(query), in_kernel)
        return query if found is None else found
    return query


def unsupported(cache: KVCache) -> str:
    """Why the kernels cannot take this cache's shape; empty when they can."""
    if cache.head_dim % 4 or not LEAST_CHANNELS <= cache.head_dim <= MOST_CHANNELS:
        return f"heads of {cache.head_dim} channels"
    for fmt in (cache.keys.format, cache.values.format):
        group, half = fmt.group_size or cache.head_dim, cache.head_dim // 2
        if fmt.format == "int4" and group < cache.head_dim and half % group:
            return f"groups of {group} across the halves of {cache.head_dim} channels"
        if fmt.group_size and group < cache.head_dim and group & (group - 1):
            return f"groups of {group} channels"
    return ""


def _check(cache: KVCache, key: Tensor, value: Tensor, query: Tensor | None) -> None:
    expected = (cache.batch, cache.heads, key.shape[2] if key.dim() == 4 else -1, cache.head_dim)
    for name, x in (("key", key), ("value", value), ("query", query)):
        if x is None:
            continue
        shape = tuple(x.shape) if name != "query" or x.dim() != 4 else (x.shape[0], cache.heads, *x.shape[2:])
        if shape != expected or x.dtype not in FLOATS:
            raise UsageError(f"write_kv: {name}", f"{x.dtype} {tuple(x.shape)} for a cache of {expected}")
        if x.device != cache.keys.codes.device:
            raise UsageError(f"write_kv: {name}", f"on {x.device}, the cache on {cache.keys.codes.device}")
    if query is not None and query.shape[1] % cache.heads:
        raise UsageError("write_kv: query", f"{query.shape[1]} heads share {cache.heads}")


def _positions(key: Tensor, starts: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, tokens = key.shape[0], key.shape[2]
    if counts is None:
        counts = torch.full((batch,), tokens, dtype=torch.int32, device=key.device)
    for name, x in (("starts", starts), ("counts", counts)):
        if x.dtype != torch.int32 or x.shape != (batch,) or x.device != key.device:
            raise UsageError(f"write_kv: {name}", f"{x.dtype} {tuple(x.shape)} on {x.device}", f"give int32 [{batch}]")
    return starts.contiguous(), counts.contiguous()


def _rows(x: Tensor) -> Tensor:
    """With the channels of a head side by side."""
    return x if x.stride(3) == 1 else x.contiguous()
