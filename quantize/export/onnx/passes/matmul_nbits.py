"""Quantized linears become com.microsoft::MatMulNBits, with exactly the arithmetic of their scheme."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.export.onnx.cpu_target import per_token_int8
from qtool.quantize.export.onnx.graph_target import GRAPH_TARGETS, GraphTarget
from qtool.quantize.export.onnx.linears import (
    Linear,
    SchemeOf,
    add_initializer,
    drop_unused_initializers,
    find_linears,
    node_path,
)
from qtool.quantize.export.onnx.nbits_layout import NBitsArrays, blocks_of, nbits_arrays

CODES, SCALES, ZERO_POINTS, BIAS = "codes", "scales", "zero_points", "bias"


class MatMulNBits(ir.passes.InPlacePass):
    """Lower every linear that has a scheme; those for TokenInt8 are left to it.

    The initializers are called `{linear}.codes`, `.scales`, `.zero_points` and `.bias`. Their data is read when it
    is asked for, one linear at a time. Linears must be uniform (SplitPacked runs before).

    Args:
        scheme_of: the scheme of a module, None for float.
        quantized: reads one module's codes.
        target: what the nodes are for.

    Raises:
        UsageError: for a scheme that the target does not compute.
    """

    def __init__(
        self,
        scheme_of: SchemeOf,
        quantized: Callable[[str], QuantizedTensor],
        target: GraphTarget = GRAPH_TARGETS["cpu"],
    ) -> None:
        super().__init__()
        self._scheme_of, self._target = scheme_of, target
        # A node's tensors are written one after the other; remembering the last node reads each weight once.
        self._arrays = lru_cache(maxsize=1)(
            lambda modules: nbits_arrays([target.stored(quantized(m)) for m in modules])
        )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        linears = [linear for linear in find_linears(model.graph) if _in_groups(linear.scheme(self._scheme_of))]
        for linear in linears:
            self._lower(model.graph, linear)
        return ir.passes.PassResult(model, bool(linears))

    def _lower(self, graph: ir.Graph, linear: Linear) -> None:
        scheme = linear.scheme(self._scheme_of)
        assert scheme is not None
        nbits = self._target.nbits_for(linear.modules[0], scheme)
        rows, blocks = sum(linear.rows), blocks_of(linear.columns, nbits.block_size)
        inputs: list[ir.Value | None] = [
            linear.x,
            self._initializer(graph, linear, CODES, (rows, blocks, nbits.block_size * nbits.bits // 8)),
            self._initializer(graph, linear, SCALES, (rows, blocks)),
        ]
        if not scheme.weight.symmetric:
            inputs.append(self._initializer(graph, linear, ZERO_POINTS, (rows, -(-blocks * nbits.bits // 8))))
        if linear.biases and self._target.bias_inside:
            inputs += [None] * (5 - len(inputs)) + [_bias(graph, linear)]
        node = ir.node(
            "MatMulNBits",
            inputs,
            {
                "K": linear.columns,
                "N": rows,
                "bits": nbits.bits,
                "block_size": nbits.block_size,
                "accuracy_level": nbits.accuracy_level,
            },
            domain="com.microsoft",
            name=f"{node_path(linear.name)}/MatMulNBits",
        )
        nodes = [node]
        if linear.biases and not self._target.bias_inside:
            nodes.append(ir.node("Add", [node.outputs[0], _bias(graph, linear)], name=f"{node_path(linear.name)}/Add"))
        ir.convenience.replace_nodes_and_values(
            graph, linear.nodes[-1], linear.nodes, nodes, [linear.output], [nodes[-1].outputs[0]]
        )
        drop_unused_initializers(graph, (*linear.weights, *linear.biases))

    def _initializer(self, graph: ir.Graph, linear: Linear, part: str, shape: tuple[int, ...]) -> ir.Value:
        def read() -> ir.TensorProtocol:
            arrays: NBitsArrays = self._arrays(linear.modules)
            return ir.tensor(getattr(arrays, part))

        dtype = ir.DataType.FLOAT if part == SCALES else ir.DataType.UINT8
        name = f"{linear.name}.{part}"
        return add_initializer(graph, name, ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name))


def _in_groups(scheme: LayerScheme | None) -> bool:
    return scheme is not None and not per_token_int8(scheme)


def _bias(graph: ir.Graph, linear: Linear) -> ir.Value:
    if len(linear.biases) == 1:
        return linear.biases[0]
    tensors = [bias.const_value for bias in linear.biases]

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None]))

    name = f"{linear.name}.{BIAS}"
    shape = ir.Shape((sum(linear.rows),))
    return add_initializer(graph, name, ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name))
