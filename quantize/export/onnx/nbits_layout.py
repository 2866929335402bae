"""MatMulNBits' own layout of a quantized weight: [N, blocks, bytes], scales [N, blocks], packed zero points.

Byte order is that of the canonical checkpoint (low nibble first along K); what differs is that every block is
whole. A short last block is filled up with its zero code, which stands for zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.kernels.pack import pack_int4
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class NBitsArrays:
    """One node's weight; N is the sum over its modules.

    Attributes:
        codes: uint8 [N, blocks, block_size × bits / 8].
        scales: float32 [N, blocks].
        zero_points: uint8 [N, ceil(blocks × bits / 8)], or None when the weight is symmetric.
    """

    codes: Bytes
    scales: npt.NDArray[np.float32]
    zero_points: Bytes | None


def blocks_of(columns: int, block_size: int) -> int:
    """Blocks along K, the short last one counted."""
    return -(-columns // block_size)


def nbits_arrays(weights: Sequence[QuantizedTensor]) -> NBitsArrays:
    """Lay out weights of one scheme and one K, concatenated along N."""
    parts = [_one(weight) for weight in weights]
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return NBitsArrays(
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        zero_points=np.concatenate(zeros) if zeros else None,
    )


def _one(weight: QuantizedTensor) -> NBitsArrays:
    fmt, (rows, columns) = weight.scheme.weight.format, weight.shape
    group = group_size_of(weight.scheme.weight.granularity)
    assert group is not None
    blocks = blocks_of(columns, group)
    codes, zeros = _whole_blocks(weight.codes, weight.zero_point, blocks * group, fmt.zero_code), weight.zero_point
    if fmt.bits == 4:
        codes = pack_int4(codes)
        zeros = None if zeros is None else pack_int4(zeros)
    return NBitsArrays(
        codes=codes.reshape(rows, blocks, -1).numpy(),
        scales=weight.scale.to(torch.float32).numpy(),
        zero_points=None if zeros is None else zeros.numpy(),
    )


def _whole_blocks(codes: Tensor, zero_point: Tensor | None, width: int, zero_code: int) -> Tensor:
    missing = width - codes.shape[1]
    if missing == 0:
        return codes
    if zero_point is None:
        return pad(codes, (0, missing), value=zero_code)
    return torch.cat((codes, zero_point[:, -1:].expand(-1, missing)), dim=1)
