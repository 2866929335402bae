"""A graph as plain data, before it is decided which tensors are stored in which type.

Tensor names are the names of measured sites where one exists ("model.layers.3.mlp.down_proj.input"), so that ranges
measured elsewhere fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qtool.quantize.export.onnx.linears import node_path

# Their output has the values of their inputs: all of them share one scale.
MOVEMENT = ("Reshape", "Transpose", "Slice", "Concat", "Gather")

# What a constant is: a linear's matrix [K, N]; numbers per channel; rows that are looked up; shapes and indices.
Kind = Literal["linear", "vector", "table", "index"]
Array = npt.NDArray[Any]
Pieces = Callable[[], Iterator[Array]]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A constant whose data is made when it is asked for.

    Attributes:
        kind: see Kind.
        shape: of the data.
        pieces: the data, in pieces along the first axis; of a linear: nothing, its module names it.
        module: of a linear.
    """

    kind: Kind
    shape: tuple[int, ...]
    pieces: Pieces
    module: str = ""


@dataclass(frozen=True, kw_only=True)
class PlainNode:
    """One operator: inputs are names of tensors, constants or graph inputs."""

    name: str
    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


@dataclass
class PlainGraph:
    """Nodes in order.

    Attributes:
        inputs: float and integer graph inputs: (numpy type name, shape); the cache's inputs are in `past`.
        past: cache input → shape.
        outputs: graph output → tensor.
        constants: by name.
        nodes: in order.
    """

    inputs: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    past: dict[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Constant] = field(default_factory=dict)
    nodes: list[PlainNode] = field(default_factory=list)

    def op(self, operator: str, output: str, *inputs: str, **attributes: Any) -> str:
        """Append a node named after its output; returns the output's name."""
        name = f"{node_path(output)}/{operator}"
        self.nodes.append(
            PlainNode(name=name, op=operator, inputs=inputs, output=output, attributes=attributes)
        )
        return output

    def vector(self, name: str, read: Callable[[], Array], shape: tuple[int, ...]) -> str:
        """A constant of numbers per channel."""
        return self._constant(name, Constant(kind="vector", shape=shape, pieces=lambda: iter([read()])))

    def table(self, name: str, pieces: Pieces, shape: tuple[int, ...]) -> str:
        """A constant of rows that are looked up."""
        return self._constant(name, Constant(kind="table", shape=shape, pieces=pieces))

    def index(self, *values: int) -> str:
        """A constant of integers, shared by all who ask for the same."""
        array = np.array(values, dtype=np.int64)
        name = "index." + "_".join(str(value) for value in values)
        return self._constant(name, Constant(kind="index", shape=array.shape, pieces=lambda: iter([array])))

    def reshape(self, output: str, x: str, *shape: int) -> str:
        """x in another shape."""
        return self.op("Reshape", output, x, self.index(*shape))

    def linear(self, module: str, x: str, shape: tuple[int, int], bias: Callable[[], Array] | None) -> str:
        """x [1, T, K] through a linear of shape (K, N): the tensor `{module}.output`."""
        weight = f"{module}.weight"
        constant = Constant(kind="linear", shape=shape, pieces=lambda: iter(()), module=module)
        self._constant(weight, constant)
        if bias is None:
            return self.op("MatMul", f"{module}.output", x, weight)
        product = self.op("MatMul", f"{module}.product", x, weight)
        return self.op("Add", f"{module}.output", product, self.vector(f"{module}.bias", bias, (shape[1],)))

    def _constant(self, name: str, constant: Constant) -> str:
        self.constants.setdefault(name, constant)
        return name
