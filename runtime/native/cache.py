"""One layer's keys and values: floats, or the codes of the checkpoint's cache scheme."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtool.kernels.kv_attention import decode_attention
from qtool.kernels.quantize_kv import KVCache, KVFormat, empty_cache, write_kv
from qtool.kernels.quantize_kv.cache_reference import read_codes, rotated
from qtool.quantize.artifacts.cache_scheme import CacheCodes, CacheScheme
from qtool.quantize.artifacts.quantized_cache import codes_and_back
from qtool.runtime.native.step import Step


class LayerCache(Protocol):
    """B sequences, H heads asking, H_kv heads stored, c channels.

    Attributes:
        own_exact: a token sees its own key and value in float whatever is stored of it.
    """

    own_exact: bool

    def write(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Store new keys and values [B, H_kv, T, c]; returns queries [B, H, T, c], keys and values to attend with."""
        ...

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """What is stored of one sequence's first positions: keys and values [H_kv, length, c]."""
        ...

    def decode(self, query: Tensor, step: Step, scale: float, window: int | None) -> Tensor | None:
        """One token of every sequence against all it sees, [B, H, c] to the same; None: attend by `read`."""
        ...

    def tensors(self) -> list[Tensor]:
        """All that is stored, [B, H_kv, places, …] each, with a place for every position or for a few."""
        ...


class FloatCache:
    """Keys and values as they are."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.own_exact = False
        self._keys, self._values = torch.zeros(2, *shape, dtype=dtype, device=device)

    def write(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """See LayerCache."""
        self._store(key, value, step)
        return query, key, value

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """See LayerCache."""
        return self._keys[row, :, :length], self._values[row, :, :length]

    def decode(self, query: Tensor, step: Step, scale: float, window: int | None) -> Tensor | None:
        """See LayerCache; on a CPU by `read`, so that no sequence's length changes another's bits."""
        if query.device.type == "cpu" and step.spans is not None:
            return None
        at = torch.arange(self._keys.shape[2], device=query.device)
        last = step.first[:, None]
        seen = at <= last if window is None else (at <= last) & (at > last - window)
        # The heads that share keys see the same positions: they stand where several queries would.
        shared = query.reshape(len(query), self._keys.shape[1], -1, query.shape[2])
        found: Tensor = scaled_dot_product_attention(
            shared, self._keys, self._values, attn_mask=seen[:, None, None], scale=scale
        )
        return found.reshape(query.shape)

    def tensors(self) -> list[Tensor]:
        """See LayerCache."""
        return [self._keys, self._values]

    def _store(self, key: Tensor, value: Tensor, step: Step) -> None:
        sequence = step.sequence
        if sequence is None:
            sequence = torch.arange(len(step.first), device=key.device).repeat_interleave(step.longest)
        self._keys[sequence, :, step.positions] = step.packed(key.transpose(1, 2)).to(self._keys.dtype)
        self._values[sequence, :, step.positions] = step.packed(value.transpose(1, 2)).to(self._values.dtype)


class KeysBeforeBias(FloatCache):
    """A cache whose keys the attention has taken to codes and back in front of their bias: no kernel stores those."""

    def __init__(
        self, scheme: CacheScheme, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, dtype, device)
        self._codes = scheme.value_codes
        self.own_exact = scheme.past_only

    def write(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """See LayerCache."""
        self._store(key, codes_and_back(value, self._codes), step)
        return query, key, value

    def decode(self, query: Tensor, step: Step, scale: float, window: int | None) -> Tensor | None:
        """See LayerCache."""
        return None if self.own_exact else super().decode(query, step, scale, window)


class CodedCache:
    """Codes, in the memory that kernels/quantize_kv describes."""

    def __init__(
        self, scheme: CacheScheme, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        batch, heads, capacity, head_dim = shape
        self.own_exact = scheme.past_only
        self.memory: KVCache = empty_cache(
            batch=batch,
            heads=heads,
            capacity=capacity,
            head_dim=head_dim,
            keys=_format(scheme.key_codes),
            values=_format(scheme.value_codes),
            dtype=dtype,
            device=device,
            recent=1 if scheme.past_only else 0,
            rotate=scheme.rotate,
        )

    def write(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """See LayerCache."""
        asked = write_kv(self.memory, key, value, step.first, step.counts, query=query)
        assert asked is not None
        own = rotated(key) if self.memory.rotate and self.own_exact else key
        return asked, own, value

    def read(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        """See LayerCache; codes only."""
        keys, values = (read_codes(stored, row, 0, length) for stored in (self.memory.keys, self.memory.values))
        dtype = self.memory.exact_keys.dtype
        return keys.to(dtype), values.to(dtype)

    def decode(self, query: Tensor, step: Step, scale: float, window: int | None) -> Tensor | None:
        """See LayerCache."""
        longest = None if step.spans is None else max(first for first, _ in step.spans) + 1
        return decode_attention(
            query, self.memory, step.first + 1, scale=scale, window=window, rotated_query=True, longest=longest
        )

    def tensors(self) -> list[Tensor]:
        """See LayerCache."""
        found = [self.memory.exact_keys, self.memory.exact_values]
        for stored in (self.memory.keys, self.memory.values):
            found += [stored.codes, stored.scale, *([] if stored.offset is None else [stored.offset])]
        return found


def copy_sequences(source: LayerCache, into: LayerCache, sequences: Tensor) -> None:
    """Fill a cache with these sequences, int64 [B], of another of its layer, or of itself, as far as both reach."""
    for old, new in zip(source.tensors(), into.tensors(), strict=True):
        places = min(old.shape[2], new.shape[2])
        new[:, :, :places] = old[sequences, :, :places]


def layer_cache(
    scheme: CacheScheme | None, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """An empty cache [B, H_kv, capacity, c] of a scheme, floats for None."""
    if scheme is None:
        return FloatCache(shape, dtype, device)
    made = KeysBeforeBias if scheme.before_bias else CodedCache
    return made(scheme, shape, dtype, device)


def _format(codes: CacheCodes) -> KVFormat:
    return KVFormat(format=codes.format, symmetric=codes.symmetric, group_size=codes.group_size)
