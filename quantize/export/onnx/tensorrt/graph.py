"""A writer of standard operators over float16, constants in one data file: every type is in the file, none is left to
the runtime's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.linears import node_path
from qtool.quantize.export.onnx.npu.data_file import DataFile

OPSET, IR_VERSION = 21, 10  # the oldest with INT4 and blocks
HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT
LARGEST = float(np.finfo(np.float16).max)
Array = npt.NDArray[Any]
Dimension = int | str


class StandardGraph:
    """Nodes in order. Names of tensors are those of modules, so that a reader of the file finds his way.

    Args:
        data: takes the constants.
    """

    def __init__(self, data: DataFile) -> None:
        self._data = data
        self._constants: dict[str, TensorProto] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, element: int, shape: Sequence[Dimension]) -> str:
        """A graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        return name

    def output(self, name: str, element: int, shape: Sequence[Dimension]) -> str:
        """Declare a tensor that some node makes under this name as a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        return name

    def op(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; returns the name of its one output."""
        name = f"{node_path(output)}/{operator}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=name, **attributes))
        return output

    def reshape(self, output: str, x: str, *shape: int) -> str:
        """x in another shape; 0 copies a dimension, −1 is what is left."""
        return self.op("Reshape", output, x, self.integers(*shape))

    def integers(self, *values: int) -> str:
        """A constant [n] of int64, inside the graph, shared by all who ask for the same."""
        return self._small("index." + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def integer(self, value: int) -> str:
        """A constant of rank 0."""
        return self._small(f"number.{value}", np.array(value, dtype=np.int64))

    def number(self, name: str, value: float, element: int = HALF) -> str:
        """A constant float of rank 0."""
        return self._small(name, np.array(value, dtype=np.float16 if element == HALF else np.float32))

    def halves(self, name: str, shape: Sequence[int], pieces: Callable[[], Iterable[Array]]) -> str:
        """A float16 constant, rounded piece by piece from what is read.

        Raises:
            InputRefused: for a number that float16 does not hold.
        """
        return self.stored(name, HALF, shape, lambda: (_half(name, piece) for piece in pieces()))

    def stored(self, name: str, element: int, shape: Sequence[int], pieces: Callable[[], Iterable[Array]]) -> str:
        """A constant of any type, in its stored bytes."""
        if name not in self._constants:
            self._constants[name] = self._data.tensor(name, element, shape, pieces)
        return name

    def model(self, properties: dict[str, str]) -> onnx.ModelProto:
        """The whole."""
        graph = helper.make_graph(
            self._nodes, "model", self._inputs, self._outputs, initializer=list(self._constants.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name, model.producer_version = "qtool", properties["qtool.version"]
        helper.set_model_props(model, dict(sorted(properties.items())))
        return model

    def _small(self, name: str, array: Array) -> str:
        self._constants.setdefault(name, onnx.numpy_helper.from_array(array, name))
        return name


def _half(name: str, array: Array) -> Array:
    if not bool((np.abs(array) <= LARGEST).all()):
        why = f"has numbers beyond float16's {LARGEST:.0f}"
        raise InputRefused(name, why, "export with --target cpu, which computes in float32")
    half: Array = array.astype(np.float16)
    return half


def once(array: Array) -> Iterator[Array]:
    """One piece."""
    yield array
