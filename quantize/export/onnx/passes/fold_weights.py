"""Float linears store the weight that their node multiplies: Transpose and Concat are folded into the data.

A tied float head keeps the embedding's own [V, K] rows, which the lookup reads too, and multiplies their transpose
with com.microsoft::FusedMatMul: the table is stored once, and no transposed copy is made at load.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.linears import (
    Linear,
    add_initializer,
    drop_unused_initializers,
    find_linears,
    node_path,
)


class FoldWeights(ir.passes.InPlacePass):
    """Fold every linear that is still MatMul(x, Transpose(W)). Run after the quantized ones are lowered."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        linears = find_linears(model.graph)
        for linear in linears:
            _fold(model.graph, linear)
        return ir.passes.PassResult(model, bool(linears))


def _fold(graph: ir.Graph, linear: Linear) -> None:
    path = node_path(linear.name)
    shared = any(user.op_type == "Gather" for user in linear.weights[0].consumers())
    if shared:
        multiply = ir.node(
            "FusedMatMul",
            [linear.x, linear.weights[0]],
            {"transB": 1},
            domain="com.microsoft",
            name=f"{path}/FusedMatMul",
        )
    else:
        weight = _initializer(graph, f"{linear.name}.matrix", (linear.columns, sum(linear.rows)), _matrix, linear)
        multiply = ir.node("MatMul", [linear.x, weight], name=f"{path}/MatMul")
    nodes = [multiply]
    if linear.biases:
        bias = linear.biases[0]
        if len(linear.biases) > 1:
            bias = _initializer(graph, f"{linear.name}.bias", (sum(linear.rows),), _vector, linear)
        nodes.append(ir.node("Add", [multiply.outputs[0], bias], name=f"{path}/Add"))
    ir.convenience.replace_nodes_and_values(
        graph, linear.nodes[-1], linear.nodes, nodes, [linear.output], [nodes[-1].outputs[0]]
    )
    drop_unused_initializers(graph, (*linear.weights, *linear.biases))


def _initializer(
    graph: ir.Graph, name: str, shape: tuple[int, ...], make: Callable[[Linear], FloatArray], linear: Linear
) -> ir.Value:
    read = partial(_read, make, linear)
    return add_initializer(graph, name, ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name))


def _read(make: Callable[[Linear], FloatArray], linear: Linear) -> ir.TensorProtocol:
    return ir.tensor(make(linear))


def _matrix(linear: Linear) -> FloatArray:
    rows = np.concatenate([_data(weight) for weight in linear.weights])
    return np.ascontiguousarray(rows.T)


def _vector(linear: Linear) -> FloatArray:
    return np.concatenate([_data(bias) for bias in linear.biases])


def _data(value: ir.Value) -> FloatArray:
    assert value.const_value is not None
    array: FloatArray = value.const_value.numpy()
    return array
