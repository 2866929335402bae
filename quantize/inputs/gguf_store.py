"""Tensors in a GGUF file, dequantized one at a time with the gguf package's own arithmetic."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.inputs.gguf_header import GgufTensor
from qtool.quantize.inputs.regular_file import RegularFile

CHUNK_BYTES = 4 * 2**20
EXACT: Mapping[str, str] = {"F32": "F32", "F16": "F16", "BF16": "BF16"}

# What a type's grid is, where one of qtool's schemes can hold it almost without loss.
_GRIDS: Mapping[str, str] = {
    "Q4_0": "a 32-wide symmetric 4-bit grid; W4 g32 symmetric is nearly lossless by construction",
    "Q4_1": "a 32-wide asymmetric 4-bit grid; W4 g32 asymmetric is nearly lossless by construction",
    "Q8_0": "a 32-wide symmetric 8-bit grid; W8 g32 symmetric is nearly lossless by construction",
}
_LOSSY = "a lossy format; new errors add to its own"
_READABLE = (
    "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S "
    "IQ1_M IQ4_NL IQ4_XS"
)


class GgufStore:
    """A TensorStore over a checked GGUF head.

    Args:
        file: the file.
        tensors: Hugging Face name to the tensor that holds it.
        head_rows: names whose rows are stored with each head's halves interleaved, to their number of heads.
    """

    def __init__(self, file: RegularFile, tensors: Mapping[str, GgufTensor], head_rows: Mapping[str, int]) -> None:
        for name, tensor in tensors.items():
            if tensor.type not in EXACT and tensor.type not in _READABLE.split():
                why = f"is stored as {tensor.type}, which cannot be read"
                raise InputRefused(f"{file.label}: {name}", why, "give the original model")
        self.files = (file,)
        self.dtypes = {name: EXACT.get(tensor.type, "F32") for name, tensor in tensors.items()}
        self.elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
        self._tensors = tensors
        self._head_rows = head_rows

    def load(self, name: str) -> FloatArray:
        """See TensorStore."""
        tensor = self._tensors[name]
        values = self._dequantize(tensor)
        return deinterleave(values, self._head_rows[name]) if name in self._head_rows else values

    def load_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """See TensorStore."""
        tensor = self._tensors[name]
        if name in self._head_rows or len(tensor.shape) != 2:
            return np.ascontiguousarray(self.load(name)[start:stop])
        row_bytes = tensor.size // tensor.shape[0]
        part = replace(
            tensor,
            shape=(stop - start, tensor.shape[1]),
            start=tensor.start + start * row_bytes,
            size=(stop - start) * row_bytes,
        )
        return self._dequantize(part)

    def _dequantize(self, tensor: GgufTensor) -> FloatArray:
        """Row chunks into one result, so that no second copy of the whole tensor exists."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        width = tensor.shape[-1]
        rows = math.prod(tensor.shape) // width
        row_bytes = tensor.size // rows
        out = np.empty((rows, width), dtype=np.float32)
        step = max(1, CHUNK_BYTES // row_bytes)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = self.files[0].read(tensor.start + first * row_bytes, count * row_bytes).reshape(count, row_bytes)
            out[first : first + count] = dequantize(raw, GGMLQuantizationType[tensor.type])
        return out.reshape(tensor.shape)


def deinterleave(values: FloatArray, heads: int) -> FloatArray:
    """Rows of a rotary projection from GGUF's "llama" order to Hugging Face's.

    Within a head of D rows, GGUF row 2i + s is Hugging Face row s × D/2 + i.

    Args:
        values: [heads × D, ...].
        heads: the number of heads.
    """
    half = values.shape[0] // heads // 2
    split = values.reshape(heads, half, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def grid_notes(tensors: Mapping[str, GgufTensor]) -> tuple[str, ...]:
    """What the weights already lost before qtool saw them, one line a ggml type."""
    counts = Counter(tensor.type for tensor in tensors.values() if tensor.type not in EXACT)
    return tuple(
        f"weights come from {kind} ({count} tensor{'s' * (count > 1)}): {_GRIDS.get(kind, _LOSSY)}"
        for kind, count in counts.most_common()
    )
