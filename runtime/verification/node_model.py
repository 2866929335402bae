"""One node of a package's graph as an ONNX model of its own, with the package's own initializers.

Only files inside the package are read: a tensor stored elsewhere, or beyond the end of its file, is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.ort.session import MODEL, session_options

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

    def _session(self, name: str) -> Any:
        node = self._nodes[name]
        index, dtype = DYNAMIC_INPUTS[node.op_type]
        inputs: list[ir.Value | None] = []
        constants: list[ir.Value] = []
        for i, value in enumerate(node.inputs):
            if i == index:
                inputs.append(ir.Value(name="x", type=ir.TensorType(dtype), shape=_dynamic_shape(node.op_type)))
                continue
            copy = None if value is None else self._constant(name, i, value)
            inputs.append(copy)
            constants += [] if copy is None else [copy]
        alone = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), name="node")
        alone.outputs[0].name = "y"
        alone.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        dynamic = inputs[index]
        assert dynamic is not None
        graph = ir.Graph(
            [dynamic],
            [alone.outputs[0]],
            nodes=[alone],
            initializers=constants,
            opset_imports=dict(self._model.graph.opset_imports),
            name="one_node",
        )
        data = ir.to_proto(ir.Model(graph, ir_version=self._model.ir_version)).SerializeToString()
        try:
            return ort.InferenceSession(data, session_options(self._threads), providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's exceptions share no base class
            raise InputRefused(f"{self._path}: {name}", "ONNX Runtime refuses the node", "export again") from error

    def _constant(self, node: str, index: int, value: ir.Value) -> ir.Value:
        if value.const_value is None:
            raise InputRefused(f"{self._path}: {node}", f"input {index} is not stored in the model", "export again")
        try:
            array = value.const_value.numpy().copy()
        except (ValueError, OSError) as error:
            raise InputRefused(f"{self._path}: {value.name}", "cannot be read", "export again") from error
        tensor = ir.tensor(array, dtype=value.const_value.dtype, name=f"constant_{index}")
        return ir.Value(
            name=f"constant_{index}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )


def _dynamic_shape(op_type: str) -> ir.Shape:
    return ir.Shape(["M", None] if op_type == "MatMulNBits" else ["M"])


def _run(session: Any, x: npt.NDArray[Any]) -> FloatArray:
    out: FloatArray = session.run(None, {"x": x})[0]
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
