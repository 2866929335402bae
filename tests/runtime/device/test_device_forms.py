"""The form checkers find what is planted: each breach in a graph that has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtool.errors import InputRefused, UsageError
from qtool.runtime.device.cuda_form import cuda_breaches
from qtool.runtime.device.graph_file import GraphFile, checker_breaches
from qtool.runtime.device.tensorrt_form import tensorrt_breaches

FP8, INT4, HALF, FULL = TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT16, TensorProto.FLOAT
FORMS = {"a": "fp8 per tensor", "b": "int4 blocks"}
NODES = {"/a/MatMulNBits": {"modules": ["a"], "rows": [32]}}


def raw(name: str, element: int, dims: list[int], data: bytes) -> TensorProto:
    return TensorProto(name=name, data_type=element, dims=dims, raw_data=data)


def trt_model() -> onnx.ModelProto:
    """x [1, T, 64] through an FP8 linear `a` [64, 64] and an INT4 linear `b` [64, 32]."""
    constants = [
        raw("a.codes", FP8, [64, 64], bytes(64 * 64)),
        raw("b.codes", INT4, [64, 32], bytes(64 * 32 // 2)),
        raw("a.zero", FP8, [], bytes(1)),
        numpy_helper.from_array(np.full(64, 0.1, np.float16), "a.scale"),
        numpy_helper.from_array(np.full((1, 32), 0.1, np.float16), "b.scale"),
        numpy_helper.from_array(np.float16(0.1), "a.step"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "a.step", "a.zero"], ["xq"], name="Q"),
        helper.make_node("DequantizeLinear", ["xq", "a.step", "a.zero"], ["xd"], name="DQ"),
        helper.make_node("DequantizeLinear", ["a.codes", "a.scale"], ["a.weight"], name="WA", axis=1),
        helper.make_node("MatMul", ["xd", "a.weight"], ["h"], name="MA"),
        helper.make_node("DequantizeLinear", ["b.codes", "b.scale"], ["b.weight"], name="WB", axis=0, block_size=64),
        helper.make_node("MatMul", ["h", "b.weight"], ["y"], name="MB"),
    ]
    values = [helper.make_tensor_value_info(n, HALF, [1, "T", w]) for n, w in (("x", 64), ("y", 32))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.name == name)


def constant(model: onnx.ModelProto, array: np.ndarray | TensorProto, name: str) -> None:
    found = next(one for one in model.graph.initializer if one.name == name)
    found.CopyFrom(array if isinstance(array, TensorProto) else numpy_helper.from_array(array, name))


def attribute(name: str, key: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(one for one in node(model, name).attribute if one.name == key).i = value

    return change


def replaced(array: np.ndarray | TensorProto, name: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: constant(model, array, name)


def unquantized(model: onnx.ModelProto) -> None:
    node(model, "MA").input[0] = "x"


def swapped_steps(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float16(0.2), "other"))
    node(model, "DQ").input[1] = "other"


def quantized_before_int4(model: onnx.ModelProto) -> None:
    node(model, "MB").input[0] = "xd"


def with_zero_points(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(raw("z", INT4, [1, 32], bytes(16)))
    node(model, "WB").input.append("z")


def stray(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("QuantizeLinear", ["y", "a.step", "a.zero"], ["q"], name="stray"))


def contrib(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node.append(helper.make_node("Gelu", ["y"], ["g"], name="G", domain="com.microsoft"))


TRT_PLANTED = {
    "blocks of 32": (attribute("WB", "block_size", 32), "WB: axis 0, block 32"),
    "blocks along the outputs": (attribute("WB", "axis", 1), "WB: axis 1"),
    "channels along the inputs": (attribute("WA", "axis", 0), "WA: axis 0"),
    "float scales": (replaced(np.full((1, 32), 0.1, np.float32), "b.scale"), "scales of float"),
    "E5M2 codes": (
        replaced(raw("a.codes", TensorProto.FLOAT8E5M2, [64, 64], bytes(4096)), "a.codes"),
        "codes of float8e5m2",
    ),
    "a scale for every token": (replaced(np.full(64, 0.1, np.float16), "a.step"), "one float16 constant"),
    "a zero point that is not zero": (
        replaced(raw("a.zero", FP8, [], b"\x38"), "a.zero"), "zero point 1, must be 0",
    ),
    "INT8 inputs before FP8 weights": (
        replaced(raw("a.zero", TensorProto.INT8, [], b"\0"), "a.zero"),
        "codes are not of fp8",
    ),
    "an input left in float": (unquantized, "MA: inputs are not quantized"),
    "Q and DQ that differ": (swapped_steps, "differ in scale"),
    "quantized inputs before INT4": (quantized_before_int4, "MB: quantized inputs before INT4"),
    "asymmetric weights": (with_zero_points, "WB: a zero point"),
    "a stray quantizer": (stray, "stray: QuantizeLinear outside"),
    "a contrib operator": (contrib, "com.microsoft::Gelu"),
}  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[onnx.ModelProto], GraphFile]:
    def save(model: onnx.ModelProto) -> GraphFile:
        onnx.save(model, tmp_path / "model.onnx")
        return GraphFile(tmp_path / "model.onnx")

    return save


def test_the_documented_patterns_pass(saved):
    file = saved(trt_model())
    assert tensorrt_breaches(file, FORMS) == [] and checker_breaches(file.path) == []


@pytest.mark.parametrize("name", TRT_PLANTED)
def test_a_planted_breach_of_tensorrts_forms_is_found(name, saved):
    plant, line = TRT_PLANTED[name]
    model = trt_model()
    plant(model)
    found = tensorrt_breaches(saved(model), FORMS)
    assert any(line in breach for breach in found), found


def test_linears_are_compared_with_the_manifest(saved):
    file = saved(trt_model())
    assert tensorrt_breaches(file, {"a": FORMS["a"]}) == [
        "MB: a quantized linear that the manifest does not name",
    ]
    assert tensorrt_breaches(file, {**FORMS, "c": "int4 blocks"}) == ["c: should be int4 blocks, and is not quantized"]
    assert any("codes of int4, not of fp8" in line for line in tensorrt_breaches(file, {**FORMS, "b": FORMS["a"]}))


def test_a_newer_opset_is_a_breach(saved):
    model = trt_model()
    model.opset_import[0].version = 23
    assert any("opset onnx 23" in line for line in tensorrt_breaches(saved(model), FORMS))


def test_onnxs_checker_finds_types_that_do_not_fit(saved):
    model = trt_model()
    constant(model, np.full((1, 32), 0.1, np.float32), "b.scale")
    assert len(checker_breaches(saved(model).path)) == 1


def cuda_model() -> onnx.ModelProto:
    """x [1, T, 64] through a MatMulNBits of 32 rows, 4 bits, blocks of 32."""
    constants = [
        numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "codes"),
        numpy_helper.from_array(np.full((32, 2), 0.1, np.float16), "scales"),
    ]
    product = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"],
        name="/a/MatMulNBits", domain="com.microsoft", K=64, N=32, bits=4, block_size=32, accuracy_level=0,
    )  # fmt: skip
    cast = helper.make_node("Cast", ["y"], ["logits"], to=FULL, name="/lm_head/Cast")
    graph = helper.make_graph(
        [product, cast], "g",
        [helper.make_tensor_value_info("x", HALF, [1, "T", 64])],
        [helper.make_tensor_value_info("logits", FULL, [1, "T", 32])],
        constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def float_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = FULL


def biased(model: onnx.ModelProto) -> None:
    model.graph.node[0].input.extend(["", "", "scales"])


def cpu_product(model: onnx.ModelProto) -> None:
    model.graph.node.append(
        helper.make_node("MatMulIntegerToFloat", ["x"], ["z"], name="I", domain="com.microsoft")
    )


CUDA_PLANTED = {
    "INT8 activations": (attribute("/a/MatMulNBits", "accuracy_level", 4), "accuracy_level 4"),
    "blocks of 512": (attribute("/a/MatMulNBits", "block_size", 512), "blocks of 512"),
    "two bits": (attribute("/a/MatMulNBits", "bits", 2), "2 bits"),
    "float scales": (replaced(np.full((32, 2), 0.1, np.float32), "scales"), "scales scales are not float16"),
    "a float input": (float_input, "x: float, not float16"),
    "a bias in the node": (biased, "a bias inside"),
    "a kernel of the CPU": (cpu_product, "MatMulIntegerToFloat has no float16 kernel"),
    "Q and DQ": (
        lambda model: model.graph.node.append(helper.make_node("DequantizeLinear", ["codes"], ["d"], name="D")),
        "DequantizeLinear is not fused",
    ),
}


@pytest.mark.parametrize("name", CUDA_PLANTED)
def test_a_planted_breach_of_cudas_form_is_found(name, saved):
    assert cuda_breaches(saved(cuda_model()), NODES) == []
    plant, line = CUDA_PLANTED[name]
    model = cuda_model()
    plant(model)
    found = cuda_breaches(saved(model), NODES)
    assert any(line in breach for breach in found), found


def test_lowered_nodes_are_compared_with_the_manifest(saved):
    file = saved(cuda_model())
    assert cuda_breaches(file, {}) == ["/a/MatMulNBits: not in the manifest"]
    assert "/b/MatMulNBits: not in the graph" in cuda_breaches(file, {**NODES, "/b/MatMulNBits": {}})


def test_what_is_no_graph_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        GraphFile(tmp_path / "model.onnx")
    (tmp_path / "model.onnx").write_bytes(b"\xff\xffnothing")
    with pytest.raises(InputRefused, match="no ONNX file"):
        GraphFile(tmp_path / "model.onnx")
