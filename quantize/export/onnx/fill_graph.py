"""fill.onnx: the graph that reads a prompt into the cache, in INT8, beside a package's model.onnx.

It takes what model.onnx takes and hands out the cache alone: no head, and of the last layer only keys and values, so
none of that is computed or stored; with logits it answers a prompt by itself, which onnxruntime-genai wants. Norms,
rotary tables, the embedding, linears that are not INT8 and whatever else model.onnx holds under the same name are read
out of its data file; fill.onnx.data holds the INT8 weights only.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qtool.quantize.artifacts.package_files import FILL_MODEL
from qtool.quantize.export.onnx.external_data import Progress, save_model

LOGITS = "logits"


def cache_outputs(graph: ir.Graph) -> list[ir.Value]:
    """What a decoder's graph hands out beside the logits."""
    return [value for value in graph.outputs if value.name != LOGITS]


def drop_logits(fill: ir.Model) -> None:
    """Let a graph hand out the cache alone."""
    kept = cache_outputs(fill.graph)
    fill.graph.outputs.clear()
    fill.graph.outputs.extend(kept)


def save_fill_graph(fill: ir.Model, model: ir.Model, folder: Path, progress: Progress) -> int:
    """Cut a lowered graph down to what its outputs need, and write it.

    Args:
        fill: lowered; without data in files; it hands out the cache, and logits where they are wanted.
        model: model.onnx as it was saved.
        folder: where it was saved.
        progress: called with (tensors written, all tensors, name).

    Returns:
        Bytes of the data file.
    """
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
