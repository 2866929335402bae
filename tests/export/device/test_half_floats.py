"""Float16 throughout a graph: constants, values, casts and attributes; logits alone stay float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.passes.half_floats import HalfFloats


def graph(weight: np.ndarray) -> ir.Model:
    nodes = [
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2), "two")),
        helper.make_node("Mul", ["floats", "two"], ["doubled"]),
        helper.make_node("Mul", ["doubled", "weight"], ["scaled"]),
        helper.make_node("Add", ["scaled", "past"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [3]),
            helper.make_tensor_value_info("past", TensorProto.FLOAT, [3]),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_every_float_is_half_and_logits_are_cast_back():
    import onnxruntime as ort

    model = graph(np.float32([1, 0.5, 1 / 3]))
    HalfFloats()(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    assert {t.data_type for t in proto.graph.initializer} == {TensorProto.FLOAT16}
    assert [v.type.tensor_type.elem_type for v in proto.graph.input] == [TensorProto.INT64, TensorProto.FLOAT16]
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["logits"], {"ids": np.array([3, 4, 5]), "past": np.float16([1, 1, 1])})[0]
    assert found.dtype == np.float32 and np.allclose(found, [7, 5, 1 + 10 / 3], atol=2e-3)


@pytest.mark.parametrize("value", [70000.0, float("nan")])
def test_a_number_that_float16_does_not_hold_is_refused_when_it_is_read(value):
    model = graph(np.float32([1, value, 1]))
    HalfFloats()(model)
    stored = model.graph.initializers["weight"].const_value
    assert stored is not None and stored.dtype == ir.DataType.FLOAT16
    with pytest.raises(InputRefused, match="weight"):
        stored.numpy()
