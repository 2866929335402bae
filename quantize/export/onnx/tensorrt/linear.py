"""One linear as nodes: float16, or the Q and DQ of its form around the checkpoint's own codes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from onnx import TensorProto

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.network import EMBEDDING, HEAD
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.export.onnx.npu.data_file import pack_int4
from qtool.quantize.export.onnx.tensorrt.forms import Form, form_of
from qtool.quantize.export.onnx.tensorrt.graph import Array, StandardGraph, once

EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"
# A scale's rounding to float16 that still is far below the format's own step.
LARGEST_SCALE_ERROR = 1 / 128
BLOCK_AXIS, CHANNEL_AXIS = 0, 1


class LinearWriter:
    """Writes the linears of a source.

    Args:
        graph: is appended to.
        source: a checkpoint or a float model.

    Attributes:
        forms: name of the form by module, of quantized linears.
        scale_error: the largest relative change of a scale by float16.
        sizes: number of weights by module, of all linears.
        bits: stored bits by module, scales counted.
    """

    def __init__(self, graph: StandardGraph, source: WeightSource) -> None:
        self._graph, self._source = graph, source
        self._names = set(source.names())
        self._schemes = source.schemes if isinstance(source, QuantizedCheckpoint) else {}
        self._read = lru_cache(maxsize=1)(self._quantized)
        self._inputs: dict[tuple[str, str, float], str] = {}
        self.forms: dict[str, str] = {}
        self.scale_error = 0.0
        self.sizes: dict[str, int] = {}
        self.bits: dict[str, int] = {}

    def write(self, module: str, x: str, columns: int, rows: int) -> str:
        """x [B, T, K] through a linear: the tensor `{module}.output` [B, T, N]."""
        graph, bias = self._graph, f"{module}.bias"
        scheme = self._schemes.get(module)
        self.sizes[module] = columns * rows
        self.bits[module] = 16 * columns * rows
        if scheme is None:
            weight = self._float_weight(module, columns, rows)
        else:
            form = form_of(module, scheme, columns)
            self.forms[module] = form.name
            x = self._input(module, x, form)
            weight = self._weight(module, form, columns, rows)
        if bias not in self._names:
            return graph.op("MatMul", f"{module}.output", x, weight)
        product = graph.op("MatMul", f"{module}.product", x, weight)
        values = graph.halves(bias, (rows,), lambda: once(self._source.read(bias)))
        return graph.op("Add", f"{module}.output", product, values)

    def _float_weight(self, module: str, columns: int, rows: int) -> str:
        name = f"{module}.weight"
        if module == HEAD and name not in self._names:
            return self._graph.op("Transpose", f"{module}.matrix", EMBEDDING_WEIGHT, perm=[1, 0])
        return self._graph.halves(name, (columns, rows), lambda: once(self._source.read(name).T))

    def _weight(self, module: str, form: Form, columns: int, rows: int) -> str:
        block = group_size_of(self._schemes[module].weight.granularity)
        element = TensorProto.DataType.Value(form.weight)
        codes = self._graph.stored(
            f"{module}.codes", element, (columns, rows), lambda: once(_CODES[form.weight](self._read(module)))
        )
        shape = (rows,) if block is None else (columns // block, rows)
        scale = self._graph.halves(f"{module}.scale", shape, lambda: once(self._scale(module, block)))
        self.bits[module] = columns * rows * self._schemes[module].weight.format.bits + 16 * int(np.prod(shape))
        where = {"axis": CHANNEL_AXIS} if block is None else {"axis": BLOCK_AXIS, "block_size": block}
        return self._graph.op("DequantizeLinear", f"{module}.weight", codes, scale, **where)

    def _input(self, module: str, x: str, form: Form) -> str:
        if form.activation is None:
            return x
        stored = self._read(module).input_scale
        assert stored is not None
        value = float(stored)
        key = (x, form.activation, value)
        if key not in self._inputs:
            self._note(module, np.array([value], dtype=np.float32))
            graph, name = self._graph, f"{module}.quantized_input"
            element = TensorProto.DataType.Value(form.activation)
            scale = graph.number(f"{name}.scale", value)
            zero = graph.stored(f"{name}.zero", element, (), lambda: once(np.zeros((), dtype=np.uint8)))
            codes = graph.op("QuantizeLinear", f"{name}.codes", x, scale, zero)
            self._inputs[key] = graph.op("DequantizeLinear", name, codes, scale, zero)
        return self._inputs[key]

    def _scale(self, module: str, block: int | None) -> Array:
        scale = self._read(module).scale.to(torch.float32).numpy().T
        self._note(module, scale)
        return np.ascontiguousarray(scale if block is not None else scale[0])

    def _note(self, module: str, scale: Array) -> None:
        error = float((np.abs(scale.astype(np.float16).astype(np.float32) / scale - 1)).max())
        if not error <= LARGEST_SCALE_ERROR:
            why = f"is {100 * error:.1f} % off in float16, which TensorRT computes in"
            raise InputRefused(f"{module}: scale", why, "leave this layer in float (recipe: ignore)")
        self.scale_error = max(self.scale_error, error)

    def _quantized(self, module: str) -> QuantizedTensor:
        assert isinstance(self._source, QuantizedCheckpoint)
        return self._source.quantized(module)


def _integers(tensor: QuantizedTensor) -> Array:
    signed = tensor.codes.numpy().astype(np.int16) - tensor.scheme.weight.format.zero_code
    return np.ascontiguousarray(signed.astype(np.int8).T)


def _fp8(tensor: QuantizedTensor) -> Array:
    bits: Array = tensor.codes.view(torch.uint8).numpy()
    return np.ascontiguousarray(bits.T)


_CODES = {"INT4": lambda tensor: pack_int4(_integers(tensor)), "INT8": _integers, "FLOAT8E4M3FN": _fp8}
