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
from qtool.quantize.artifacts.package_files import model_path
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.verification.segment import nodes_between, open_segment

# Where each lowered operator takes what is not a constant: (input index, type). The integer product's input is codes;
# it is run from the floats that they are made of to the floats that its rows' scales make of it.
TOKEN_INT8 = "MatMulIntegerToFloat"
DYNAMIC_INPUTS: dict[str, tuple[int, ir.DataType]] = {
    "MatMulNBits": (0, ir.DataType.FLOAT),
    "GatherBlockQuantized": (1, ir.DataType.INT64),
    TOKEN_INT8: (0, ir.DataType.FLOAT),
}
PRODUCTS = ("MatMulNBits", TOKEN_INT8)
GATHER_CHUNK = 4096


class PackageGraph:
    """A package's graph, opened for taking nodes out of it.

    Args:
        folder: the package.
        threads: of the sessions; None for all cores.
        file: another graph than the model.
        prefix: what this object's names of nodes begin with.

    Raises:
        InputRefused: when the file is not an ONNX model, or keeps data outside the folder.
    """

    def __init__(
        self, folder: Path, *, threads: int | None = None, file: str | None = None, prefix: str = ""
    ) -> None:
        self._path = model_path(folder) if file is None else folder / file
        self._threads = threads
        try:
            self._model = ir.load(self._path)
        except Exception as error:  # protobuf, onnx and onnx-ir each raise their own
            raise InputRefused(self._path, "is not an ONNX model", "export the package again") from error
        for value in self._model.graph.initializers.values():
            _check_inside(self._path, value)
        self._nodes = {f"{prefix}{n.name}": n for n in self._model.graph if n.op_type in DYNAMIC_INPUTS}
        made = (value for node in self._model.graph for value in node.outputs if value.name)
        self._values = {str(value.name): value for value in (*self._model.graph.inputs, *made)}

    @property
    def lowered(self) -> dict[str, str]:
        """Every quantized node's name and operator."""
        return {name: node.op_type for name, node in self._nodes.items()}

    def has_bias(self, name: str) -> bool:
        """Whether a node's product comes with the bias."""
        if self._nodes[name].op_type == TOKEN_INT8:
            producer = self._ends(name)[1].producer()
            return producer is not None and producer.op_type == "Add"
        inputs = self._nodes[name].inputs
        return len(inputs) > 5 and inputs[5] is not None

    def multiply(self, name: str, x: FloatArray) -> FloatArray:
        """What the node makes of x [M, K] float32: for PRODUCTS its output [M, N]; for GatherBlockQuantized the
        product of x with the whole looked-up table [N, K], in float64."""
        session = self._session(name)
        if self._nodes[name].op_type in PRODUCTS:
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
        x, y = self._ends(name)
        return str(x.name), str(y.name)

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
        x, y = self._ends(name)
        dtype = DYNAMIC_INPUTS[self._nodes[name].op_type][1]
        return open_segment(self._path, self._model, {x: dtype}, y, self._threads)

    def _ends(self, name: str) -> tuple[ir.Value, ir.Value]:
        """What a node reads and hands out; of an integer product, the floats in front and behind."""
        node = self._nodes[name]
        x: ir.Value | None = node.inputs[DYNAMIC_INPUTS[node.op_type][0]]
        y: ir.Value | None = node.outputs[0]
        if node.op_type == TOKEN_INT8:
            x, y = self._before_codes(x), self._behind_product(node)
        if x is None or y is None:
            raise InputRefused(f"{self._path}: {name}", "does not stand between floats", "export the package again")
        return x, y

    def _before_codes(self, codes: ir.Value | None) -> ir.Value | None:
        """What is brought to one range and rounded: QuantizeLinear(Mul(x, ·))."""
        for operator in ("QuantizeLinear", "Mul"):
            producer = None if codes is None else codes.producer()
            if producer is None or producer.op_type != operator:
                return None
            codes = producer.inputs[0]
        return codes

    def _behind_product(self, node: ir.Node) -> ir.Value | None:
        """The product times its rows' scales, with the bias where the linear has one."""
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or readers[0].op_type != "Mul":
            return None
        out = readers[0].outputs[0]
        added = [n for n in out.consumers() if n.name == f"{str(node.name).removesuffix(TOKEN_INT8)}Add"]
        return added[0].outputs[0] if added else out


def _run(session: Any, x: npt.NDArray[Any]) -> FloatArray:
    out: FloatArray = session.run(None, {"x0": x})[0]
    return out


def _check_inside(model: Path, value: ir.Value) -> None:
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return
    name = str(tensor.location)
    path = model.parent / name
    if Path(name).name != name or path.is_symlink() or not path.is_file():
        raise InputRefused(f"{model}: {value.name}", f"is stored in {name}", "keep data inside the package")
    offset, length = tensor.offset or 0, tensor.length
    end = offset + (tensor.nbytes if length is None else length)
    if offset < 0 or end > path.stat().st_size or (length is not None and length != tensor.nbytes):
        raise InputRefused(f"{model}: {value.name}", f"does not lie inside {name}", "export again")
