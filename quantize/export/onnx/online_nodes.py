"""The nodes of what is done, online, to a site's input: standard operators, a few per site.

    directions   side = MatMul(x, P); rest = Sub(x, FusedMatMul(side, Pᵀ))
    Hadamard     MatMul(Reshape(Mul(rest, signs), [B, T, K / block, block]), H), one H for the graph
    division     Div(main, factors)

The signs are a Mul of their own: folded into K / block different matrices the product takes two to three times as long.
(I − P Pᵀ) R as one matrix would be K × K and is never made. What the checkpoint holds in 16 or 8 bits lies in the file
in as many; the runtime folds the Cast behind it when it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

from qtool.errors import UsageError
from qtool.kernels.hadamard import dense, hadamard_plan
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.linears import add_initializer, node_path
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.quad import Quad
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide

# A wider block is a dense product that no longer pays: 512 doubles the time of a small linear.
WIDEST_BLOCK = 256
FLOAT = int(ir.DataType.FLOAT)

Values = tuple[ir.Value, ir.Value | None]


class NodeWriter:
    """Nodes of one module or site, in order, and the initializers made for them.

    Attributes:
        name: of the module or site.
        nodes: not in the graph yet.
        initializers: in the graph.
    """

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self._graph, self.name = graph, name
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def op(self, role: str, operator: str, *inputs: ir.Value, domain: str = "", **attributes: int) -> ir.Value:
        """One node, named `{path}/{role}/{operator}`."""
        path = f"{node_path(self.name)}/{role}/{operator}"
        node = ir.node(operator, list(inputs), attributes, domain=domain, name=path)
        self.nodes.append(node)
        return node.outputs[0]

    def transposed_product(self, role: str, x: ir.Value, rows: ir.Value) -> ir.Value:
        """x [..., r] × rowsᵀ for rows [N, r]."""
        return self.op(role, "FusedMatMul", x, rows, domain="com.microsoft", transB=1)

    def stored(self, part: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer `{name}.{part}`."""
        value = add_initializer(self._graph, f"{self.name}.{part}", tensor)
        self.initializers.append(value)
        return value

    def floats(self, part: str, tensor: ir.TensorProtocol) -> ir.Value:
        """`stored`, in float32 for the nodes that read it."""
        value = self.stored(part, tensor)
        return value if tensor.dtype == ir.DataType.FLOAT else self.op(part, "Cast", value, to=FLOAT)

    def shared(self, name: str, make: Callable[[], np.ndarray[Any, Any]]) -> ir.Value:
        """An initializer of the whole graph, made by the first who asks."""
        if name not in self._graph.initializers:
            self.initializers.append(add_initializer(self._graph, name, ir.tensor(make(), name=name)))
        return self._graph.initializers[name]


def write_transform(writer: NodeWriter, transform: SiteTransform, x: ir.Value) -> Values:
    """The nodes of one site's transform of x [B, T, K].

    Returns:
        main [B, T, K'] and side [B, T, r] or None.

    Raises:
        UsageError: for a kind of transform without nodes, or a block that is too wide.
    """
    if transform.kind not in _WRITERS:
        remedy = f"use one of {', '.join(sorted(_WRITERS))}, or score it with qtool evaluate"
        raise UsageError(f"{writer.name}: transform {transform.kind}", "target cpu does not run it", remedy)
    return _WRITERS[transform.kind](writer, transform, x)


def _hadamard(writer: NodeWriter, transform: BlockHadamard, x: ir.Value) -> Values:
    block, width = transform.block, transform.main_width
    if block > WIDEST_BLOCK:
        why = f"target cpu runs blocks of at most {WIDEST_BLOCK} channels"
        raise UsageError(f"{writer.name}: Hadamard block {block}", why, "use blocks of 64")
    turned = writer.op("signs", "Mul", x, writer.floats("signs", _tensor(transform.signs, np.int8)))
    cut = writer.shared(f"hadamard.blocks_{block}", lambda: np.array([0, 0, -1, block]))
    blocks = writer.op("blocks", "Reshape", turned, cut)
    mixed = writer.op("hadamard", "MatMul", blocks, writer.shared(f"hadamard.matrix_{block}", lambda: _matrix(block)))
    whole = writer.shared(f"hadamard.width_{width}", lambda: np.array([0, 0, width]))
    return writer.op("rows", "Reshape", mixed, whole), None


def _quad(writer: NodeWriter, transform: Quad, x: ir.Value) -> Values:
    directions = writer.floats("directions", _tensor(transform.directions, np.float16))
    side = writer.op("side", "MatMul", x, directions)
    rest = writer.op("rest", "Sub", x, writer.transposed_product("projection", side, directions))
    return _hadamard(writer, transform.rotation, rest)[0], side


def _divide(writer: NodeWriter, transform: DivideChannels, x: ir.Value) -> Values:
    return writer.op("division", "Div", x, writer.floats("factors", _tensor(transform.factors, np.float32))), None


def _then_divide(writer: NodeWriter, transform: ThenDivide, x: ir.Value) -> Values:
    main, side = write_transform(writer, transform.first, x)
    return _divide(writer, transform.division, main)[0], side


_WRITERS: dict[str, Callable[[NodeWriter, Any, ir.Value], Values]] = {
    BlockHadamard.kind: _hadamard,
    Quad.kind: _quad,
    DivideChannels.kind: _divide,
    ThenDivide.kind: _then_divide,
}


def _matrix(block: int) -> FloatArray:
    matrix: FloatArray = dense(hadamard_plan(block, block=block)).float().numpy()
    return matrix


def _tensor(values: Tensor, dtype: type[np.generic]) -> ir.TensorProtocol:
    return ir.tensor(values.numpy().astype(dtype))
