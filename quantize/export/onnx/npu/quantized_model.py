"""The plain graph with every node between DequantizeLinear and QuantizeLinear.

    codes → DequantizeLinear → node → QuantizeLinear → codes

One DequantizeLinear serves all readers of a tensor. The cache goes in and out as codes; logits come out as floats.
Where a node's type is not its reader's: DequantizeLinear, QuantizeLinear, DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qtool.quantize.artifacts.static_graphs import LOGITS
from qtool.quantize.export.onnx.linears import node_path
from qtool.quantize.export.onnx.npu.activation_types import ActivationTypes
from qtool.quantize.export.onnx.npu.data_file import DataFile, pack_int4
from qtool.quantize.export.onnx.npu.float_model import INPUT_TYPES, index_tensor, model_of
from qtool.quantize.export.onnx.npu.linear_weights import LinearCodes, LinearWeights
from qtool.quantize.export.onnx.npu.plain_graph import Constant, PlainGraph
from qtool.quantize.export.onnx.npu.scales import Scale, SharedRanges, scale_of

CODES = {8: TensorProto.UINT8, 16: TensorProto.UINT16}
Array = npt.NDArray[Any]


class QuantizedModel:
    """Writes the model of one width.

    Args:
        graph: the plain one.
        types: of every node.
        ranges: of every tensor.
        fixed: scales that a checkpoint brings, by (tensor, bits).
        weights: of the linears.
        data: takes the constants.
    """

    def __init__(
        self,
        graph: PlainGraph,
        types: ActivationTypes,
        ranges: SharedRanges,
        fixed: Mapping[tuple[str, int], Scale],
        weights: LinearWeights,
        data: DataFile,
    ) -> None:
        self._graph, self._types, self._ranges, self._fixed = graph, types, ranges, fixed
        self._weights, self._data = weights, data
        self._nodes: list[Any] = []
        self._tensors: dict[str, TensorProto] = {}
        self._values: dict[tuple[str, int], str] = {}  # (tensor, bits) → its dequantized value
        self._codes: dict[tuple[str, int], str] = {}  # (tensor, bits) → its codes
        self.scales: dict[str, Scale] = {}  # float tensor → the scale it is quantized with first

    def write(self, opset: int, properties: dict[str, str]) -> onnx.ModelProto:
        """The whole model."""
        graph = self._graph
        inputs: list[tuple[str, int, tuple[int, ...]]] = []
        for name, (kind, shape) in graph.inputs.items():
            inputs.append((name, INPUT_TYPES[kind], shape))
            if kind == "float32":
                self._quantize(name, name, self._types.of_input(graph, name))
        for name, shape in graph.past.items():
            bits = self._types.of_input(graph, name)
            inputs.append((name, CODES[bits], shape))
            self._codes[name, bits] = name
            self.scales[name] = self._scale(name, bits)
        given_out = {tensor: name for name, tensor in graph.outputs.items() if name != LOGITS}
        for node in graph.nodes:
            bits = self._types.bits(node)
            read = [self._input(name, self._types.of_operand(node, i)) for i, name in enumerate(node.inputs)]
            raw = f"{node.output}.float"
            self._nodes.append(helper.make_node(node.op, read, [raw], name=node.name, **node.attributes))
            wanted = given_out.get(node.output)
            cache_bits = bits if wanted is None else self._cache_bits(wanted)
            self._quantize(node.output, raw, bits, codes=wanted if cache_bits == bits else None)
            if cache_bits != bits:
                self._convert(node.output, cache_bits, codes=wanted)
        outputs: list[tuple[str, int, None]] = []
        for name, tensor in graph.outputs.items():
            if name == LOGITS:
                outputs.append((name, TensorProto.FLOAT, None))
                self._dequantize(tensor, self._first_bits(tensor), name)
            else:
                outputs.append((name, CODES[self._cache_bits(name)], None))
        return model_of(
            self._nodes, inputs, outputs, list(self._tensors.values()), opset=opset, properties=properties
        )

    def _cache_bits(self, present: str) -> int:
        past = present.replace("present.", "past_key_values.", 1)
        return self._types.of_input(self._graph, past)

    def _input(self, name: str, bits: int) -> str:
        constant = self._graph.constants.get(name)
        if constant is not None and constant.kind == "index":
            self._tensors.setdefault(name, index_tensor(name, constant))
            return name
        if name in self._graph.inputs and self._graph.inputs[name][0] == "int32":
            return name
        if (name, bits) not in self._values:
            if constant is not None and constant.kind == "linear":
                self._values[name, bits] = self._linear(name, constant)
            elif constant is not None:
                self._constant(name, constant, bits)
            elif (name, bits) not in self._codes:
                self._convert(name, bits)
            if (name, bits) not in self._values:
                self._dequantize(name, bits)
        return self._values[name, bits]

    def _convert(self, name: str, bits: int, codes: str | None = None) -> None:
        value = self._input(name, self._first_bits(name))
        self._quantize(name, value, bits, codes=codes)

    def _first_bits(self, name: str) -> int:
        return next(bits for tensor, bits in self._codes if tensor == name)

    def _quantize(self, name: str, value: str, bits: int, codes: str | None = None) -> None:
        codes = codes or f"{name}.codes{bits}"
        scale = self._scale(name, bits)
        self.scales.setdefault(name, scale)
        path = f"{node_path(name)}/QuantizeLinear{bits}"
        inputs = [value, *self._scale_tensors(name, scale)]
        self._nodes.append(helper.make_node("QuantizeLinear", inputs, [codes], name=path))
        self._codes[name, bits] = codes

    def _dequantize(self, name: str, bits: int, output: str | None = None) -> None:
        value = output or f"{name}.value{bits}"
        path = f"{node_path(name)}/DequantizeLinear{'' if output else bits}"
        inputs = [self._codes[name, bits], *self._scale_tensors(name, self._scale(name, bits))]
        self._nodes.append(helper.make_node("DequantizeLinear", inputs, [value], name=path))
        self._values.setdefault((name, bits), value)

    def _scale(self, name: str, bits: int) -> Scale:
        fixed = self._fixed.get((name, bits))
        return scale_of(self._ranges.find(name, bits), bits) if fixed is None else fixed

    def _scale_tensors(self, name: str, scale: Scale) -> tuple[str, str]:
        owner = name if (name, scale.bits) in self._fixed else self._ranges.root(name)
        stem = f"{owner}.uint{scale.bits}"
        names = (f"{stem}.scale", f"{stem}.zero_point")
        if names[0] not in self._tensors:
            self._tensors[names[0]] = helper.make_tensor(names[0], TensorProto.FLOAT, [], [scale.scale])
            self._tensors[names[1]] = helper.make_tensor(names[1], CODES[scale.bits], [], [scale.zero_point])
        return names

    def _constant(self, name: str, constant: Constant, bits: int) -> None:
        scale = self._scale(name, bits)
        codes = f"{name}.codes{bits}"

        def pieces() -> Iterator[Array]:
            return (scale.codes(piece) for piece in constant.pieces())

        self._tensors[codes] = self._data.tensor(codes, CODES[bits], constant.shape, pieces)
        self._codes[name, bits] = codes

    def _linear(self, name: str, constant: Constant) -> str:
        read: list[LinearCodes] = []

        def codes() -> LinearCodes:
            if not read:
                read.append(self._weights.read(constant.module))
            return read[0]

        bits, block = self._weights.bits(constant.module), self._weights.block(constant.module)
        columns, rows = constant.shape
        shape = (rows,) if block is None else (columns // block, rows)
        stored = TensorProto.INT4 if bits == 4 else TensorProto.INT8
        parts = (
            (f"{name}.codes", stored, constant.shape, lambda: [_stored(codes().codes, bits)]),
            (f"{name}.scale", TensorProto.FLOAT, shape, lambda: [codes().scale]),
            (f"{name}.zero_point", stored, shape, lambda: [_stored(np.zeros(shape, dtype=np.int8), bits)]),
        )
        for part in parts:
            self._tensors[part[0]] = self._data.tensor(*part)
        attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        value = f"{name}.value"
        path = f"{node_path(name)}/DequantizeLinear"
        self._nodes.append(
            helper.make_node("DequantizeLinear", [part[0] for part in parts], [value], name=path, **attributes)
        )
        return value


def _stored(codes: Array, bits: int) -> Array:
    return pack_int4(codes) if bits == 4 else codes
