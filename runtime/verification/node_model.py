"""Nodes of a package's graph, one or a few, run on their own with the package's own initializers.

Only files inside the package are read: a tensor stored elsewhere, or beyond the end of its file, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.session import MODEL
from qtool.runtime.verification.segment import nodes_between, open_segment

# Where each lowered operator takes what is not a constant: (input index, type).
DYNAMIC_INPUTS: dict[str, tuple[int, ir.DataType]] = {
    "MatMulNBits": (0, ir.DataType.FLOAT),
    "GatherBlockQuantized": (1, ir.DataType.INT64),
}
GATHER_CHUNK = 4096


class PackageGraph:
    """A package's graph, opened for taking nodes out of it.

    Raises:
        InputRefused: when the file is not an ONNX model, or keeps data outside the folder.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        self._path = folder / MODEL
        self._threads = threads
        try:
            self._model = ir.load(self._path)
        except Exception as error:  # protobuf, onnx and onnx-ir each raise their own
            raise InputRefused(self._path, "is not an ONNX model", "export the package again") from error
        for value in self._model.graph.initializers.values():
            _check_inside(folder, value)
        self._nodes = {str(n.name): n for n in self._model.graph if n.op_type in DYNAMIC_INPUTS}
        made = (value for node in self._model.graph for value in node.outputs if value.name)
        self._values = {str(value.name): value for value in (*self._model.graph.inputs, *made)}

    @property
    def lowered(self) -> dict[str, str]:
        """Every quantized node's name and operator."""
        return {name: node.op_type for name, node in self._nodes.items()}

    def has_bias(self, name: str) -> bool:
        """Whether a MatMulNBits node adds the bias itself."""
        inputs = self._nodes[name].inputs
        return len(inputs) > 5 and inputs[5] is not None

    def multiply(self, name: str, x: FloatArray) -> FloatArray:
        """What the node makes of x [M, K] float32: for MatMulNBits its output [M, N]; for GatherBlockQuantized the
        product of x with the whole looked-up table [N, K], in float64."""
        session = self._session(name)
        if self._nodes[name].op_type == "MatMulNBits":
            # One row alone takes the runtime's matrix-vector path; both must be right.
            together = _run(session, x)
            return np.concatenate([_run(session, x[:1]), together[1:]]) if len(x) > 1 else together
        rows = self._table_rows(name)
        wide = x.astype(np.float64)
        out = np.empty((len(x), rows), dtype=np.float64)
        for start in range(0, rows, GATHER_CHUNK):
            ids = np.arange(start, min(start + GATHER_CHUNK, rows), dtype=np.int64)
            out[:, ids] = wide @ _run(session, ids)[:, : x.shape[1]].astype(np.float64).T
        return out  # type: ignore[return-value]

    def _table_rows(self, name: str) -> int:
        table = self._nodes[name].inputs[0]
        assert table is not None and table.const_value is not None
        return int(table.const_value.shape[0])  # type: ignore[arg-type]

    def surrounded(self, name: str) -> tuple[str, str]:
        """The names of what a node reads and of what it hands out."""
        node = self._nodes[name]
        x = node.inputs[DYNAMIC_INPUTS[node.op_type][0]]
        return str(x.name) if x is not None else "", str(node.outputs[0].name)

    def between(self, inputs: Mapping[str, FloatArray], output: str) -> FloatArray:
        """What the nodes between some values make of them.

        Args:
            inputs: by the value's name, [M, width] float32.
            output: a value's name.

        Returns:
            [M, width] float32; the first row was computed alone.

        Raises:
            InputRefused: when the output is not made of these values and of constants alone, see `open_segment`.
        """
        types = {self._value(name): ir.DataType.FLOAT for name in inputs}
        session = open_segment(self._path, self._model, types, self._value(output), self._threads)
        feeds = {f"x{i}": x[None] for i, x in enumerate(inputs.values())}
        together: FloatArray = session.run(None, feeds)[0][0]
        alone = session.run(None, {name: x[:, :1] for name, x in feeds.items()})[0][0]
        return np.concatenate([alone, together[1:]])

    def readers(self, name: str) -> int:
        """How many nodes read a value; the graph itself is one that reads its outputs."""
        value = self._value(name)
        return len(value.consumers()) + value.is_graph_output()

    def read_between(self, name: str, inputs: Sequence[str], output: str) -> bool:
        """Whether a value is read by one node alone, one of those that make the output of the inputs."""
        inside = nodes_between(self._path, {self._value(x): None for x in inputs}, self._value(output))
        users = self._value(name).consumers()
        return self.readers(name) == 1 and len(users) == 1 and users[0] in inside

    def _value(self, name: str) -> ir.Value:
        if name not in self._values:
            raise InputRefused(f"{self._path}: {name}", "is no value of the graph", "export the package again")
        return self._values[name]

    def _session(self, name: str) -> Any:
        node = self._nodes[name]
        index, dtype = DYNAMIC_INPUTS[node.op_type]
        x = node.inputs[index]
        if x is None:
            raise InputRefused(f"{self._path}: {name}", "reads nothing", "export the package again")
        return open_segment(self._path, self._model, {x: dtype}, node.outputs[0], self._threads)


def _run(session: Any, x: npt.NDArray[Any]) -> FloatArray:
    out: FloatArray = session.run(None, {"x0": x})[0]
    return out


def _check_inside(folder: Path, value: ir.Value) -> None:
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return
    name = str(tensor.location)
    path = folder / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise InputRefused(f"{folder / MODEL}: {value.name}", f"is stored in {name}", "keep data inside the package")
    offset, length = tensor.offset or 0, tensor.length
    end = offset + (tensor.nbytes if length is None else length)
    if offset < 0 or end > path.stat().st_size or (length is not None and length != tensor.nbytes):
        raise InputRefused(f"{folder / MODEL}: {value.name}", f"does not lie inside {name}", "export again")
