"""All rules on one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

from qtool.errors import InputRefused, UsageError
from qtool.runtime.npu.rules import edges, form, weights
from qtool.runtime.npu.rules.breach import Breach
from qtool.runtime.npu.rules.graph_view import GraphView

CHECKS: tuple[Callable[[GraphView], Iterator[Breach]], ...] = (
    form.opsets,
    form.shapes,
    form.operators,
    form.attributes,
    edges.quantized_edges,
    edges.constant_scales,
    edges.activation_types,
    edges.same_scales,
    weights.weights,
)


def check_model(model: onnx.ModelProto, folder: Path | None = None) -> list[Breach]:
    """Every breach, rule by rule and in graph order.

    Args:
        model: any ONNX model; its weights need not be loaded.
        folder: where its external data lies, for the zero points in it.
    """
    view = GraphView(model, folder)
    return [breach for check in CHECKS for breach in check(view)]


def check_file(path: Path) -> list[Breach]:
    """`check_model` of a file.

    Raises:
        UsageError: no such file.
        InputRefused: not an ONNX model.
    """
    if not path.is_file():
        raise UsageError(path, "is no file", "give an .onnx file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # protobuf's own error, whose module has no types
        raise InputRefused(path, "is not an ONNX model", "give an .onnx file") from None
    if not model.graph.node:
        raise InputRefused(path, "is not an ONNX model with nodes", "give an .onnx file")
    return check_model(model, path.parent)
