"""Is a graph in the form that ONNX Runtime's CUDA provider has kernels for? One line per breach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import TensorProto

from qtool.runtime.device.graph_file import GraphFile

CONTRIB = "com.microsoft"
# Contrib operators with a float16 kernel in the CUDA provider.
OPERATORS = (
    "FusedMatMul",
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMulNBits",
    "RotaryEmbedding",
    "SkipSimplifiedLayerNormalization",
)
BLOCKS = (16, 32, 64, 128, 256)
WIDE = (TensorProto.FLOAT, TensorProto.DOUBLE)
LOGITS = "logits"


def cuda_breaches(file: GraphFile, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All breaches.

    Args:
        file: the graph.
        nodes: the manifest's lowered nodes.
    """
    return [*_operators(file), *_floats(file), *_lowered(file, nodes)]


def _operators(file: GraphFile) -> Iterator[str]:
    for node in file.nodes:
        if node.domain == CONTRIB and node.op_type not in OPERATORS:
            yield f"{node.name}: {CONTRIB}::{node.op_type} has no float16 kernel for CUDA"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "MatMulInteger"):
            yield f"{node.name}: {node.op_type} is not fused on CUDA: it would run at every call"


def _floats(file: GraphFile) -> Iterator[str]:
    for name, tensor in file.constants.items():
        if tensor.data_type in WIDE:
            yield f"{name}: {_type(tensor.data_type)} among constants of float16"
    graph = file.model.graph
    for value in (*graph.input, *graph.output):
        element = value.type.tensor_type.elem_type
        if element in WIDE and value.name != LOGITS:
            yield f"{value.name}: {_type(element)}, not float16"


def _lowered(file: GraphFile, nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    there = {node.name: node for node in file.nodes if node.op_type in ("MatMulNBits", "GatherBlockQuantized")}
    for name in sorted(set(there) ^ set(nodes)):
        yield f"{name}: {'not in the manifest' if name in there else 'not in the graph'}"
    for name, node in there.items():
        yield from _blocks(file, name, node)


def _blocks(file: GraphFile, name: str, node: onnx.NodeProto) -> Iterator[str]:
    bits, block = file.attribute(node, "bits"), file.attribute(node, "block_size")
    if bits not in (4, 8) or block not in BLOCKS:
        yield f"{name}: {bits} bits in blocks of {block}"
    if file.attribute(node, "accuracy_level"):
        yield f"{name}: accuracy_level {file.attribute(node, 'accuracy_level')}, which CUDA does not follow"
    scales = node.input[2]
    if file.types.get(scales) != TensorProto.FLOAT16:
        yield f"{name}: scales {scales} are not float16"
    if node.op_type == "MatMulNBits" and len(node.input) > 5 and node.input[5]:
        yield f"{name}: a bias inside the node, which older CUDA kernels refuse"


def _type(element: int) -> str:
    return str(TensorProto.DataType.Name(element)).lower()
