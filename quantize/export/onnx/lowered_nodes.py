"""What a package says of its lowered nodes: which linear each computes, in what form, in how many bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from qtool.quantize.export.onnx.linears import HEAD, Linear, SchemeOf, node_path
from qtool.quantize.export.onnx.passes.online_transforms import Online
from qtool.quantize.export.onnx.passes.token_int8 import float_ends

# Which inputs of a lowered linear hold its weight, scales and zero points.
LOWERED = {"MatMulNBits": (1, 2, 3), "MatMulIntegerToFloat": (1, 3)}


def describe_nodes(
    graph: ir.Graph, linears: Sequence[Linear], online: Mapping[str, Online], scheme_of: SchemeOf
) -> dict[str, Any]:
    """What the manifest's details say of a lowered graph: `nodes`, `bits_per_weight`, `bits_per_weight_quantized` and
    `float_modules`, see `export_package`.

    Args:
        graph: lowered.
        linears: as they were before, one a node.
        online: what surrounds them, by name.
        scheme_of: the scheme of a module, None for float.
    """
    by_name = {str(node.name): node for node in graph}
    nodes: dict[str, dict[str, Any]] = {}
    stored_bytes = weights = quantized_bytes = quantized = 0
    float_bytes = 2 if graph.outputs[-1].dtype == ir.DataType.FLOAT16 else 4
    for linear in linears:
        weights += sum(linear.rows) * linear.columns
        lowered = next((by_name[name] for op in LOWERED if (name := f"{node_path(linear.name)}/{op}") in by_name), None)
        if lowered is None:
            stored_bytes += float_bytes * sum(linear.rows) * linear.columns
            continue
        quantized += sum(linear.rows) * linear.columns
        quantized_bytes += sum(_nbytes(value) for value in _stored(lowered))
        nodes[str(lowered.name)] = _describe(lowered, linear)
        if linear.name in online:
            surround = online[linear.name]
            quantized_bytes += sum(_nbytes(value) for value in surround.initializers)
            nodes[str(lowered.name)]["online"] = surround.describe(*_float_ends(lowered))
        for node in graph:
            if node.op_type == "GatherBlockQuantized" and linear.name == HEAD:
                nodes[str(node.name)] = _describe(node, linear)
    return {
        "nodes": nodes,
        "bits_per_weight": 8 * (stored_bytes + quantized_bytes) / weights,
        "bits_per_weight_quantized": 8 * quantized_bytes / quantized if quantized else None,
        "float_modules": [module for x in linears for module in x.modules if scheme_of(module) is None],
    }


def _float_ends(lowered: ir.Node) -> tuple[str, str]:
    """The names of the float values that a lowered node, with what scales its rows, stands between."""
    x, y = lowered.inputs[0], lowered.outputs[0]
    if lowered.op_type == "MatMulIntegerToFloat":
        x, y = float_ends(lowered)
    assert x is not None
    return str(x.name), str(y.name)


def _stored(lowered: ir.Node) -> list[ir.Value | None]:
    return [lowered.inputs[index] for index in LOWERED[lowered.op_type] if index < len(lowered.inputs)]


def _nbytes(value: ir.Value | None) -> int:
    return value.const_value.nbytes if value is not None and value.const_value is not None else 0


def _describe(node: ir.Node, linear: Linear) -> dict[str, Any]:
    numbers = ("bits", "block_size", "accuracy_level")
    whole = {"bits": 8, "block_size": linear.columns} if node.op_type == "MatMulIntegerToFloat" else {}
    return {
        "op": node.op_type,
        "modules": list(linear.modules),
        "rows": list(linear.rows),
        **whole,
        **{name: node.attributes[name].as_int() for name in numbers if name in node.attributes},
    }
