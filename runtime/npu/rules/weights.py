"""Rules on weights: their types, the axis of their scales, their zero points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import TensorProto

from qtool.runtime.npu.rules.breach import Breach
from qtool.runtime.npu.rules.graph_view import GraphView, attribute, label
from qtool.runtime.npu.rules.operators import BLOCK_MULTIPLES, WEIGHT_INPUT

BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT8: 8, TensorProto.UINT8: 8}
SIGNED = (TensorProto.INT4, TensorProto.INT8)


def weights(view: GraphView) -> Iterator[Breach]:
    """All rules on the constants that are multiplied, and on scales per channel elsewhere."""
    found: set[str] = set()
    for node in view.nodes:
        index = WEIGHT_INPUT.get(node.op_type)
        if index is None or len(node.input) <= index:
            continue
        source = view.producer.get(node.input[index])
        if source is not None and source.op_type == "DequantizeLinear" and view.is_constant(source.input[0]):
            found.add(source.output[0])
            yield from _weight(view, node, source)
    for node in view.nodes:
        if node.op_type == "DequantizeLinear" and node.output[0] not in found and _many_scales(view, node):
            why = "has scales per channel but is no weight of a product"
            yield Breach(rule="weight-axis", node=label(node), why=why, remedy="use one scale for the tensor")


def _weight(view: GraphView, node: Any, source: Any) -> Iterator[Breach]:
    name = source.input[0]
    kind = view.element_type(name)
    if kind not in BITS:
        word = TensorProto.DataType.Name(kind or 0).lower()
        yield Breach(rule="weight-type", node=label(node), why=f"{name} is {word}", remedy="use int8 or int4")
        return
    zero = view.constant(source.input[2]) if len(source.input) > 2 and source.input[2] else None
    if zero is not None and kind in SIGNED and bool((zero.astype("int32") != 0).any()):
        yield Breach(rule="weight-symmetry", node=label(node), why=f"{name} has zero points other than 0",
                     remedy="quantize the weight symmetrically")
    if kind not in SIGNED and _many_scales(view, source):
        yield Breach(rule="weight-symmetry", node=label(node), why=f"{name} is unsigned with scales per channel",
                     remedy="use int8 or int4 with zero points of 0")
    if _many_scales(view, source):
        yield from _axis(view, node, source, BITS[kind])


def _axis(view: GraphView, node: Any, source: Any, bits: int) -> Iterator[Breach]:
    shape = view.shape(source.input[0]) or ()
    rank = len(shape)
    axis = attribute(source, "axis", 1) % max(rank, 1)
    block = attribute(source, "block_size", 0)
    output, contraction = _channel_axes(node, rank)
    if block and axis != contraction:
        yield Breach(rule="weight-axis", node=label(node), why=f"its weight's blocks lie along axis {axis}",
                     remedy=f"use axis {contraction}, the inputs")
    elif block and block % BLOCK_MULTIPLES[bits]:
        yield Breach(rule="weight-axis", node=label(node), why=f"blocks of {block} {bits}-bit weights",
                     remedy=f"use a multiple of {BLOCK_MULTIPLES[bits]}")
    elif block and view.element_type(_activation_codes(view, node)) not in (TensorProto.UINT16, TensorProto.INT16):
        yield Breach(rule="weight-axis", node=label(node), why="weights in blocks behind 8-bit activations",
                     remedy="use 16-bit activations, or one scale per channel")
    elif not block and axis != output:
        yield Breach(rule="weight-axis", node=label(node), why=f"its weight's scales lie along axis {axis}",
                     remedy=f"use axis {output}, the output channels")


def _channel_axes(node: Any, rank: int) -> tuple[int, int]:
    """Of a weight: the axis of output channels, and the one that is summed over."""
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        return 0, 1
    if node.op_type == "Conv":
        return 0, 1
    return (1, 0) if node.op_type == "ConvTranspose" else (rank - 1, max(rank - 2, 0))


def _activation_codes(view: GraphView, node: Any) -> str:
    source = view.producer.get(node.input[0])
    return str(source.input[0]) if source is not None and source.op_type == "DequantizeLinear" else ""


def _many_scales(view: GraphView, node: Any) -> bool:
    shape = view.shape(node.input[1])
    return any(dimension != 1 for dimension in shape or ())
