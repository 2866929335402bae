"""The static graph in float32: what the quantized one is measured on, and judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.npu.data_file import DataFile
from qtool.quantize.export.onnx.npu.plain_graph import Constant, PlainGraph

# By opset: the oldest IR version that has it.
IR_VERSIONS = {21: 10, 23: 11}
INPUT_TYPES = {"int32": TensorProto.INT32, "float32": TensorProto.FLOAT}

ReadLinear = Callable[[str], FloatArray]


def float_model(
    graph: PlainGraph, data: DataFile, read: ReadLinear, *, opset: int, watched: Sequence[str] = ()
) -> onnx.ModelProto:
    """The graph as it stands, in float32, its cache too.

    Args:
        graph: what to write.
        data: takes the constants.
        read: a linear's weight [K, N] by module.
        opset: of the default domain.
        watched: more tensors to hand out.
    """
    tensors = [_constant(name, constant, data, read) for name, constant in graph.constants.items()]
    nodes = [helper.make_node(n.op, list(n.inputs), [n.output], name=n.name, **n.attributes) for n in graph.nodes]
    outputs = []
    for name, tensor in graph.outputs.items():
        nodes.append(helper.make_node("Identity", [tensor], [name], name=f"/{name}/Identity"))
        outputs.append(name)
    inputs = [(name, INPUT_TYPES[kind], shape) for name, (kind, shape) in graph.inputs.items()]
    inputs += [(name, TensorProto.FLOAT, shape) for name, shape in graph.past.items()]
    seen = [*outputs, *(name for name in watched if name not in graph.past and name not in graph.inputs)]
    return model_of(nodes, inputs, [(name, TensorProto.FLOAT, None) for name in seen], tensors, opset=opset)


def model_of(
    nodes: Sequence[Any],
    inputs: Iterable[tuple[str, int, Sequence[int] | None]],
    outputs: Iterable[tuple[str, int, Sequence[int] | None]],
    tensors: Sequence[TensorProto],
    *,
    opset: int,
    properties: dict[str, str] | None = None,
) -> onnx.ModelProto:
    """A model of these parts."""
    graph = helper.make_graph(
        list(nodes),
        "model",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        initializer=list(tensors),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSIONS[opset])
    helper.set_model_props(model, dict(sorted((properties or {}).items())))
    return model


def index_tensor(name: str, constant: Constant) -> TensorProto:
    """A constant of integers; always inside the graph, where shape inference reads it."""
    return helper.make_tensor(name, TensorProto.INT64, constant.shape, next(constant.pieces()))


def _constant(name: str, constant: Constant, data: DataFile, read: ReadLinear) -> TensorProto:
    if constant.kind == "index":
        return index_tensor(name, constant)
    if constant.kind == "linear":
        return data.tensor(name, TensorProto.FLOAT, constant.shape, lambda: [read(constant.module)])
    return data.tensor(
        name, TensorProto.FLOAT, constant.shape, lambda: (piece.astype(np.float32) for piece in constant.pieces())
    )
