"""Rules on the graph's form: opsets, shapes, ranks, control flow, operators, attributes."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import AttributeProto, TensorProto

from qtool.runtime.npu.rules.breach import Breach
from qtool.runtime.npu.rules.graph_view import GraphView, label
from qtool.runtime.npu.rules.operators import (
    ATTRIBUTES,
    CONTRIB,
    CONTROL_FLOW,
    DEFAULT,
    DOMAINS,
    QUANTIZERS,
    SINCE,
    WIDE_TYPES_SINCE,
)

HIGHEST_RANK = 5
WIDE_TYPES = (TensorProto.UINT16, TensorProto.INT16, TensorProto.UINT4, TensorProto.INT4)


def opsets(view: GraphView) -> Iterator[Breach]:
    """Foreign domains, operators and types newer than the opset."""
    version = view.opsets.get("", 1)
    for node in view.nodes:
        if node.domain not in DOMAINS:
            yield Breach(rule="opset", node=label(node), why=f"is of domain {node.domain}",
                         remedy="use standard operators")
        elif not node.domain and version < SINCE.get(node.op_type, 1):
            yield Breach(rule="opset", node=label(node), why=f"{node.op_type} is not in opset {version}",
                         remedy=f"declare opset {SINCE[node.op_type]}")
        elif node.op_type in QUANTIZERS and not node.domain and version < WIDE_TYPES_SINCE:
            codes = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            if view.element_type(codes) in WIDE_TYPES:
                yield Breach(rule="opset", node=label(node), why=f"16- and 4-bit codes are not in opset {version}",
                             remedy=f"declare opset {WIDE_TYPES_SINCE}, or use com.microsoft's {node.op_type}")


def shapes(view: GraphView) -> Iterator[Breach]:
    """Dimensions that are not fixed, and too many of them, of the inputs and of what every node makes."""
    names = [(value.name, value.name) for value in view.inputs]
    names += [(name, label(node)) for node in view.nodes for name in node.output if name]
    for name, where in names:
        shape = view.shape(name)
        if shape is None:
            yield Breach(rule="static-shape", node=where, why=f"{name} has no known shape",
                         remedy="give the inputs fixed sizes and run shape inference")
            continue
        loose = [d for d in shape if not isinstance(d, int) or d <= 0]
        if loose:
            yield Breach(rule="static-shape", node=where, why=f"{name} has dimension {loose[0]!r}",
                         remedy="fix it (onnxruntime.tools.make_dynamic_shape_fixed)")
        if len(shape) > HIGHEST_RANK:
            yield Breach(rule="rank", node=where, why=f"{name} has {len(shape)} dimensions",
                         remedy=f"reshape to {HIGHEST_RANK} or fewer")


def operators(view: GraphView) -> Iterator[Breach]:
    """Control flow, and operators without a builder."""
    for function in view.model.functions:
        yield Breach(rule="control-flow", node=function.name, why="is a function of the model",
                     remedy="inline it (onnx.inliner)")
    for node in view.nodes:
        graphs = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)
        if node.op_type in CONTROL_FLOW or graphs:
            yield Breach(rule="control-flow", node=label(node), why=f"{node.op_type} runs a graph of its own",
                         remedy="unroll it, or export one branch")
        elif node.op_type != "Constant" and node.op_type not in (CONTRIB if node.domain else DEFAULT):
            yield Breach(rule="operator", node=label(node), why=f"{node.op_type} has no builder",
                         remedy="expand it into standard operators")


def attributes(view: GraphView) -> Iterator[Breach]:
    """Forms that a builder does not take."""
    for node in view.nodes:
        for name, allowed in ATTRIBUTES.get(node.op_type, {}).items():
            given = next((int(a.i) for a in node.attribute if a.name == name), None)
            rank = len(view.shape(node.input[0]) or ())
            same = given - rank if name == "axis" and given is not None and given >= 0 else given
            if same is not None and same not in allowed:
                yield Breach(rule="attribute", node=label(node), why=f"{name} is {given}",
                             remedy=f"use {' or '.join(map(str, allowed))}")
