"""A part of a package's graph as an ONNX model of its own: the nodes between some values, and their constants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from qtool.errors import InputRefused
from qtool.runtime.ort.session import session_options


def open_segment(
    file: Path, model: ir.Model, inputs: Mapping[ir.Value, ir.DataType], output: ir.Value, threads: int | None
) -> Any:
    """A session that makes `output` ("y") of nothing but constants and the inputs, which it calls x0, x1, … in order.

    Args:
        file: named in refusals.
        model: the package's graph, its constants loadable.
        inputs: values of the graph and their types.
        output: a value that depends on all of them.
        threads: of the session.

    Raises:
        InputRefused: when the output depends on something else, or not on an input; when a constant cannot be read, or
            ONNX Runtime refuses the part.
    """
    between = nodes_between(file, inputs, output)
    values: dict[ir.Value, ir.Value] = {}
    for index, (value, dtype) in enumerate(inputs.items()):
        values[value] = ir.Value(name=f"x{index}", type=ir.TensorType(dtype))
    given, nodes = list(values.values()), []
    constants: list[ir.Value] = []
    for number, node in enumerate(between):
        for read in node.inputs:
            if read is not None and read not in values:
                values[read] = _constant(file, f"constant_{len(constants)}", read)
                constants.append(values[read])
        alone = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values[value] for value in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=f"node_{number}",
        )
        for index, (old, new) in enumerate(zip(node.outputs, alone.outputs, strict=True)):
            new.name = f"value_{number}_{index}" if old.name else ""
            values[old] = new
        nodes.append(alone)
    values[output].name, values[output].type = "y", ir.TensorType(ir.DataType.FLOAT)
    imports = dict(model.graph.opset_imports)
    part = ir.Graph(given, [values[output]], nodes=nodes, initializers=constants, opset_imports=imports, name="part")
    data = ir.to_proto(ir.Model(part, ir_version=model.ir_version)).SerializeToString()
    try:
        return ort.InferenceSession(data, session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        raise InputRefused(f"{file}: {output.name}", "ONNX Runtime refuses its nodes", "export again") from error


def nodes_between(file: Path, inputs: Mapping[ir.Value, Any], output: ir.Value) -> list[ir.Node]:
    """All nodes that make the output of the inputs and of constants, each after those it reads."""
    order: dict[ir.Node, None] = {}
    reached: set[ir.Value] = set()
    pending: list[tuple[ir.Value, bool]] = [(output, False)]
    while pending:
        value, made = pending.pop()
        producer = value.producer()
        if value in inputs or value.const_value is not None:
            reached.add(value)
        elif producer is None:
            raise InputRefused(f"{file}: {output.name}", f"is made of {value.name} too", "export again")
        elif made:
            order[producer] = None
        elif producer not in order:
            pending.append((value, True))
            pending += [(read, False) for read in reversed(producer.inputs) if read is not None]
    for value in inputs:
        if value not in reached:
            raise InputRefused(f"{file}: {output.name}", f"is not made of {value.name}", "export again")
    return list(order)


def _constant(file: Path, name: str, value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    try:
        array = value.const_value.numpy().copy()
    except (ValueError, OSError) as error:
        raise InputRefused(f"{file}: {value.name}", "cannot be read", "export again") from error
    tensor = ir.tensor(array, dtype=value.const_value.dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
