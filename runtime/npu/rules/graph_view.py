"""A model as the rules look at it: producers, readers, element types, shapes, constants."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
Array = npt.NDArray[Any]


class GraphView:
    """The main graph of a model.

    Args:
        model: with or without its external data.
        folder: where external data lies; None: it is not read, and what needs it passes.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None) -> None:
        self.model, self.folder = model, folder
        try:
            self.inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except Exception:  # a graph that inference chokes on is judged by what it says itself
            self.inferred = model
        self.graph = self.inferred.graph
        self.nodes: Sequence[Any] = self.graph.node
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in self.graph.output}
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}

    @cached_property
    def inputs(self) -> list[Any]:
        """Graph inputs that are no initializers."""
        return [value for value in self.graph.input if value.name not in self.initializers]

    @cached_property
    def values(self) -> dict[str, Any]:
        """Value infos by name."""
        return {value.name: value for value in (*self.graph.input, *self.graph.value_info, *self.graph.output)}

    def element_type(self, name: str) -> int | None:
        """The TensorProto type of a tensor, None when unknown."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        value = self.values.get(name)
        return int(value.type.tensor_type.elem_type) if value is not None else None

    def is_float(self, name: str) -> bool:
        """Whether a tensor holds floats."""
        return self.element_type(name) in FLOATS

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """A tensor's dimensions, a word or "?" for one that is not fixed; None when it has no known rank."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        value = self.values.get(name)
        if value is None or not value.type.tensor_type.HasField("shape"):
            return None
        dims = value.type.tensor_type.shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)

    def constant(self, name: str) -> Array | None:
        """A constant's values, or None when it is none, or its data is not at hand."""
        tensor = self.initializers.get(name)
        node = self.producer.get(name)
        if tensor is None and node is not None and node.op_type == "Constant":
            tensor = helper.get_node_attr_value(node, "value")
        if tensor is not None and tensor.data_location == TensorProto.EXTERNAL:
            tensor = self._external(tensor)
        if tensor is None:
            return None
        array: Array = numpy_helper.to_array(tensor)
        return array

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is an initializer or a Constant's output."""
        node = self.producer.get(name)
        return name in self.initializers or (node is not None and node.op_type == "Constant")

    def _external(self, tensor: TensorProto) -> TensorProto | None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if self.folder is None or Path(location).name != location or not (self.folder / location).is_file():
            return None
        if (self.folder / location).is_symlink():
            return None
        with (self.folder / location).open("rb") as file:
            file.seek(int(entries.get("offset", "0")))
            raw = file.read(int(entries["length"])) if "length" in entries else file.read()
        return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)


def label(node: Any) -> str:
    """A node's name, or what it writes where it has none."""
    return str(node.name or f"{node.op_type} → {node.output[0]}")


def attribute(node: Any, name: str, default: int) -> int:
    """An integer attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def finite_positive(values: Array) -> bool:
    """Whether scales are usable."""
    return bool(np.isfinite(values).all() and (values > 0).all())
