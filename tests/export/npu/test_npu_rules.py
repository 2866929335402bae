"""Each rule of the NPU checker finds its planted breach, names the node and the remedy, and nothing else is blamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtool.errors import InputRefused, UsageError
from qtool.runtime.npu.rules import RULES, check_file, check_model

U16, U8, I8 = TensorProto.UINT16, TensorProto.UINT8, TensorProto.INT8
NUMPY = {U16: np.uint16, U8: np.uint8, I8: np.int8, TensorProto.INT32: np.int32}


class Sketch:
    """A small graph in the making: every op between DequantizeLinear and QuantizeLinear."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8])
        self.opset = 21

    def constant(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = numpy_helper.from_array(array, name)
        return name

    def quantize(self, name: str, kind: int = U16, scale: float = 0.1, value: str | None = None) -> str:
        ends = [self.constant(f"{name}.scale{kind}", np.float32(scale)), self.constant(f"{name}.zero{kind}",
                NUMPY[kind](3))]
        codes = f"{name}.codes{kind}"
        self.node("QuantizeLinear", [value or name, *ends], codes, name=f"Q {name}")
        return self.node("DequantizeLinear", [codes, *ends], f"{name}.value{kind}", name=f"DQ {name}")

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        name = attributes.pop("name", op)
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def weight(self, codes: np.ndarray | None = None, scale: np.ndarray | None = None, zero: int = 0,
               **attributes: int) -> str:
        codes = np.ones((8, 6), np.int8) if codes is None else codes
        scale = np.full(6, 0.1, np.float32) if scale is None else scale
        inputs = [self.constant("w", codes), self.constant("w.scale", scale),
                  self.constant("w.zero", np.full(scale.shape, zero, codes.dtype))]
        return self.node("DequantizeLinear", inputs, "w.value", name="DQ w", **({"axis": 1} | attributes))

    def model(self, logits: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "g", [self.input], [helper.make_tensor_value_info(logits, TensorProto.FLOAT, None)],
            initializer=list(self.tensors.values()),
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def build(change: Callable[[Sketch], None] = lambda sketch: None, **options: object) -> onnx.ModelProto:
    """x → MatMul(weight) → Reshape → Sigmoid → out, with the planted change."""
    sketch = Sketch()
    kind = options.pop("activations", U16)
    x = sketch.quantize("x", kind)
    sketch.node("MatMul", [x, sketch.weight(**options.pop("weight", {}))], "y", name="product")
    y = sketch.quantize("y", options.pop("result", kind))
    shape = sketch.constant("shape", np.array([4, 6]))
    sketch.node("Reshape", [y, shape], "z", name="flat")
    z = sketch.quantize("z", kind, scale=options.pop("moved", 0.1))
    last = options.pop("op", ("Sigmoid", {}))
    sketch.node(last[0], [z], "s", name="last", **last[1])
    change(sketch)
    return sketch.model(sketch.quantize("s", kind))


def test_a_graph_that_keeps_all_rules_has_no_breach():
    for kind in (U16, U8):
        assert check_model(build(activations=kind)) == []
    four = numpy_helper.to_array(helper.make_tensor("w", TensorProto.INT4, [8, 6], [3, -8] * 24))
    assert check_model(build(weight={"codes": four})) == []
    blocks = {"scale": np.full((1, 6), 0.1, np.float32), "axis": 0, "block_size": 8}
    assert check_model(build(weight=blocks)) == []


def dynamic(sketch: Sketch) -> None:
    sketch.input.type.tensor_type.shape.dim[1].dim_param = "tokens"


def no_quantizer(sketch: Sketch) -> None:
    """The Sigmoid reads the Reshape itself."""
    sketch.nodes[-1].input[0] = "z"


def float_constant(sketch: Sketch) -> None:
    """One more node, whose constant has no quantizer."""
    sketch.nodes[-1].output[0] = "r"
    bias = sketch.constant("bias", np.ones(6, np.float32))
    sketch.node("Add", [sketch.quantize("r"), bias], "s", name="biased")


def computed_scale(sketch: Sketch) -> None:
    sketch.tensors.pop(f"z.scale{U16}")
    sketch.nodes.insert(0, helper.make_node("Identity", [f"y.scale{U16}"], [f"z.scale{U16}"], name="copied"))


def negative_scale(sketch: Sketch) -> None:
    sketch.constant(f"z.scale{U16}", np.float32(-0.1))
    sketch.constant(f"y.scale{U16}", np.float32(-0.1))


def old_opset(sketch: Sketch) -> None:
    sketch.opset = 20


def branch(sketch: Sketch) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["z"], ["inner"])], "b", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4, 6])],
    )
    sketch.nodes.append(helper.make_node("If", [sketch.constant("yes", np.array(True))], ["unused"], name="choice",
                                         then_branch=body, else_branch=body))


