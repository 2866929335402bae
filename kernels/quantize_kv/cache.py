"""The memory of a quantized key-value cache, one layer's: bytes of codes, scales, and a few tokens kept in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CodeFormat = Literal["int8", "int4", "fp8_e4m3"]
BITS: dict[CodeFormat, int] = {"int8": 8, "int4": 4, "fp8_e4m3": 8}


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How the keys, or the values, of one token and head are stored.

    Attributes:
        format: of one code.
        symmetric: zero is the middle code; otherwise an offset is stored with every scale.
        group_size: channels that share a scale; None: the head's.
    """

    format: CodeFormat
    symmetric: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.format not in BITS:
            raise ValueError(f"a cache of {self.format}; one of {', '.join(BITS)}")
        if self.format == "fp8_e4m3" and not self.symmetric:
            raise ValueError("float codes have no offset")

    def __str__(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.format}{'' if self.symmetric else ' asym'}{group}"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return BITS[self.format]

    @property
    def zero_code(self) -> int:
        """The middle code of integers, from which stored bytes count; 0 for FP8."""
        return 0 if self.format == "fp8_e4m3" else 1 << (self.bits - 1)

    def groups(self, head_dim: int) -> int:
        """Scales of one token and head.

        Raises:
            ValueError: when the groups, or 4-bit halves, do not divide the head.
        """
        size = self.group_size or head_dim
        if head_dim % size or head_dim * self.bits % 8:
            raise ValueError(f"heads of {head_dim} channels cannot be stored as {self}")
        return head_dim // size


@dataclass(frozen=True, kw_only=True)
class StoredHeads:
    """The codes of keys or of values, a place for every position of every sequence.

    Attributes:
        format: of the codes.
        codes: [B, H_kv, capacity, bytes] uint8, contiguous. int8: c bytes, code − 128 in two's complement. int4: c / 2
            bytes of code − 8 in two's complement, in halves: byte j holds channel j in its low and j + c / 2 in its
            high nibble. fp8_e4m3: c bytes, the bits.
        scale: [B, H_kv, capacity, groups] float16.
        offset: alike, the value of code 0; None for symmetric codes.
    """

    format: KVFormat
    codes: Tensor
    scale: Tensor
    offset: Tensor | None


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """One layer's keys and values.

    Every position has its codes. The first `sink` positions and the last `recent` ones are also kept as they are, in
    16 bits, and read from there. Position p of them lies at p if p < sink, otherwise at sink + (p − sink) mod recent.
    `recent=1` is what WKVQuant does (2402.12065): a token sees itself in float and earlier ones through their codes.

    Attributes:
        keys: codes of the keys, rotated ones where `rotate` is set.
        values: codes of the values.
        exact_keys: [B, H_kv, sink + recent, c], float.
        exact_values: alike.
        sink: leading positions kept in 16 bits.
        recent: trailing positions kept in 16 bits.
        rotate: R3: keys are stored, and queries asked, behind an orthonormal Hadamard transform of every head.
    """

    keys: StoredHeads
    values: StoredHeads
    exact_keys: Tensor
    exact_values: Tensor
    sink: int
    recent: int
    rotate: bool

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.keys.codes.shape[0]

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        return self.keys.codes.shape[1]

    @property
    def capacity(self) -> int:
        """Positions there is room for in every sequence."""
        return self.keys.codes.shape[2]

    @property
    def head_dim(self) -> int:
        """Channels c of one head."""
        return self.exact_keys.shape[3]

    @property
    def e4m3(self) -> bool:
        """Whether keys or values are E4M3 numbers, which not every GPU knows."""
        return "fp8_e4m3" in (self.keys.format.format, self.values.format.format)

    def nbytes(self) -> int:
        """Bytes in all."""
        found = [self.exact_keys, self.exact_values]
        for stored in (self.keys, self.values):
            found += [stored.codes, stored.scale] + ([] if stored.offset is None else [stored.offset])
        return sum(tensor.nbytes for tensor in found)


def empty_cache(
    *,
    batch: int,
    heads: int,
    capacity: int,
    head_dim: int,
    keys: KVFormat,
    values: KVFormat,
    dtype: torch.dtype,
    device: torch.device | str,
    sink: int = 0,
    recent: int = 0,
    rotate: bool = False,
) -> KVCache:
    """A cache without tokens.

    Args:
        batch: sequences.
        heads: of keys and values.
        capacity: positions of a sequence.
        head_dim: channels of a head.
        keys: format of the keys.
        values: format of the values.
        dtype: of the tokens kept in float; the model's.
        device: of all of it.
        sink: leading positions kept in float.
        recent: trailing positions kept in float.
        rotate: transform keys (and queries) before they are stored.

    Raises:
        ValueError: for sizes that a format cannot store.
    """
    if min(batch, heads, capacity, head_dim) < 1 or min(sink, recent) < 0:
        raise ValueError(f"a cache of {batch} × {heads} × {capacity} × {head_dim} with {sink} + {recent} exact tokens")

    def stored(fmt: KVFormat) -> StoredHeads:
        groups = fmt.groups(head_dim)
        codes = torch.zeros(batch, heads, capacity, head_dim * fmt.bits // 8, dtype=torch.uint8, device=device)
        scale = torch.zeros(batch, heads, capacity, groups, dtype=torch.float16, device=device)
        return StoredHeads(
            format=fmt, codes=codes, scale=scale, offset=None if fmt.symmetric else torch.zeros_like(scale)
        )

    exact = torch.zeros(2, batch, heads, sink + recent, head_dim, dtype=dtype, device=device)
    return KVCache(
        keys=stored(keys),
        values=stored(values),
        exact_keys=exact[0],
        exact_values=exact[1],
        sink=sink,
        recent=recent,
        rotate=rotate,
    )
