"""A tied, quantized head also serves the embedding lookup: GatherBlockQuantized on the same bytes.

MatMulNBits wants its codes as [N, blocks, bytes], GatherBlockQuantized as [N, bytes]. The second initializer is
marked as the same bytes in another shape, so the data file holds them once and both nodes map the same pages.

A head of MatMulIntegerToFloat has its codes the other way round, [K, N], and one scale a row, which no lookup reads:
there the rows are stored a second time, with the scale once for each of a row's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qtool.quantize.export.onnx.external_data import SAME_BYTES_AS
from qtool.quantize.export.onnx.linears import EMBEDDING_WEIGHT, HEAD, add_initializer, drop_unused_initializers
from qtool.quantize.export.onnx.passes.matmul_nbits import CODES, SCALES, ZERO_POINTS
from qtool.quantize.export.onnx.passes.token_int8 import SCALES as ROW_SCALES
from qtool.quantize.export.onnx.passes.token_int8 import WEIGHT, ZERO

EMBEDDING_PATH = "/model/embed_tokens"
# What GatherBlockQuantized takes, widest first; the last one also where a row is not whole blocks.
BLOCKS = (256, 128, 64, 16, 32)


class TiedEmbedding(ir.passes.InPlacePass):
    """Replace the float Gather on the embedding where the head was lowered. For tied models, after MatMulNBits
    and TokenInt8.

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
    codes = {"MatMulNBits": CODES, "MatMulIntegerToFloat": WEIGHT}.get(node.op_type)
    return codes is not None and _name(node, 1) == f"{HEAD}.{codes}"


def _is_lookup(node: ir.Node) -> bool:
    return node.op_type == "Gather" and _name(node, 0) == EMBEDDING_WEIGHT


def _name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index]
    return value.name if value is not None else None


def _replace(graph: ir.Graph, head: ir.Node, gather: ir.Node) -> None:
    weight, ids = gather.inputs
    if head.op_type == "MatMulNBits":
        inputs: list[ir.Value | None] = [_flat_codes(graph), ids, graph.initializers[f"{HEAD}.{SCALES}"]]
        if f"{HEAD}.{ZERO_POINTS}" in graph.initializers:
            inputs.append(graph.initializers[f"{HEAD}.{ZERO_POINTS}"])
        bits, block_size, columns = (head.attributes[name].as_int() for name in ("bits", "block_size", "K"))
    else:
        codes, scales, block_size, columns = _rows(graph)
        inputs, bits = [codes, ids, scales], 8
    lookup = ir.node(
        "GatherBlockQuantized",
        inputs,
        {
            "bits": bits,
            "block_size": block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        domain="com.microsoft",
        name=f"{EMBEDDING_PATH}/GatherBlockQuantized",
    )
    nodes = [lookup]
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


def _rows(graph: ir.Graph) -> tuple[ir.Value, ir.Value, int, int]:
    """The head's rows [N, K] and a scale a block, from its columns and scales; the block size and K."""
    matrix, scales = (graph.initializers[f"{HEAD}.{part}"] for part in (WEIGHT, ROW_SCALES))
    assert matrix.shape is not None and matrix.const_value is not None and scales.const_value is not None
    columns, rows = matrix.shape.numpy()
    block_size = next((size for size in BLOCKS if columns % size == 0), BLOCKS[-1])
    blocks = -(-columns // block_size)
    source, numbers = matrix.const_value, scales.const_value

    def codes() -> ir.TensorProtocol:
        stored = np.full((rows, blocks * block_size), ZERO, dtype=np.uint8)
        stored[:, :columns] = (source.numpy().T.astype(np.int16) + ZERO).astype(np.uint8)
        return ir.tensor(stored)

    def repeated() -> ir.TensorProtocol:
        return ir.tensor(np.repeat(numbers.numpy()[:, None], blocks, axis=1))

    def lazy(part: str, read: Callable[[], ir.TensorProtocol], dtype: ir.DataType, width: int) -> ir.Value:
        name, shape = f"model.embed_tokens.{part}", ir.Shape((rows, width))
        return add_initializer(graph, name, ir.LazyTensor(read, dtype=dtype, shape=shape, name=name))

    stored = lazy(CODES, codes, ir.DataType.UINT8, blocks * block_size)
    return stored, lazy(SCALES, repeated, ir.DataType.FLOAT, blocks), block_size, columns


def _slice(graph: ir.Graph, rows: ir.Value, columns: int) -> ir.Node:
    def constant(part: str, number: int) -> ir.Value:
        name = f"model.embed_tokens.slice_{part}"
        return add_initializer(graph, name, ir.tensor(np.array([number], dtype=np.int64), name=name))

    inputs = [rows, constant("start", 0), constant("end", columns), constant("axis", -1)]
    return ir.node("Slice", inputs, name=f"{EMBEDDING_PATH}/Slice")
