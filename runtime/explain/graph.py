"""An ONNX graph to ask questions of: who makes a value, who reads it, of which stored tensors it is made.

Bodies of If and Loop are part of it, so a file with two branches shows the nodes of both. Weights are never read: a
tensor is its type and shape.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx

Node = Any  # onnx.NodeProto
TYPE_NAMES: dict[int, str] = {
    number: name.lower().replace("float8", "fp8_")
    for name, number in onnx.TensorProto.DataType.items()
}
BITS: dict[str, int] = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4e2m1": 4, "float": 32, "double": 64}
BITS |= {"int64": 64, "uint64": 64, "int32": 32, "uint32": 32, "int16": 16, "uint16": 16, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor that the file holds.

    Attributes:
        name: the initializer's, or the value's that a Constant node makes.
        dtype: ONNX's name in small letters: "float", "int4", "fp8_e4m3fn", ….
        shape: as stored.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Its bytes, sub-byte types packed."""
        return -(-self.elements * BITS.get(self.dtype, 8) // 8)


class GraphView:
    """The nodes of a model, its bodies included.

    Args:
        model: an onnx.ModelProto.

    Attributes:
        nodes: in the file's order.
        producer: value name to the node that makes it.
        readers: value name to the nodes that read it.
        stored: value name to the tensor that the file holds under it.
        inputs, outputs: the model's own, name to (element type, dimensions: int, or str for a symbol).
    """

    def __init__(self, model: Any) -> None:
        self.nodes: list[Node] = []
        self.producer: dict[str, Node] = {}
        self.readers: dict[str, list[Node]] = defaultdict(list)
        self.stored: dict[str, Stored] = {}
        self.inputs = {value.name: _interface(value) for value in model.graph.input}
        self.outputs = {value.name: _interface(value) for value in model.graph.output}
        for graph in graphs_of(model.graph):
            self._add(graph)
        for name in self.stored:
            self.inputs.pop(name, None)  # before IR 4 initializers are listed as inputs too
        self._made_of: dict[str, tuple[Stored, ...]] = {name: (tensor,) for name, tensor in self.stored.items()}
        for node in self.nodes:
            self._trace(node)

    def made_of(self, value: str) -> tuple[Stored, ...]:
        """The stored tensors that a value is computed from, itself included; empty when something else goes in too."""
        return self._made_of.get(value, ())

    def dtype(self, value: str) -> str | None:
        """A value's element type, where the graph says it without type inference."""
        if value in self.stored:
            return self.stored[value].dtype
        if value in self.inputs:
            return self.inputs[value][0]
        node = self.producer.get(value)
        return _made_type(self, node) if node is not None else None

    def _trace(self, node: Node) -> None:
        """Note of what a node's outputs are made; a file's nodes come after those that they read."""
        parts = [self.made_of(name) for name in node.input if name]
        if not parts or not all(parts) or any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute):
            return
        made_of = tuple(dict.fromkeys(tensor for part in parts for tensor in part))
        for name in node.output:
            self._made_of[name] = made_of

    def _add(self, graph: Any) -> None:
        for tensor in graph.initializer:
            self.stored[tensor.name] = _stored(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            self.stored[sparse.values.name] = _stored(sparse.values.name, sparse.values)
        for node in graph.node:
            if node.op_type == "Constant":
                tensor = next((a.t for a in node.attribute if a.name == "value"), None)
                name = node.output[0]
                self.stored[name] = _stored(name, tensor) if tensor else Stored(name=name, dtype="constant", shape=())
                continue
            self.nodes.append(node)
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                self.readers[name].append(node)


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and every body inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_of(attribute.g)


def attribute(node: Node, name: str, default: int = 0) -> int:
    """An integer attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def input_at(node: Node, index: int) -> str:
    """The name of an input, empty where it is left out."""
    return str(node.input[index]) if index < len(node.input) else ""


def _stored(name: str, tensor: Any) -> Stored:
    return Stored(name=name, dtype=TYPE_NAMES.get(tensor.data_type, "unknown"), shape=tuple(tensor.dims))


def _interface(value: Any) -> tuple[str, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)
    return TYPE_NAMES.get(kind.elem_type, "unknown"), dims


def _made_type(view: GraphView, node: Node) -> str | None:
    if node.op_type == "QuantizeLinear":
        asked = attribute(node, "output_dtype")
        zero = input_at(node, 2)
        return view.dtype(zero) if zero else TYPE_NAMES[asked] if asked else "uint8"
    if node.op_type == "DynamicQuantizeLinear":
        return "uint8"
    if node.op_type == "Cast":
        return TYPE_NAMES.get(attribute(node, "to"))
    if node.op_type in ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten"):
        return view.dtype(input_at(node, 0))
    return None
