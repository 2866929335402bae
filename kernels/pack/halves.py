"""The layout our GPU kernels read: K in tiles of 128, byte j of a tile holding k = j (low) and k = j + 64 (high).

A kernel that splits bytes into nibbles then has two contiguous halves of a K tile, each the partner of a contiguous
load of activations: no interleaving, no exchange through shared memory. The canonical codes 0…15 with zero point 8
become, per kernel:

    twos_complement   the value −8…7 in four bits, for int8 and bfloat16 products
    sign_magnitude    sign and magnitude −7…7, which are E4M3's own bits after two masks; −8 has no such code

Padding is the value 0, so a kernel needs no mask along K for the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qtool.kernels.pack.canonical import pack_int4, unpack_int4

Encoding = Literal["twos_complement", "sign_magnitude"]

TILE = 128  # values along K in one tile
HALF = TILE // 2
ZERO_POINT = 8


@dataclass(frozen=True)
class HalvesInt4:
    """4-bit weights in the kernels' layout.

    Attributes:
        packed: uint8 [N, 64 · ceil(K / 128)], contiguous.
        columns: K, without the padding.
        encoding: of a nibble.
    """

    packed: Tensor
    columns: int
    encoding: Encoding = "twos_complement"

    def __post_init__(self) -> None:
        _check_halves(self.packed, self.columns, self.encoding)

    @classmethod
    def from_canonical(cls, packed: Tensor, columns: int, encoding: Encoding = "twos_complement") -> HalvesInt4:
        """The layout of canonical bytes [N, ceil(K / 2)]; see `to_halves`."""
        return cls(to_halves(packed, columns, encoding), columns, encoding)

    def values(self) -> Tensor:
        """The weights as int8 values −8…7 [N, K]."""
        codes = unpack_int4(from_halves(self.packed, self.columns, self.encoding), columns=self.columns)
        return codes.to(torch.int8) - ZERO_POINT


def to_halves(packed: Tensor, columns: int, encoding: Encoding = "twos_complement") -> Tensor:
    """Canonical bytes [N, ceil(columns / 2)] of codes with zero point 8 to halves, uint8 [N, 64 · ceil(columns / 128)].

    Raises:
        ValueError: when the byte count does not fit `columns`, or a weight is −8 and the encoding has no −8.
    """
    _check_encoding(encoding)
    codes = unpack_int4(packed, columns=columns)
    return nibbles_in_halves(_encode(codes, encoding))


def nibbles_in_halves(nibbles: Tensor) -> Tensor:
    """Nibbles 0…15 [N, K], a byte each, to halves, uint8 [N, 64 · ceil(K / 128)]; padding is the nibble 0."""
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[1] % TILE))
    low, high = padded.reshape(padded.shape[0], padded.shape[1] // TILE, 2, HALF).unbind(2)
    return (low | (high << 4)).flatten(1)


def from_halves(halves: Tensor, columns: int, encoding: Encoding = "twos_complement") -> Tensor:
    """The exact inverse of `to_halves`: canonical bytes [N, ceil(columns / 2)].

    Raises:
        ValueError: when the byte count does not fit `columns`.
    """
    _check_halves(halves, columns, encoding)
    tiles = halves.reshape(halves.shape[0], halves.shape[1] // HALF, HALF)
    nibbles = torch.stack((tiles & 15, tiles >> 4), dim=2).flatten(1)[:, :columns]
    return pack_int4(_decode(nibbles, encoding))


def _encode(codes: Tensor, encoding: Encoding) -> Tensor:
    """Codes with zero point 8 to nibbles; the value 0 is the nibble 0 in every encoding."""
    if encoding == "twos_complement":
        return codes ^ ZERO_POINT
    if codes.numel() and int(codes.min()) == 0:
        raise ValueError("sign_magnitude holds −7…7: a weight of −8 has no code in it")
    return torch.where(codes < ZERO_POINT, 16 - codes, codes - ZERO_POINT).to(torch.uint8)


def _decode(nibbles: Tensor, encoding: Encoding) -> Tensor:
    if encoding == "twos_complement":
        return nibbles ^ ZERO_POINT
    return torch.where(nibbles > ZERO_POINT, 16 - nibbles, (nibbles & 7) + ZERO_POINT).to(torch.uint8)


def _check_encoding(encoding: str) -> None:
    if encoding not in get_args(Encoding):
        raise ValueError(f"no encoding {encoding!r}; known: {', '.join(get_args(Encoding))}")


def _check_halves(halves: Tensor, columns: int, encoding: str) -> None:
    _check_encoding(encoding)
    width = -(-columns // TILE) * HALF
    if halves.dtype != torch.uint8 or halves.dim() != 2 or halves.shape[1] != width:
        raise ValueError(
            f"halves of {columns} columns are uint8 [N, {width}], got {halves.dtype} {tuple(halves.shape)}"
        )
