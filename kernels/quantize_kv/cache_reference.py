"""Writing to and reading from a quantized cache in plain torch: any device, every format; c is head_dim."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.kernels.hadamard import apply, hadamard_plan
from qtool.kernels.quantize_kv.cache import KVCache, KVFormat, StoredHeads
from qtool.kernels.quantize_kv.reference import KVCodes, dequantize_kv, quantize_kv_fp8, quantize_kv_int


def quantize_heads(x: Tensor, fmt: KVFormat) -> KVCodes:
    """Codes of keys or values: [..., c] to codes [..., groups, group_size]."""
    groups = x.reshape(*x.shape[:-1], fmt.groups(x.shape[-1]), -1)
    if fmt.format == "fp8_e4m3":
        return quantize_kv_fp8(groups)
    return quantize_kv_int(groups, bits=fmt.bits, symmetric=fmt.symmetric)


def to_bytes(codes: Tensor, fmt: KVFormat) -> Tensor:
    """Codes [..., groups, group_size] as a cache stores them: [..., c × bits / 8] uint8."""
    flat = codes.flatten(-2)
    if fmt.format == "fp8_e4m3":
        return flat.view(torch.uint8)
    flat = flat ^ fmt.zero_code  # of n bits, code ^ 2ⁿ⁻¹ is code − 2ⁿ⁻¹ in two's complement
    if fmt.bits == 8:
        return flat
    low, high = flat.chunk(2, dim=-1)
    return low | (high << 4)


def from_bytes(stored: Tensor, fmt: KVFormat) -> Tensor:
    """The inverse of `to_bytes`, without the groups: codes [..., c]."""
    if fmt.format == "fp8_e4m3":
        return stored.view(torch.float8_e4m3fn)
    return (stored if fmt.bits == 8 else torch.cat((stored & 15, stored >> 4), dim=-1)) ^ fmt.zero_code


def rotated(x: Tensor) -> Tensor:
    """Heads [..., c] behind the orthonormal Hadamard transform of their width, in x's dtype."""
    return apply(x, hadamard_plan(x.shape[-1]))


def write_reference(cache: KVCache, key: Tensor, value: Tensor, starts: Tensor, counts: Tensor) -> None:
    """Store keys, behind the rotation already, and values [B, H_kv, T, c]: `counts[b]` tokens from `starts[b]` on.

    Raises:
        ValueError: when a sequence outgrows the cache.
    """
    step = torch.arange(key.shape[2], device=key.device)
    taken = step < counts[:, None]
    row, token = taken.nonzero(as_tuple=True)
    at = starts.long()[row] + token
    if at.numel() and int(at.max()) >= cache.capacity:
        raise ValueError(f"position {int(at.max())} in a cache of {cache.capacity}")
    kept = (at < cache.sink) | (at >= (starts + counts).long()[row] - cache.recent)
    slot = exact_slots(at[kept], cache)
    for stored, exact, x in ((cache.keys, cache.exact_keys, key), (cache.values, cache.exact_values, value)):
        new = x[row, :, token]
        found = quantize_heads(new, stored.format)
        stored.codes[row, :, at] = to_bytes(found.codes, stored.format)
        stored.scale[row, :, at] = found.scale[..., 0]
        if stored.offset is not None and found.offset is not None:
            stored.offset[row, :, at] = found.offset[..., 0]
        if slot.numel():
            exact[row[kept], :, slot] = new[kept].to(exact.dtype)


def exact_slots(positions: Tensor, cache: KVCache) -> Tensor:
    """Where the float copies of these positions lie."""
    ring = cache.sink + (positions - cache.sink) % max(cache.recent, 1)
    return torch.where(positions < cache.sink, positions, ring)


def read_codes(stored: StoredHeads, row: int | slice, first: int, last: int) -> Tensor:
    """What the codes of positions [first, last) stand for: [H_kv, last − first, c] float32, or [B, …] of some."""
    fmt = stored.format
    codes = from_bytes(stored.codes[row, :, first:last], fmt)
    scale = stored.scale[row, :, first:last, :, None]
    offset = None if stored.offset is None else stored.offset[row, :, first:last, :, None]
    grouped = codes.reshape(*scale.shape[:-1], -1)
    zero_code = fmt.zero_code if offset is None else 0
    return dequantize_kv(KVCodes(codes=grouped, scale=scale, offset=offset, zero_code=zero_code)).flatten(-2)


def read_cache(cache: KVCache, row: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values that the query of a sequence's last token sees: 2 × [H_kv, length, c] float32.

    Args:
        cache: any.
        row: which sequence.
        length: its tokens. Of the exact ones among them, those that the cache keeps exact are.
    """
    key, value = (read_codes(stored, row, 0, length) for stored in (cache.keys, cache.values))
    at = torch.arange(length, device=key.device)
    at = at[(at < cache.sink) | (at >= length - cache.recent)]
    if at.numel():
        slot = exact_slots(at, cache)
        key[:, at] = cache.exact_keys[row, :, slot].to(torch.float32)
        value[:, at] = cache.exact_values[row, :, slot].to(torch.float32)
    return key, value
