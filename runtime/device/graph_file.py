"""A package's model.onnx as a form checker reads it: nodes by what they make, constants with their types and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import external_data_helper, numpy_helper

from qtool.errors import InputRefused, UsageError

Array = npt.NDArray[Any]


class GraphFile:
    """One file.

    Args:
        path: of the .onnx file; its weights are read one at a time, when asked for.

    Attributes:
        path, model: as read, without the data beside it.
        nodes: in order.
        maker: node by the name of its output.
        constants: initializer by name.
        types: element type of every value that the file declares, by name.

    Raises:
        UsageError: when there is no such file.
        InputRefused: when it is no ONNX file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UsageError(path, "does not exist", "give a package that qtool export wrote")
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except Exception as error:  # protobuf's and onnx's exceptions share no base class
            raise InputRefused(path, "is no ONNX file", "export the package again") from error
        graph = self.model.graph
        self.nodes = list(graph.node)
        self.maker = {name: node for node in graph.node for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        declared = [*graph.input, *graph.output, *graph.value_info]
        self.types = {value.name: int(value.type.tensor_type.elem_type) for value in declared}
        self.types |= {name: int(tensor.data_type) for name, tensor in self.constants.items()}

    def attribute(self, node: onnx.NodeProto, name: str) -> Any:
        """An attribute's value, None where it is not given."""
        return next((onnx.helper.get_attribute_value(one) for one in node.attribute if one.name == name), None)

    def array(self, name: str) -> Array:
        """A constant's numbers, in numpy's own or ml_dtypes' types."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.constants[name])
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
        found: Array = np.asarray(numpy_helper.to_array(tensor))
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """A constant's shape."""
        return tuple(self.constants[name].dims)


def checker_breaches(path: Path) -> list[str]:
    """What onnx's own checker says of a file, types and shapes inferred strictly; at most one line."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [f"{path.name}: {str(error).splitlines()[0][:200]}"]
    return []
