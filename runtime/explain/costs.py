"""What a step is predicted to cost: bytes over bandwidth, operations over throughput, and a price for every node.

All constants were measured on one machine (two cores of an AMD Zen 4 with VNNI, DRAM at 28 GB/s, ONNX Runtime 1.31.1):
bandwidth with weights that stream from DRAM (4096 × 14336, one token), throughput at 512 tokens, the price of a node
over the whole SmolLM2-135M. Shares carry over to other machines far better than times do; `--profile` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qtool.runtime.explain.graph import BITS, GraphView, Node, attribute
from qtool.runtime.explain.kernels import Kernel
from qtool.runtime.explain.linears import Linear

NODE_US = 8.0  # 60 norms 0.60 ms, 60 multiplications 0.42 ms
DRAM_GB_PER_S = 28.0
CACHE_GB_PER_S = 10.0  # GroupQueryAttention: 2.5 ms for a cache of 25 MB, float32
ATTENTION_GFLOPS = 100.0  # of 168 that two cores reach at the median
MEASURED_ON = "2 cores of a Zen 4, ONNX Runtime 1.31.1"
ATTENTION = ("GroupQueryAttention", "MultiHeadAttention", "Attention", "DecoderMaskedMultiHeadAttention")


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast a kernel goes.

    Attributes:
        gb_per_s: bytes of weights at one token.
        gops: 10⁹ multiplications and additions a second at 512 tokens.
        unpack_ns: for every weight at every call, whatever the number of tokens.
    """

    gb_per_s: float
    gops: float
    unpack_ns: float = 0.0


RATES: dict[str, Rate] = {
    "nbits integer": Rate(gb_per_s=22, gops=240),
    "nbits float": Rate(gb_per_s=6.2, gops=150),
    "nbits unpacked": Rate(gb_per_s=25, gops=150, unpack_ns=1.4),
    "QLinearMatMul": Rate(gb_per_s=12, gops=680),
    "MatMulIntegerToFloat": Rate(gb_per_s=15, gops=620),
    "DynamicQuantizeMatMul": Rate(gb_per_s=12, gops=720),
    "MatMulInteger": Rate(gb_per_s=14, gops=450),
    "MatMulInteger s8": Rate(gb_per_s=1.4, gops=50),
    "dequantized": Rate(gb_per_s=25, gops=150, unpack_ns=3.0),
    "float": Rate(gb_per_s=25, gops=150),
}
# MatMulNBits level 4 by block: throughput at 512 tokens.
INTEGER_BLOCK_GOPS: dict[int, float] = {16: 200, 32: 240, 64: 250, 128: 340}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Microseconds of one decode step and of one prefill."""

    decode_us: float
    prefill_us: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(decode_us=self.decode_us + other.decode_us, prefill_us=self.prefill_us + other.prefill_us)


NOTHING = Cost(decode_us=0.0, prefill_us=0.0)


def linear_cost(linear: Linear, kernel: Kernel, rows: int) -> Cost:
    """One linear at one token and at `rows` tokens."""
    rate = RATES[kernel.rate]
    weights = linear.k * linear.n
    gops = rate.gops
    if kernel.rate == "nbits integer" and linear.node.op_type == "MatMulNBits":
        gops = INTEGER_BLOCK_GOPS[min(max(attribute(linear.node, "block_size", 32), 16), 128)]
    unpack = weights * rate.unpack_ns / 1e3
    stream = linear.weight_bytes / rate.gb_per_s / 1e3
    one = max(stream, 2 * weights / gops / 1e3) + unpack + NODE_US
    many = max(stream, 2 * weights * rows / gops / 1e3) + unpack + NODE_US
    return Cost(decode_us=one, prefill_us=many)


def attention_cost(view: GraphView, length: int) -> Cost:
    """All attention of the graph: one token behind a cache of `length`, and a prompt of `length`."""
    nodes = [node for node in view.nodes if node.op_type in ATTENTION]
    per_token = cache_bytes_per_token(view)
    width = sum(_query_width(view, node) for node in nodes)
    decode = per_token * length / CACHE_GB_PER_S / 1e3 + len(nodes) * NODE_US
    prefill = 2 * length * length * width / ATTENTION_GFLOPS / 1e3 + len(nodes) * NODE_US  # causal: half of 4 T²
    return Cost(decode_us=decode, prefill_us=prefill)


def cache_bytes_per_token(view: GraphView) -> int:
    """Bytes that a token adds to the KV cache."""
    total = 0
    for name, (dtype, dims) in view.inputs.items():
        if is_cache(name) and len(dims) == 4:
            heads, width = (dim if isinstance(dim, int) else 64 for dim in (dims[1], dims[3]))
            total += heads * width * BITS.get(dtype, 8) // 8
    return total


def is_cache(name: str) -> bool:
    """Whether an input is a part of the KV cache."""
    return name.startswith("past") and name != "past_sequence_length"


def other_cost(nodes: int, width: int, rows: int) -> Cost:
    """`nodes` elementwise nodes over `width` channels: read twice, written once."""
    moved = 3 * 4 * width / DRAM_GB_PER_S / 1e3
    return Cost(decode_us=nodes * NODE_US, prefill_us=nodes * (NODE_US + moved * rows))


def shares(costs: Mapping[str, Cost]) -> dict[str, tuple[float, float]]:
    """Each part's share of the decode step and of the prefill."""
    total = total_of(costs.values())
    return {
        name: (cost.decode_us / (total.decode_us or 1), cost.prefill_us / (total.prefill_us or 1))
        for name, cost in costs.items()
    }


def total_of(costs: Iterable[Cost]) -> Cost:
    """The sum."""
    total = NOTHING
    for cost in costs:
        total += cost
    return total


def _query_width(view: GraphView, node: Node) -> int:
    heads = attribute(node, "num_heads") or attribute(node, "q_num_heads")
    widths = [dims[3] for name, (_, dims) in view.inputs.items() if is_cache(name) and len(dims) == 4]
    known = [width for width in widths if isinstance(width, int)]
    return heads * (known[0] if known else 64)
