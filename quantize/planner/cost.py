"""What a linear costs at run time: bytes read per token in decode, multiply-accumulates per token in prefill.

Both are counted, not timed, so that a plan is the same everywhere. A multiply-accumulate counts 1 with 8-bit or 4-bit
operands on both sides (4 bits are unpacked to 8) and 2 in 16 bits, which is the ratio of the tensor cores' and of
the CPU's dot instructions' rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor

LOW_BIT, SIXTEEN_BIT = 1, 2


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one site's linears.

    Attributes:
        bits: stored, with scales, side products and the site's transform; what decode reads once a token.
        work: multiply-accumulates per token of prefill, in units of an 8-bit one.
    """

    bits: int
    work: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(bits=self.bits + other.bits, work=self.work + other.work)


def cost_of(tensors: Mapping[str, QuantizedTensor]) -> Cost:
    """The cost of the linears that read one input."""
    total = Cost(bits=0, work=0)
    sites: set[str] = set()
    for tensor in tensors.values():
        rows, columns = tensor.shape
        rate = SIXTEEN_BIT if tensor.scheme.input is None else LOW_BIT
        total += Cost(bits=tensor.stored_bits, work=rows * columns * rate + SIXTEEN_BIT * _side_products(tensor))
        if tensor.transform is not None and tensor.site not in sites:
            sites.add(tensor.site)
            total += Cost(bits=tensor.transform_bits, work=SIXTEEN_BIT * tensor.transform.online_products)
    return total


def _side_products(tensor: QuantizedTensor) -> int:
    rows, columns = tensor.shape
    side = 0 if tensor.side is None else rows * int(tensor.side.shape[1])
    rank = 0 if tensor.low_rank is None else int(tensor.low_rank.up.shape[1])
    return side + rank * (rows + columns)
