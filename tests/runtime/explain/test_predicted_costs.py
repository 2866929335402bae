"""The cost model against the measurements that its constants come from, and against a whole model's profile."""

from __future__ import annotations

import pytest
from onnx import TensorProto
from onnx import helper as h

from qtool.runtime.explain.costs import RATES, attention_cost, linear_cost, other_cost
from qtool.runtime.explain.graph import GraphView, Stored
from qtool.runtime.explain.kernels import ROWS, Kernel
from qtool.runtime.explain.linears import Linear

BYTES_PER_WEIGHT = {"nbits 4": 0.5, "nbits 8": 1.0, "float": 4.0, "8 bits": 1.0}


def predicted(rate: str, stored: str, k: int, n: int, rows: int, block: int = 32) -> tuple[float, float]:
    """Microseconds at one token and at `rows` tokens."""
    size = int(k * n * BYTES_PER_WEIGHT[stored]) + (4 * k * n // block if stored.startswith("nbits") else 0)
    node = h.make_node("MatMulNBits" if stored.startswith("nbits") else "MatMul", [], [], block_size=block)
    weight = Stored(name="w", dtype="uint8", shape=(size,))
    linear = Linear(node=node, weight=weight, parts=(weight,), k=k, n=n, between=())
    kernel = Kernel(label="", compute="", activations="", rate=rate)
    cost = linear_cost(linear, kernel, rows)
    return cost.decode_us, cost.prefill_us


@pytest.mark.parametrize(
    ("rate", "stored", "k", "n", "block", "microseconds"),
    [
        ("nbits integer", "nbits 4", 4096, 14336, 32, 1752),
        ("nbits integer", "nbits 4", 4096, 14336, 128, 1606),
        ("nbits integer", "nbits 4", 576, 1536, 32, 19),
        ("nbits integer", "nbits 8", 4096, 14336, 32, 2950),
        ("nbits float", "nbits 4", 4096, 14336, 32, 5944),
        ("nbits unpacked", "nbits 8", 576, 1536, 32, 1252),
        ("QLinearMatMul", "8 bits", 4096, 14336, 0, 4945),
        ("MatMulIntegerToFloat", "8 bits", 4096, 14336, 0, 3950),
        ("DynamicQuantizeMatMul", "8 bits", 4096, 14336, 0, 4926),
        ("MatMulInteger s8", "8 bits", 2048, 2048, 0, 3098),
        ("float", "float", 4096, 14336, 0, 14787),
        ("dequantized", "8 bits", 576, 1536, 0, 2843),
    ],
)
def test_one_token_is_predicted_within_a_factor_of_two(
    rate: str, stored: str, k: int, n: int, block: int, microseconds: float
) -> None:
    decode, _ = predicted(rate, stored, k, n, 1, block or 32)
    assert 0.5 < decode / microseconds < 2


@pytest.mark.parametrize(
    ("rate", "stored", "k", "n", "block", "microseconds"),
    [
        ("nbits integer", "nbits 4", 2048, 8192, 32, 63298),
        ("nbits integer", "nbits 4", 2048, 8192, 64, 60235),
        ("nbits integer", "nbits 4", 2048, 8192, 128, 45756),
        ("nbits integer", "nbits 8", 2048, 8192, 32, 60172),
        ("QLinearMatMul", "8 bits", 2048, 8192, 0, 23807),
        ("DynamicQuantizeMatMul", "8 bits", 2048, 8192, 0, 22634),
        ("MatMulInteger", "8 bits", 2048, 2048, 0, 9545),
        ("MatMulInteger s8", "8 bits", 2048, 2048, 0, 82868),
        ("float", "float", 2048, 8192, 0, 89021),
    ],
)
def test_512_tokens_are_predicted_within_half(
    rate: str, stored: str, k: int, n: int, block: int, microseconds: float
) -> None:
    _, prefill = predicted(rate, stored, k, n, 512, block or 32)
    assert 0.67 < prefill / microseconds < 1.5


def test_a_whole_step_is_predicted_near_its_profile() -> None:
    """SmolLM2-135M, 4 bits in blocks of 32, behind 540 tokens: 9.8 ms of nodes, measured."""
    shapes = [(576, 960), (576, 576), (576, 1536), (576, 1536), (1536, 576)] * 30 + [(576, 49152)]
    linears = sum(predicted("nbits integer", "nbits 4", k, n, 1)[0] for k, n in shapes)
    attention = attention_cost(cache_of(layers=30, heads=3, width=64), 540).decode_us
    others = other_cost(120, 576, 1).decode_us
    assert (linears + attention + others) / 9800 == pytest.approx(1, abs=0.3)
    assert attention / 2510 == pytest.approx(1, abs=0.3)


def cache_of(*, layers: int, heads: int, width: int) -> GraphView:
    inputs, nodes = [], []
    for layer in range(layers):
        for part in ("key", "value"):
            name = f"past_key_values.{layer}.{part}"
            inputs.append(h.make_tensor_value_info(name, TensorProto.FLOAT, [1, heads, "past", width]))
        nodes.append(h.make_node("GroupQueryAttention", [], [], num_heads=3 * heads, kv_num_heads=heads))
    return GraphView(h.make_model(h.make_graph(nodes, "g", inputs, [])))


def test_every_row_of_the_recognition_table_has_a_rate_and_every_rate_a_row() -> None:
    assert {row.rate for row in ROWS} == set(RATES)
