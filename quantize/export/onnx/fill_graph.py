"""fill.onnx: the graph that reads a prompt into the cache, in INT8, beside a package's model.onnx.

It takes what model.onnx takes and hands out the cache alone: no head, and of the last layer only keys and values, so
none of that is computed or stored. Norms, rotary tables, the embedding and whatever else model.onnx holds under the
same name are read out of its data file; fill.onnx.data holds the INT8 weights only.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qtool.quantize.artifacts.package_files import FILL_MODEL
from qtool.quantize.export.onnx.external_data import Progress, save_model

LOGITS = "logits"


def save_fill_graph(fill: ir.Model, model: ir.Model, folder: Path, progress: Progress) -> int:
    """Cut a lowered graph down to what fills the cache, and write it.

    Args:
        fill: lowered; without data in files.
        model: model.onnx as it was saved.
        folder: where it was saved.
        progress: called with (tensors written, all tensors, name).

    Returns:
        Bytes of the data file.
    """
    kept = [value for value in fill.graph.outputs if value.name != LOGITS]
    fill.graph.outputs.clear()
    fill.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(fill)
    for name, value in fill.graph.initializers.items():
        there = model.graph.initializers.get(name)
        if there is not None and isinstance(there.const_value, ir.ExternalTensor):
            _share(value, there.const_value)
    save_model(fill, folder, progress, file=FILL_MODEL)
    return (folder / f"{FILL_MODEL}.data").stat().st_size


def _share(value: ir.Value, stored: ir.ExternalTensor) -> None:
    own = value.const_value
    assert own is not None and own.dtype == stored.dtype and own.shape == stored.shape, value.name
    value.const_value = stored