def six_dimensions(sketch: Sketch) -> None:
    sketch.constant("shape", np.array([1, 1, 1, 1, 4, 6]))


def foreign(sketch: Sketch) -> None:
    sketch.nodes[-1].domain = "my.ops"


PLANTED = [
    ("static-shape", "x", {"change": dynamic}),
    ("rank", "flat", {"change": six_dimensions}),
    ("control-flow", "choice", {"change": branch}),
    ("operator", "last", {"op": ("Erf", {})}),
    ("attribute", "last", {"op": ("LpNormalization", {"p": 1, "axis": -1})}),
    ("attribute", "last", {"op": ("LpNormalization", {"p": 2, "axis": 0})}),
    ("opset", "Q x", {"change": old_opset}),
    ("opset", "last", {"change": foreign}),
    ("quantized-edge", "last", {"change": no_quantizer}),
    ("quantized-edge", "biased", {"change": float_constant}),
    ("activation-type", "product", {"result": U8}),
    ("same-scale", "flat", {"moved": 0.2}),
    ("constant-scale", "Q z", {"change": computed_scale}),
    ("constant-scale", "Q z", {"change": negative_scale}),
    ("weight-type", "product", {"weight": {"codes": np.ones((8, 6), np.int32)}}),
    ("weight-axis", "product", {"weight": {"scale": np.full(8, 0.1, np.float32), "axis": 0}}),
    ("weight-axis", "product", {"weight": {"scale": np.full((8, 3), 0.1, np.float32), "axis": 1, "block_size": 2}}),
    ("weight-axis", "product", {"weight": {"scale": np.full((4, 6), 0.1, np.float32), "axis": 0, "block_size": 2}}),
    ("weight-axis", "product", {"activations": U8, "weight": {"scale": np.full((1, 6), 0.1, np.float32), "axis": 0,
                                                              "block_size": 8}}),
    ("weight-symmetry", "product", {"weight": {"zero": 3}}),
    ("weight-symmetry", "product", {"weight": {"codes": np.ones((8, 6), np.uint8), "zero": 128}}),
]


@pytest.mark.parametrize(("rule", "node", "planted"), PLANTED)
def test_a_planted_breach_is_found_at_its_node(rule, node, planted):
    breaches = check_model(build(**planted))
    hits = [breach for breach in breaches if breach.rule == rule and breach.node == node]
    assert hits, [breach.line() for breach in breaches]
    assert hits[0].remedy and hits[0].line().startswith(f"{rule}: {node}: ")


def test_every_rule_has_a_planted_breach():
    assert {rule for rule, _, _ in PLANTED} == set(RULES)


def test_scales_per_channel_belong_to_weights_alone():
    def plant(sketch: Sketch) -> None:
        for part in ("scale", "zero"):
            tensor = sketch.tensors[f"z.{part}{U16}"]
            sketch.constant(tensor.name, np.repeat(numpy_helper.to_array(tensor), 6))
        sketch.nodes[-2].attribute.append(helper.make_attribute("axis", 1))
        sketch.nodes[-3].attribute.append(helper.make_attribute("axis", 1))

    breaches = check_model(build(plant))
    assert ("weight-axis", "DQ z") in {(breach.rule, breach.node) for breach in breaches}


def test_a_scale_in_a_list_of_one_is_the_whole_tensors():
    def plant(sketch: Sketch) -> None:
        for name in (f"{tensor}.{part}{U16}" for tensor in "xyz" for part in ("scale", "zero")):
            sketch.constant(name, numpy_helper.to_array(sketch.tensors[name]).reshape(1))

    assert check_model(build(plant)) == []


def test_a_relu_in_front_of_a_quantizer_is_part_of_the_node_before_it():
    def plant(sketch: Sketch) -> None:
        sketch.nodes[-1].output[0] = "t"
        sketch.node("Relu", ["t"], "s", name="tail")

    assert check_model(build(plant)) == []

    def both(sketch: Sketch) -> None:
        plant(sketch)
        sketch.node("Neg", ["s"], "n", name="other")
        sketch.quantize("n")

    blamed = {breach.node for breach in check_model(build(both)) if breach.rule == "quantized-edge"}
    assert {"last", "tail", "other"} <= blamed


def test_zero_points_are_read_from_external_data_beside_the_file(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(build(weight={"zero": 3}), str(path), save_as_external_data=True, size_threshold=0, location="data.bin")
    assert "weight-symmetry" in {breach.rule for breach in check_file(path)}


def test_files_that_are_no_models_are_refused(tmp_path: Path):
    (tmp_path / "page.onnx").write_text("<html>not found</html>")
    with pytest.raises(InputRefused, match="not an ONNX model"):
        check_file(tmp_path / "page.onnx")
    with pytest.raises(UsageError, match="is no file"):
        check_file(tmp_path / "absent.onnx")
