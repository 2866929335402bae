"""A model family as data: which tensors a config asks for, under which names, in which shapes."""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Architecture, Spine, Stored, TensorTemplate
from qtool.quantize.architectures.shapes import (
    block_linears,
    expected_tensors,
    expert_count,
    linear_names,
    tensor_shapes,
    tensor_templates,
)
from qtool.quantize.architectures.stream import Edge, Stream
from qtool.quantize.architectures.symbols import symbol_sizes
from qtool.quantize.architectures.table import ARCHITECTURES, architecture_of, require_quantizable

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Edge",
    "Spine",
    "Stored",
    "Stream",
    "TensorTemplate",
    "architecture_of",
    "block_linears",
    "expected_tensors",
    "expert_count",
    "linear_names",
    "require_quantizable",
    "symbol_sizes",
    "tensor_shapes",
    "tensor_templates",
]
