"""The canonical dense 4-bit packing: two unsigned codes a byte along K, low nibble first, an odd K padded with 0."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack uint8 codes 0…15 [N, K] into bytes [N, ceil(K / 2)]; byte j holds k = 2j (low) and k = 2j + 1 (high).

    Raises:
        ValueError: when the codes are not a uint8 matrix of values below 16.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2 or (codes.numel() and int(codes.max()) > 15):
        raise ValueError(f"pack_int4 wants uint8 codes below 16 in a matrix, got {codes.dtype} {tuple(codes.shape)}")
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: Tensor, *, columns: int) -> Tensor:
    """The inverse of `pack_int4`: bytes [N, ceil(columns / 2)] to uint8 codes [N, columns].

    Raises:
        ValueError: when the byte count does not fit `columns`.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != -(-columns // 2):
        raise ValueError(f"unpack_int4 wants uint8 [N, {-(-columns // 2)}], got {packed.dtype} {tuple(packed.shape)}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return codes[:, :columns].contiguous()
