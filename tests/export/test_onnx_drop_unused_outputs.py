"""DropUnusedOutputs: unread outputs in the middle lose their name, those at the end go; the result stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qtool.quantize.export.onnx.linears import add_initializer
from qtool.quantize.export.onnx.passes.drop_unused_outputs import DropUnusedOutputs


@pytest.mark.parametrize(("read", "names"), [([0], ["a"]), ([0, 3], ["a", "", "", "d"])])
def test_unread_outputs(read, names, run_model, normal):
    value = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["b", "t", 8]), type=value)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23, "com.microsoft": 1}, name="g")
    gamma = add_initializer(graph, "w", ir.tensor(np.ones(8, np.float32), name="w"))
    norm = ir.node(
        "SkipSimplifiedLayerNormalization", [x, x, gamma], {"epsilon": 1e-5}, domain="com.microsoft", num_outputs=4
    )
    graph.append(norm)
    for output, name in zip(norm.outputs, "abcd", strict=True):
        output.name, output.type, output.shape = name, value, ir.Shape(["b", "t", None])
    graph.outputs.extend([norm.outputs[index] for index in read])
    model = ir.Model(graph, ir_version=11)
    feeds = {"x": normal(1, 2, 8)}
    before = run_model(model, **feeds)
    assert DropUnusedOutputs()(model).modified
    assert [output.name for output in norm.outputs] == names
    for got, wanted in zip(run_model(model, **feeds), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert not DropUnusedOutputs()(model).modified
