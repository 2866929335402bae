"""A model family as data: which tensors a config asks for, under which names, in which shapes."""

from __future__ import annotations

from qtool.quantize.architectures.architecture import Architecture, TensorTemplate
from qtool.quantize.architectures.shapes import block_linears, linear_names, tensor_shapes, tensor_templates
from qtool.quantize.architectures.table import ARCHITECTURES, architecture_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "TensorTemplate",
    "architecture_of",
    "block_linears",
    "linear_names",
    "tensor_shapes",
    "tensor_templates",
]
