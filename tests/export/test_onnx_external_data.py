"""The data file: aligned, small tensors inline, shared bytes once, each tensor made exactly once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from qtool.quantize.export.onnx.external_data import SAME_BYTES_AS, save_model
from qtool.quantize.export.onnx.linears import add_initializer


def test_layout_and_contents(tmp_path, normal):
    arrays = {"first": normal(30, 40), "small": normal(10), "second": normal(300), "flat": None}
    arrays["flat"] = arrays["first"].reshape(-1)
    made, graph = [], ir.Graph([], [], nodes=[], name="g", opset_imports={"": 23})
    for name, array in arrays.items():

        def read(name: str = name, array: np.ndarray = array) -> ir.TensorProtocol:
            made.append(name)
            return ir.tensor(array)

        lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(array.shape), name=name)
        add_initializer(graph, name, lazy)
    graph.initializers["flat"].meta[SAME_BYTES_AS] = "first"
    steps = []
    save_model(ir.Model(graph, ir_version=11), tmp_path, lambda *step: steps.append(step))
    assert made == ["first", "small", "second"]
    assert steps == [(1, 4, "first"), (2, 4, "small"), (3, 4, "second"), (4, 4, "flat")]
    assert (tmp_path / "model.onnx.data").stat().st_size == 8192 + 300 * 4
    written = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    inline = {tensor.name: len(tensor.raw_data) for tensor in written}
    assert inline == {"first": 0, "small": 40, "second": 0, "flat": 0}
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
