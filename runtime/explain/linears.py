"""Linears of a graph: every product with a weight that the file holds, whatever stands between file and product."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtool.runtime.explain.graph import GraphView, Node, Stored, attribute, input_at

# The operators that multiply by a matrix, and which input is the matrix.
WEIGHT_INPUT: dict[str, int] = {
    "MatMul": 1,
    "Gemm": 1,
    "FusedMatMul": 1,
    "FusedGemm": 1,
    "TransposeMatMul": 1,
    "MatMulNBits": 1,
    "MatMulBnb4": 1,
    "MatMulFpQ4": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "GemmFloat8": 1,
    "MatMulBlockQuantizedFp8Weight": 1,
    "MatMulBlockQuantizedFp4Weight": 1,
}
_OPERATOR = re.compile(r"[/.](MatMul|Gemm|Fused|QLinear|DynamicQuantize)\w*$")
_WEIGHT_END = re.compile(r"\.(weight|codes|MatMul\.weight)\w*$")
_NUMBER = re.compile(r"(?<=[._])\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One product with a stored weight.

    Attributes:
        node: the node that multiplies.
        weight: the stored tensor with the most elements that goes into its matrix.
        parts: every stored tensor that it reads for its weight: codes, scales, zero points, bias.
        k, n: in_features, out_features.
        between: the nodes between the stored weight and the product, nearest first; each of them runs at every call
            if it is in the optimized graph.
    """

    node: Node
    weight: Stored
    parts: tuple[Stored, ...]
    k: int
    n: int
    between: tuple[Node, ...]

    @property
    def weight_bytes(self) -> int:
        """What a call reads of stored tensors."""
        return sum(part.size_bytes for part in self.parts)

    @property
    def stored_as(self) -> str:
        """The weight as the graph holds it: "int4 block 32", "float"."""
        if self.node.op_type == "MatMulNBits":
            return f"int{attribute(self.node, 'bits', 4)} block {attribute(self.node, 'block_size')}"
        dequantize = next((node for node in self.between if node.op_type == "DequantizeLinear"), None)
        if dequantize is None:
            return self.weight.dtype
        return f"{self.weight.dtype} {_granularity(self.parts, dequantize)}"


def find_linears(view: GraphView) -> list[Linear]:
    """Every linear, in the graph's order."""
    return [linear for node in view.nodes if (linear := linear_of(view, node)) is not None]


def linear_of(view: GraphView, node: Node) -> Linear | None:
    """The node as a linear, None when it multiplies by no stored matrix."""
    index = WEIGHT_INPUT.get(node.op_type)
    matrix = input_at(node, index) if index is not None else ""
    made_of = view.made_of(matrix)
    weight = max(made_of, key=lambda tensor: tensor.elements, default=None)
    if index is None or weight is None or len(weight.shape) < 2:
        return None
    between = _between(view, matrix)
    k, n = _shape(node, weight, between)
    others = [tensor for name in node.input[1:] if name and name != matrix for tensor in view.made_of(name)]
    parts = tuple(dict.fromkeys((*made_of, *others)))
    return Linear(node=node, weight=weight, parts=parts, k=k, n=n, between=between)


def linear_name(linear: Linear) -> str:
    """What people call it: "model.layers.3.mlp.down_proj", by its node's path or else by its weight's name."""
    node, weight = str(linear.node.name), linear.weight.name
    if "/" not in node and "." in weight and "::" not in weight:
        return _WEIGHT_END.sub("", weight)
    path = _OPERATOR.sub("", node) or node
    return path.strip("/").replace("/", ".") or weight


def role_of(name: str) -> str:
    """A name without the layer's number, the same for all layers: "model.layers.*.mlp.down_proj"."""
    return _NUMBER.sub("*", name)


def _between(view: GraphView, matrix: str) -> tuple[Node, ...]:
    found: list[Node] = []
    pending = [matrix]
    while pending:
        node = view.producer.get(pending.pop(0))
        if node is not None and node not in found:
            found.append(node)
            pending += [name for name in node.input if name]
    return tuple(found)


def _shape(node: Node, weight: Stored, between: tuple[Node, ...]) -> tuple[int, int]:
    if node.op_type == "MatMulNBits":
        return attribute(node, "K"), attribute(node, "N")
    k, n = weight.shape[-2:]
    turned = attribute(node, "transB") + sum(other.op_type == "Transpose" for other in between)
    return (n, k) if turned % 2 else (k, n)


def _granularity(parts: tuple[Stored, ...], dequantize: Node) -> str:
    if block := attribute(dequantize, "block_size"):
        return f"block {block}"
    scale = next((part for part in parts if part.name == input_at(dequantize, 1)), None)
    return "per channel" if scale is not None and scale.elements > 1 else "per tensor"
