"""Linears with one INT8 scale a token and one a channel become com.microsoft::MatMulIntegerToFloat.

    row   = max(Reduce max(|x|), tiny)                        [B, T, 1]
    codes = QuantizeLinear(x × (127 / row), 1, 128)           uint8, zero at 128
    y     = MatMulIntegerToFloat(codes, W, 1/127, w_scale, 128) × row   (+ bias)

The reference's rounding; a value within an ulp of a tie may fall the other way. The runtime's integer product wants one
scale for the whole of its input; bringing every row to one range first makes that exact, at the price of a product with
[B, T, 1] in front and behind. The rows' part is done once for all linears that read one input. The node is written as
the runtime's own fusion would leave it, so nothing hangs on a fusion; unsigned codes, because the product of two signed
ones takes a path that is many times slower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.export.onnx.cpu_target import per_token_int8
from qtool.quantize.export.onnx.linears import (
    Linear,
    SchemeOf,
    add_initializer,
    drop_unused_initializers,
    find_linears,
    node_path,
)

WEIGHT, SCALES, BIAS = "int8", "int8_scales", "bias"
LARGEST, ZERO = 127.0, 128
SMALLEST_ROW = 2.0**-120


class TokenInt8(ir.passes.InPlacePass):
    """Lower every linear whose scheme is INT8 per token and channel.

    Args:
        scheme_of: the scheme of a module, None for float.
        quantized: reads one module's codes.
    """

    def __init__(self, scheme_of: SchemeOf, quantized: Callable[[str], QuantizedTensor]) -> None:
        super().__init__()
        self._scheme_of = scheme_of
        self._weights = lru_cache(maxsize=1)(lambda modules: [quantized(module) for module in modules])
        self._rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        place = {node: index for index, node in enumerate(model.graph)}
        found = find_linears(model.graph)
        linears = [linear for linear in found if per_token_int8(linear.scheme(self._scheme_of))]
        # An input's rows are made in front of its first linear.
        for linear in sorted(linears, key=lambda linear: place[linear.nodes[-1]]):
            self._lower(model.graph, linear)
        return ir.passes.PassResult(model, bool(linears))

    def _lower(self, graph: ir.Graph, linear: Linear) -> None:
        path, nodes = node_path(linear.name), []
        if linear.x not in self._rows:
            rows, codes, row = _row_codes(graph, path, linear.x)
            nodes += rows
            self._rows[linear.x] = codes, row
        codes, row = self._rows[linear.x]
        count = sum(linear.rows)
        product = ir.node(
            "MatMulIntegerToFloat",
            [
                codes,
                self._initializer(graph, linear, WEIGHT, (linear.columns, count)),
                _shared(graph, "int8.step", np.float32(1 / LARGEST)),
                self._initializer(graph, linear, SCALES, (count,)),
                _shared(graph, "int8.zero", np.uint8(ZERO)),
            ],
            domain="com.microsoft",
            name=f"{path}/MatMulIntegerToFloat",
        )
        nodes += [product, ir.node("Mul", [product.outputs[0], row], name=f"{path}/rows/Mul")]
        if linear.biases:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], _bias(graph, linear)], name=f"{path}/Add"))
        ir.convenience.replace_nodes_and_values(
            graph, linear.nodes[-1], linear.nodes, nodes, [linear.output], [nodes[-1].outputs[0]]
        )
        drop_unused_initializers(graph, (*linear.weights, *linear.biases))

    def _initializer(self, graph: ir.Graph, linear: Linear, part: str, shape: tuple[int, ...]) -> ir.Value:
        def read() -> ir.TensorProtocol:
            return ir.tensor(_PARTS[part](self._weights(linear.modules)))

        dtype = ir.DataType.FLOAT if part == SCALES else ir.DataType.INT8
        name = f"{linear.name}.{part}"
        return add_initializer(graph, name, ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name))


def float_ends(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The float values that a MatMulIntegerToFloat of this pass stands between: its linear's input and its output,
    after the bias."""
    codes = product.inputs[0].producer() if product.inputs[0] is not None else None
    scaled = codes.inputs[0].producer() if codes is not None and codes.inputs[0] is not None else None
    readers = product.outputs[0].consumers()
    assert scaled is not None and scaled.inputs[0] is not None and len(readers) == 1
    out = readers[0].outputs[0]
    name = str(product.name).removesuffix("/MatMulIntegerToFloat")
    added = [reader for reader in out.consumers() if reader.name == f"{name}/Add"]
    return scaled.inputs[0], added[0].outputs[0] if added else out


def _row_codes(graph: ir.Graph, path: str, x: ir.Value) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    nodes: list[ir.Node] = []

    def add(part: str, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        nodes.append(ir.node(operator, list(inputs), attributes, name=f"{path}/{part}/{operator}"))
        return nodes[-1].outputs[0]

    last = _shared(graph, "int8.last_axis", np.array([-1], dtype=np.int64))
    magnitude = add("rows", "ReduceMax", add("rows", "Abs", x), last, keepdims=1)
    row = add("rows", "Max", magnitude, _shared(graph, "int8.smallest_row", np.float32(SMALLEST_ROW)))
    factor = add("rows", "Div", _shared(graph, "int8.largest", np.float32(LARGEST)), row)
    one, zero = _shared(graph, "int8.one", np.float32(1)), _shared(graph, "int8.zero", np.uint8(ZERO))
    codes = add("codes", "QuantizeLinear", add("codes", "Mul", x, factor), one, zero)
    return nodes, codes, row


def _shared(graph: ir.Graph, name: str, value: npt.ArrayLike) -> ir.Value:
    if name not in graph.initializers:
        add_initializer(graph, name, ir.tensor(np.asarray(value), name=name))
    return graph.initializers[name]


def _matrix(weights: list[QuantizedTensor]) -> npt.NDArray[np.int8]:
    codes = torch.cat([weight.codes for weight in weights]).to(torch.int16) - ZERO
    return np.ascontiguousarray(codes.to(torch.int8).numpy().T)


def _scales(weights: list[QuantizedTensor]) -> npt.NDArray[np.float32]:
    scales: npt.NDArray[np.float32] = torch.cat([weight.scale[:, 0] for weight in weights]).to(torch.float32).numpy()
    return scales


_PARTS: dict[str, Callable[[list[QuantizedTensor]], npt.NDArray[np.generic]]] = {WEIGHT: _matrix, SCALES: _scales}


def _bias(graph: ir.Graph, linear: Linear) -> ir.Value:
    if len(linear.biases) == 1:
        return linear.biases[0]
    tensors = [bias.const_value for bias in linear.biases]

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors if tensor is not None]))

    name, shape = f"{linear.name}.{BIAS}", ir.Shape((sum(linear.rows),))
    return add_initializer(graph, name, ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name))
