"""Linear layers as the graph holds them: MatMul(x, Transpose(W)), with Add(·, bias) where the layer has one.

A packed linear computes several modules at once, from weights concatenated along N (query, key and value).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qtool.quantize.artifacts.scheme import LayerScheme

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD = "lm_head"
PACKED_NAMES = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}

SchemeOf = Callable[[str], LayerScheme | None]
# What modules that one node computes must have in common.
KindOf = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear in the graph.

    Attributes:
        modules: the module names it computes, in the order of their rows.
        x: its input [B, T, K].
        output: its result [B, T, ΣN], after the bias.
        weights: the initializers [N, K], one a module.
        biases: the initializers [N], one a module, or none.
        nodes: every node it consists of, in graph order.
    """

    modules: tuple[str, ...]
    x: ir.Value
    output: ir.Value
    weights: tuple[ir.Value, ...]
    biases: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """Its module's name, or for a packed linear the name of the pack, "model.layers.0.self_attn.qkv_proj"."""
        return packed_name(self.modules)

    @property
    def columns(self) -> int:
        """K."""
        return _dimension(self.weights[0], 1)

    @property
    def rows(self) -> tuple[int, ...]:
        """N of each module."""
        return tuple(_dimension(weight, 0) for weight in self.weights)

    def scheme(self, scheme_of: SchemeOf) -> LayerScheme | None:
        """The scheme of its modules, None for float. Only for a uniform linear."""
        return scheme_of(self.modules[0])

    def uniform(self, kind_of: KindOf) -> bool:
        """Whether all its modules are of one kind."""
        return all(kind_of(module) == kind_of(self.modules[0]) for module in self.modules)


def packed_name(modules: tuple[str, ...]) -> str:
    """The name of modules that one node computes."""
    if len(modules) == 1:
        return modules[0]
    parent = modules[0].rpartition(".")[0]
    leaves = tuple(module.rpartition(".")[2] for module in modules)
    return f"{parent}.{PACKED_NAMES.get(leaves, '_'.join(leaves))}"


def node_path(module: str) -> str:
    """A module name as a node path: "model.layers.3.mlp.down_proj" is "/model/layers.3/mlp/down_proj"."""
    return "/" + re.sub(r"\.(?!\d)", "/", module)


def find_linears(graph: ir.Graph) -> list[Linear]:
    """All linears, in graph order."""
    found = [_linear(node) for node in graph if node.op_type == "MatMul"]
    return [linear for linear in found if linear is not None]


def emit_linear(
    x: ir.Value, weights: tuple[ir.Value, ...], biases: tuple[ir.Value, ...]
) -> tuple[list[ir.Node], ir.Value]:
    """The nodes of a float linear in the form that `find_linears` finds, and its output."""
    nodes: list[ir.Node] = []

    def add(op: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        nodes.append(node)
        return node.outputs[0]

    weight = weights[0] if len(weights) == 1 else add("Concat", list(weights), axis=0)
    out = add("MatMul", [x, add("Transpose", [weight], perm=[1, 0])])
    if biases:
        bias = biases[0] if len(biases) == 1 else add("Concat", list(biases), axis=0)
        out = add("Add", [out, bias])
    return nodes, out


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of this name."""
    shape, element = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, shape=shape, type=element, const_value=tensor)
    graph.register_initializer(value)
    return value


def drop_unused_initializers(graph: ir.Graph, values: tuple[ir.Value, ...]) -> None:
    """Remove those of the initializers that no node reads any more."""
    for value in values:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def _linear(matmul: ir.Node) -> Linear | None:
    x, right = matmul.inputs
    transpose = right.producer() if right is not None else None
    if x is None or transpose is None or transpose.op_type != "Transpose":
        return None
    packed = _parts(transpose.inputs[0], ".weight")
    if packed is None:
        return None
    weights, weight_nodes = packed
    nodes, output = [*weight_nodes, transpose, matmul], matmul.outputs[0]
    biases: tuple[ir.Value, ...] = ()
    added = _bias(output)
    if added is not None:
        biases, bias_nodes = added
        nodes += bias_nodes
        output = bias_nodes[-1].outputs[0]
    modules = tuple(_module(weight) for weight in weights)
    return Linear(modules=modules, x=x, output=output, weights=weights, biases=biases, nodes=tuple(nodes))


def _parts(value: ir.Value | None, suffix: str) -> tuple[tuple[ir.Value, ...], list[ir.Node]] | None:
    """The initializers behind a value: itself, or what a Concat along axis 0 joins; and the Concat."""
    if value is None:
        return None
    concat = value.producer()
    if concat is not None and concat.op_type != "Concat":
        return None
    parts = (value,) if concat is None else tuple(part for part in concat.inputs if part is not None)
    if not all(part.is_initializer() and str(part.name).endswith(suffix) for part in parts):
        return None
    return parts, [] if concat is None else [concat]


def _bias(output: ir.Value) -> tuple[tuple[ir.Value, ...], list[ir.Node]] | None:
    consumers = output.consumers()
    if len(consumers) != 1 or consumers[0].op_type != "Add":
        return None
    other = [value for value in consumers[0].inputs if value is not output]
    parts = _parts(other[0], ".bias") if other else None
    return None if parts is None else (parts[0], [*parts[1], consumers[0]])


def _module(weight: ir.Value) -> str:
    name = str(weight.name)
    return HEAD if name == EMBEDDING_WEIGHT else name.removesuffix(".weight")


def _dimension(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    return int(value.shape[axis])  # type: ignore[arg-type]
