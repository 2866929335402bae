"""A tied, quantized head also serves the embedding lookup: GatherBlockQuantized on the same bytes.

MatMulNBits wants its codes as [N, blocks, bytes], GatherBlockQuantized as [N, bytes]. The second initializer is
marked as the same bytes in another shape, so the data file holds them once and both nodes map the same pages.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qtool.quantize.export.onnx.external_data import SAME_BYTES_AS
from qtool.quantize.export.onnx.linears import EMBEDDING_WEIGHT, HEAD, add_initializer, drop_unused_initializers
from qtool.quantize.export.onnx.passes.matmul_nbits import CODES, SCALES, ZERO_POINTS

EMBEDDING_PATH = "/model/embed_tokens"


class TiedEmbedding(ir.passes.InPlacePass):
    """Replace the float Gather on the embedding where the head was lowered. For tied models, after MatMulNBits.

    Rows come out dequantized; where K is not whole blocks, the filling is sliced off.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        head = next((node for node in model.graph if _is_lowered_head(node)), None)
        gather = next((node for node in model.graph if _is_lookup(node)), None)
        if head is None or gather is None:
            return ir.passes.PassResult(model, False)
        _replace(model.graph, head, gather)
        return ir.passes.PassResult(model, True)


def _is_lowered_head(node: ir.Node) -> bool:
    return node.op_type == "MatMulNBits" and _name(node, 1) == f"{HEAD}.{CODES}"


def _is_lookup(node: ir.Node) -> bool:
    return node.op_type == "Gather" and _name(node, 0) == EMBEDDING_WEIGHT


def _name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index]
    return value.name if value is not None else None


def _replace(graph: ir.Graph, head: ir.Node, gather: ir.Node) -> None:
    weight, ids = gather.inputs
    inputs: list[ir.Value | None] = [_flat_codes(graph), ids, graph.initializers[f"{HEAD}.{SCALES}"]]
    if f"{HEAD}.{ZERO_POINTS}" in graph.initializers:
        inputs.append(graph.initializers[f"{HEAD}.{ZERO_POINTS}"])
    block_size = head.attributes["block_size"].as_int()
    lookup = ir.node(
        "GatherBlockQuantized",
        inputs,
        {
            "bits": head.attributes["bits"].as_int(),
            "block_size": block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        domain="com.microsoft",
        name=f"{EMBEDDING_PATH}/GatherBlockQuantized",
    )
    nodes = [lookup]
    columns = head.attributes["K"].as_int()
    if columns % block_size:
        nodes.append(_slice(graph, lookup.outputs[0], columns))
    ir.convenience.replace_nodes_and_values(
        graph, gather, [gather], nodes, [gather.outputs[0]], [nodes[-1].outputs[0]]
    )
    assert weight is not None
    drop_unused_initializers(graph, (weight,))


def _flat_codes(graph: ir.Graph) -> ir.Value:
    codes = graph.initializers[f"{HEAD}.{CODES}"]
    assert codes.shape is not None and codes.const_value is not None
    rows, *rest = codes.shape.numpy()
    name, source = f"model.embed_tokens.{CODES}", codes.const_value
    shape = ir.Shape((rows, math.prod(rest)))

    def read() -> ir.TensorProtocol:
        return ir.tensor(source.numpy().reshape(rows, -1))

    flat = add_initializer(graph, name, ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=shape, name=name))
    flat.meta[SAME_BYTES_AS] = codes.name
    return flat


def _slice(graph: ir.Graph, rows: ir.Value, columns: int) -> ir.Node:
    def constant(part: str, number: int) -> ir.Value:
        name = f"model.embed_tokens.slice_{part}"
        return add_initializer(graph, name, ir.tensor(np.array([number], dtype=np.int64), name=name))

    inputs = [rows, constant("start", 0), constant("end", columns), constant("axis", -1)]
    return ir.node("Slice", inputs, name=f"{EMBEDDING_PATH}/Slice")
