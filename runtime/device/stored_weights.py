"""The weights that a device's graph stores, dequantized by the operators' definitions and nothing of the export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.device.graph_file import GraphFile

Stored = Iterator[tuple[str, FloatArray]]


def largest_weight_error(file: GraphFile, nodes: Mapping[str, Mapping[str, Any]], source: QuantizedCheckpoint) -> float:
    """The largest difference between a stored weight and the checkpoint's, over the largest magnitude of its row.

    Args:
        file: the graph.
        nodes: lowered nodes of the manifest; empty for a graph of Q and DQ.
        source: what it was made from; every one of its quantized linears must be there.

    Returns:
        Infinite when a linear is missing.
    """
    worst, left = 0.0, set(source.schemes)
    for module, weight in _READERS["MatMulNBits" if nodes else "DequantizeLinear"](file, nodes):
        expected = source.quantized(module).dequantize().numpy()
        if weight.shape != expected.shape:
            return float("inf")
        largest = np.maximum(np.abs(expected).max(axis=1), np.finfo(np.float32).tiny)
        worst = max(worst, float((np.abs(weight - expected).max(axis=1) / largest).max()))
        left.discard(module)
    return worst if not left else float("inf")


def _from_blocks(file: GraphFile, nodes: Mapping[str, Mapping[str, Any]]) -> Stored:
    for node in file.nodes:
        if node.op_type == "MatMulNBits" and node.name in nodes:
            described = nodes[node.name]
            weight = _nbits(file, node)
            ends = np.cumsum([0, *described["rows"]])
            for module, start, stop in zip(described["modules"], ends[:-1], ends[1:], strict=True):
                yield module, weight[start:stop]


def _nbits(file: GraphFile, node: onnx.NodeProto) -> FloatArray:
    bits, columns = (file.attribute(node, name) for name in ("bits", "K"))
    codes = _unpacked(file.array(node.input[1]), bits)  # [N, blocks, block_size]
    scales = file.array(node.input[2]).astype(np.float32)
    zero = np.full(scales.shape, 1 << (bits - 1), dtype=np.float32)
    if len(node.input) > 3 and node.input[3]:
        packed = file.array(node.input[3]).reshape(len(scales), -1)
        zero = _unpacked(packed, bits)[:, : scales.shape[1]].astype(np.float32)
    weight = (codes.astype(np.float32) - zero[..., None]) * scales[..., None]
    found: FloatArray = weight.reshape(len(scales), -1)[:, :columns]
    return found


def _unpacked(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    if bits == 8:
        return codes
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)


def _from_pairs(file: GraphFile, nodes: Mapping[str, Mapping[str, Any]]) -> Stored:
    for node in file.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in file.constants:
            codes = file.array(node.input[0]).astype(np.float32)
            scale = file.array(node.input[1]).astype(np.float32)
            block = file.attribute(node, "block_size")
            spread = np.repeat(scale, block, axis=0) if block else scale
            yield node.output[0].removesuffix(".weight"), (codes * spread).T


_READERS: dict[str, Callable[[GraphFile, Mapping[str, Mapping[str, Any]]], Stored]] = {
    "MatMulNBits": _from_blocks,
    "DequantizeLinear": _from_pairs,
}
