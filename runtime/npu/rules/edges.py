"""Rules on what lies between nodes: quantizers on every float tensor, their scales, the activations' types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import TensorProto

from qtool.runtime.npu.rules.breach import Breach
from qtool.runtime.npu.rules.graph_view import GraphView, finite_positive, label
from qtool.runtime.npu.rules.operators import FIRST_INPUT_ONLY, MOVERS, QUANTIZERS, TAILS, WEIGHT_INPUT

ACTIVATIONS = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT8, TensorProto.INT16)
QUANTIZE = "wrap it: QuantizeLinear, DequantizeLinear"


def quantized_edges(view: GraphView) -> Iterator[Breach]:
    """Float tensors that reach or leave an operator without quantizers."""
    for node in view.nodes:
        if node.op_type in (*QUANTIZERS, "Constant"):
            continue
        for name in _float_inputs(view, node):
            producer = view.producer.get(name)
            if (producer is None or producer.op_type != "DequantizeLinear") and not _is_tail(view, node):
                kind = "constant" if view.is_constant(name) else "tensor"
                yield Breach(rule="quantized-edge", node=label(node), why=f"reads the float {kind} {name}",
                             remedy=QUANTIZE)
        for name in node.output:
            if not view.is_float(name):
                continue
            readers = [reader for reader in view.readers.get(name, []) if reader.op_type != "QuantizeLinear"]
            others = [reader for reader in readers if not _is_tail(view, reader)]
            if name in view.outputs or not view.readers.get(name):
                yield Breach(rule="quantized-edge", node=label(node), why=f"hands the float {name} out of the graph",
                             remedy="end the graph with QuantizeLinear, or with a DequantizeLinear behind it")
            elif others:
                yield Breach(rule="quantized-edge", node=label(node),
                             why=f"hands the float {name} to {label(others[0])}", remedy=QUANTIZE)


def constant_scales(view: GraphView) -> Iterator[Breach]:
    """Scales and zero points that are computed, or not positive."""
    for node in view.nodes:
        if node.op_type not in QUANTIZERS:
            if node.op_type == "DynamicQuantizeLinear":
                yield Breach(rule="constant-scale", node=label(node), why="finds its scale at run time",
                             remedy="use QuantizeLinear with a calibrated scale")
            continue
        for name in node.input[1:]:
            if name and not view.is_constant(name):
                yield Breach(rule="constant-scale", node=label(node), why=f"{name} is computed",
                             remedy="make it an initializer")
        scale = view.constant(node.input[1])
        if scale is not None and not finite_positive(scale):
            yield Breach(rule="constant-scale", node=label(node), why="its scale is not positive and finite",
                         remedy="calibrate again")


def activation_types(view: GraphView) -> Iterator[Breach]:
    """Nodes whose activations have several types, or one that the NPU does not have."""
    for node in view.nodes:
        if node.op_type in QUANTIZERS:
            continue
        names = [name for name in _activations(view, node) if not _is_weight(view, node, name)]
        read = [(name, _codes_type(view, name)) for name in names]
        written = [(name, kind) for name in node.output for kind in _written_types(view, name)]
        for name, kind in (*read, *written):
            if kind is not None and kind not in ACTIVATIONS:
                yield Breach(rule="activation-type", node=label(node), why=f"{name} is {_word(kind)}",
                             remedy="use uint16 or uint8")
        first = next((kind for _, kind in read if kind is not None), None)
        compared = [*(read if node.op_type not in WEIGHT_INPUT else read[:1]), *written]
        other = next(((name, kind) for name, kind in compared if kind not in (None, first)), None)
        if first is not None and other is not None:
            yield Breach(rule="activation-type", node=label(node),
                         why=f"reads {_word(first)}, but {other[0]} is {_word(other[1])}",
                         remedy="quantize once more in front of it: DequantizeLinear, QuantizeLinear")


def same_scales(view: GraphView) -> Iterator[Breach]:
    """Movers whose output has another scale than their input."""
    for node in view.nodes:
        if node.op_type not in MOVERS:
            continue
        source = view.producer.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        for reader in view.readers.get(node.output[0], []):
            if reader.op_type == "QuantizeLinear" and not _same(view, source, reader):
                yield Breach(rule="same-scale", node=label(node), why="its input and output have different scales",
                             remedy="give both the scale of the wider one")


def _is_tail(view: GraphView, node: Any) -> bool:
    """A Relu or Clip behind another node that only quantizers read."""
    producer = view.producer.get(node.input[0])
    behind = producer is not None and producer.op_type not in (*QUANTIZERS, *TAILS)
    readers = view.readers.get(node.output[0], [])
    quantized = bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
    return node.op_type in TAILS and behind and quantized and node.output[0] not in view.outputs


def _is_weight(view: GraphView, node: Any, name: str) -> bool:
    """A constant that is multiplied, or the bias beside it: the rules on weights look at those."""
    producer = view.producer.get(name)
    constant = producer is not None and bool(producer.input) and view.is_constant(producer.input[0])
    return constant and name in node.input[WEIGHT_INPUT.get(node.op_type, len(node.input)) :]


def _same(view: GraphView, one: Any, other: Any) -> bool:
    if list(one.input[1:]) == list(other.input[1:]):
        return True
    for a, b in zip(one.input[1:], other.input[1:], strict=False):
        left, right = view.constant(a), view.constant(b)
        if left is None or right is None or left.shape != right.shape or bool((left != right).any()):
            return False
    return len(one.input) == len(other.input)


def _float_inputs(view: GraphView, node: Any) -> list[str]:
    return [name for name in _activations(view, node) if view.is_float(name)]


def _activations(view: GraphView, node: Any) -> list[str]:
    names = node.input[:1] if node.op_type in FIRST_INPUT_ONLY else node.input
    return [name for name in names if name]


def _codes_type(view: GraphView, name: str) -> int | None:
    producer = view.producer.get(name)
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return view.element_type(producer.input[0])


def _written_types(view: GraphView, name: str) -> list[int | None]:
    ends: list[Any] = []
    for reader in view.readers.get(name, []):
        ends += view.readers[reader.output[0]] if _is_tail(view, reader) else [reader]
    return [view.element_type(end.output[0]) for end in ends if end.op_type == "QuantizeLinear"]


def _word(kind: int | None) -> str:
    return "unknown" if kind is None else TensorProto.DataType.Name(kind).lower()
