"""One node at both levels: both are timed, and both are what their names say."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qtool.errors import InputRefused
from qtool.runtime.verification import level_times as module
from qtool.runtime.verification.level_times import FLOAT_LEVEL, INT8_LEVEL, level_times

K, N, BLOCK = 64, 48, 32
NAME = "/layer/MatMulNBits"


@pytest.fixture
def graph() -> ir.Model:
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 256, (N, K // BLOCK, BLOCK // 2), dtype=np.uint8)
    scales = generator.random((N, K // BLOCK), dtype=np.float32) + 0.5
    x = ir.Value(name="x", shape=ir.Shape(["m", K]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = [
        ir.Value(name=name, const_value=ir.tensor(array), shape=ir.Shape(array.shape))
        for name, array in (("codes", codes), ("scales", scales))
    ]
    attributes = {"K": K, "N": N, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    node = ir.node("MatMulNBits", [x, *stored], attributes, domain="com.microsoft", name=NAME)
    y = node.outputs[0]
    y.name, y.type = "out", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": 21, "com.microsoft": 1}
    return ir.Model(ir.Graph([x], [y], nodes=[node], initializers=stored, opset_imports=imports), ir_version=10)


def test_both_levels_are_timed_in_turn(graph: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    real = module._turn

    def turn(session: Any, x: np.ndarray, calls: int) -> float:
        asked.append((id(session), len(x)))
        return real(session, x, calls)

    monkeypatch.setattr(module, "_turn", turn)
    found = level_times(graph, NAME, rounds={1: 4, 8: 2}, threads=1)
    assert set(found) == {1, 8}
    assert all(time > 0 for pair in found.values() for time in pair)
    single = [session for session, rows in asked if rows == 1][4:]  # behind the warming up
    first, second = single[:2]
    assert single == [first, second, second, first, first, second, second, first]
    assert len([1 for _, rows in asked if rows == 8]) == 4 + 4


def test_the_levels_compute_what_they_are_called(graph: ir.Model) -> None:
    node = graph.graph.node(NAME)
    x = np.random.default_rng(1).standard_normal((3, K), dtype=np.float32)
    codes = node.inputs[1].const_value.numpy()
    table = np.stack([codes & 15, codes >> 4], -1).reshape(N, K // BLOCK, BLOCK).astype(np.float64) - 8
    weight = (table * node.inputs[2].const_value.numpy()[..., None]).reshape(N, K)
    blocks = x.reshape(3, -1, BLOCK)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    rounded = (np.round(blocks / step) * step).reshape(3, K)
    wanted = {FLOAT_LEVEL: x @ weight.T, INT8_LEVEL: rounded @ weight.T}
    for level, answer in wanted.items():
        got = module._session(graph, node, level, 1).run(None, {"x0": x})[0]
        assert np.abs(got - answer).max() <= 1e-5 * np.abs(answer).max()
    assert np.abs(wanted[FLOAT_LEVEL] - wanted[INT8_LEVEL]).max() > 1e-4 * np.abs(wanted[FLOAT_LEVEL]).max()


def test_a_node_that_the_runtime_refuses_is_named(graph: ir.Model) -> None:
    graph.graph.node(NAME).attributes["block_size"] = ir.AttrInt64("block_size", 24)
    with pytest.raises(InputRefused, match="MatMulNBits"):
        level_times(graph, NAME, rounds={1: 1}, threads=1)
