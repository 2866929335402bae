"""model.onnx with its weights in one file beside it.

Offsets are multiples of 4 KiB, so that a runtime can map the file; tensors below 1 KiB stay inside model.onnx.
Tensors are made, written and forgotten one at a time, in the graph's order: same graph, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from qtool.quantize.artifacts.package_files import MODEL_FILE

ALIGNMENT_BYTES, INLINE_BELOW_BYTES = 4096, 1024
# In an initializer's `meta`: the name of an earlier one that has the same bytes in another shape.
SAME_BYTES_AS = "qtool.same_bytes_as"

Progress = Callable[[int, int, str], None]


def save_model(model: ir.Model, folder: Path, progress: Progress, *, file: str = MODEL_FILE) -> None:
    """Write a model and its data file ("{file}.data") into a folder; the model's initializers then point into it.

    Args:
        model: every initializer has data, most of it lazy; those that point into a file already are left there.
        folder: exists, holds neither file.
        progress: called with (tensors written, all tensors, name) after each.
        file: the model's name.
    """
    initializers = list(model.graph.initializers.values())
    with (folder / f"{file}.data").open("xb") as data:
        for done, value in enumerate(initializers, start=1):
            _place(value, data, model.graph, f"{file}.data")
            progress(done, len(initializers), str(value.name))
    proto = ir.serde.serialize_model(model)
    (folder / file).write_bytes(proto.SerializeToString(deterministic=True))


def _place(value: ir.Value, file: BinaryIO, graph: ir.Graph, name: str) -> None:
    tensor = value.const_value
    assert tensor is not None and value.name is not None
    if isinstance(tensor, ir.ExternalTensor):
        return
    if tensor.nbytes < INLINE_BELOW_BYTES:
        value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        return
    original = value.meta.get(SAME_BYTES_AS)
    if original is not None:
        there = graph.initializers[original].const_value
        assert isinstance(there, ir.ExternalTensor) and there.length == tensor.nbytes
        offset = there.offset
    else:
        file.write(b"\0" * (-file.tell() % ALIGNMENT_BYTES))
        offset = file.tell()
        file.write(tensor.tobytes())
    value.const_value = ir.ExternalTensor(
        name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
    )
