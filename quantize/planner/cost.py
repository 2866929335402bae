"""What a linear costs at run time: what decode reads for a token, and the multiply-accumulates of a token in prefill.

Both are counted, not timed, so that a plan is the same everywhere. A multiply-accumulate counts 1 with 8-bit or 4-bit
operands on both sides (4 bits are unpacked to 8) and 2 in 16 bits, which is the ratio of the tensor cores' and of
the CPU's dot instructions' rates. Decode takes as long as reading what is stored, and the small operations of
transforms and corrections take their time whatever their width; docs/methods.md holds both against the clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor

LOW_BIT, SIXTEEN_BIT = 1, 2
LOW_RANK_NODES = 3  # down, up and the sum, for all linears of a site together
# Bits that ONNX Runtime's CPU provider reads in the time of one small node: 16 KiB, on SmolLM2 with two threads.
NODE_READS = 8 * 2**14


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one site's linears.

    Attributes:
        bits: stored, with scales, side products and the site's transform.
        reads: bits read for a decoded token, online operations counted as what could be read in their time.
        work: multiply-accumulates per token of prefill, in units of an 8-bit one.
    """

    bits: int
    reads: int
    work: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(bits=self.bits + other.bits, reads=self.reads + other.reads, work=self.work + other.work)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(bits=self.bits - other.bits, reads=self.reads - other.reads, work=self.work - other.work)


NOTHING = Cost(bits=0, reads=0, work=0)


def cost_of(tensors: Mapping[str, QuantizedTensor]) -> Cost:
    """The cost of the linears that read one input."""
    transforms = {tensor.site: tensor for tensor in tensors.values() if tensor.transform is not None}
    total = sum((_of_transform(tensor) for tensor in transforms.values()), NOTHING)
    if any(tensor.low_rank is not None for tensor in tensors.values()):
        total += Cost(bits=0, reads=NODE_READS * LOW_RANK_NODES, work=0)
    return sum(map(_of_linear, tensors.values()), total)


def _of_linear(tensor: QuantizedTensor) -> Cost:
    rows, columns = tensor.shape
    rate = SIXTEEN_BIT if tensor.scheme.input is None else LOW_BIT
    work = rows * columns * rate + SIXTEEN_BIT * _side_products(tensor)
    return Cost(bits=tensor.stored_bits, reads=tensor.stored_bits, work=work)


def _of_transform(tensor: QuantizedTensor) -> Cost:
    assert tensor.transform is not None
    bits, transform = tensor.transform_bits, tensor.transform
    reads = bits + NODE_READS * transform.online_nodes
    return Cost(bits=bits, reads=reads, work=SIXTEEN_BIT * transform.online_products)


def _side_products(tensor: QuantizedTensor) -> int:
    rows, columns = tensor.shape
    side = 0 if tensor.side is None else rows * int(tensor.side.shape[1])
    rank = 0 if tensor.low_rank is None else int(tensor.low_rank.up.shape[1])
    return side + rank * (rows + columns)
