"""The largest float16 magnitude of a graph, whatever the CPU provider keeps in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtool.errors import InputRefused
from qtool.runtime.device.half_range import largest_value

HALF = TensorProto.FLOAT16


def save(path: Path, factor: float, *, contrib: bool = False) -> Path:
    """ids → half → × factor → × 1/factor: what comes out is small whatever is between."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["start"], to=HALF),
        helper.make_node("Mul", ["start", "factor"], ["peak"]),
        helper.make_node("FusedMatMul", ["peak", "eye"], ["turned"], domain="com.microsoft")
        if contrib
        else helper.make_node("MatMul", ["peak", "eye"], ["turned"]),
        helper.make_node("Mul", ["turned", "back"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 3])],
        [helper.make_tensor_value_info("logits", HALF, [1, 3])],
        [
            numpy_helper.from_array(np.float16(factor), "factor"),
            numpy_helper.from_array(np.float16(1 / factor), "back"),
            numpy_helper.from_array(np.eye(3, dtype=np.float16) * np.float16(2), "eye"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("contrib", [False, True])
def test_the_largest_tensor_is_named(contrib, tmp_path):
    largest, where = largest_value(save(tmp_path / "m.onnx", 1000, contrib=contrib), np.array([[1, 2, 30]]), threads=1)
    assert (largest, where) == (60000, "turned")


@pytest.mark.parametrize("contrib", [False, True])
def test_an_overflow_is_seen_though_what_comes_out_is_finite(contrib, tmp_path):
    largest, where = largest_value(save(tmp_path / "m.onnx", 1200, contrib=contrib), np.array([[1, 2, 30]]), threads=1)
    assert largest > 65504 and where == "turned"


def test_a_graph_that_does_not_run_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", 10)
    with pytest.raises(InputRefused, match="cannot run it"):
        largest_value(path, np.array([[1, 2]]), threads=1)
