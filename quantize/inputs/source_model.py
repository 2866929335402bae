"""A model that was opened: checked config, checked tensors, tokenizer files and the notes to print."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.architectures import tensor_shapes
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.inputs.regular_file import PIECE_BYTES, RegularFile

LARGEST_WEIGHT = 65504.0
LARGE_ELEMENTS = 2**25  # from here on a tensor is looked at in pieces
PIECE_ELEMENTS = 2**22


class TensorStore(Protocol):
    """Where the tensors lie: safetensors shards, or a GGUF file."""

    @property
    def files(self) -> Sequence[RegularFile]:
        """The weight files, in a fixed order."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Tensor name to the dtype that holds it exactly: "F32", "F16" or "BF16"."""
        ...

    @property
    def elements(self) -> int:
        """The number of weights."""
        ...

    def load(self, name: str) -> FloatArray:
        """One tensor as a fresh float32 array, its values not yet looked at."""
        ...

    def load_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start … stop − 1 of it."""
        ...


class SourceModel:
    """A WeightSource over a model that someone else wrote.

    Attributes:
        config: the validated config, complete.
        tokenizer_files: file name to bytes, as they came (for GGUF: made from its metadata).
        notes: policies and warnings to print.
    """

    def __init__(
        self,
        *,
        label: str,
        config: Mapping[str, Any],
        store: TensorStore,
        tokenizer_files: Mapping[str, bytes],
        notes: Sequence[str],
    ) -> None:
        self.label = label
        self.config = dict(config)
        self.tokenizer_files = dict(tokenizer_files)
        self.notes = tuple(notes)
        self._store = store

    @cached_property
    def digest(self) -> str:
        """sha256 over the config and the content of every weight file; read once, then remembered."""
        total = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self._store.files:
            total.update(content_hash(file))
        return total.hexdigest()

    @property
    def float_bytes(self) -> int:
        """Bytes of all weights in float32."""
        return 4 * self._store.elements

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted(self._store.dtypes)

    def stored_dtype(self, name: str) -> str:
        """The dtype that holds the tensor exactly: "F32", "F16" or "BF16"."""
        return self._store.dtypes[name]

    def read(self, name: str) -> FloatArray:
        """One tensor as float32, checked.

        Raises:
            KeyError: unknown name.
            InputRefused: a NaN, an infinity, or a weight so large that the file must be damaged.
        """
        return self._checked(name, self._store.load(name))

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start … stop − 1 of a tensor, checked likewise."""
        return self._checked(name, self._store.load_rows(name, start, stop))

    def _checked(self, name: str, array: FloatArray) -> FloatArray:
        if array.size:
            low, high = float(array.min()), float(array.max())  # NaN goes through both
            if not (np.isfinite(low) and np.isfinite(high)):
                raise InputRefused(f"{self.label}: {name}", f"holds {_describe(array)}", "give an undamaged model")
            if max(-low, high) > LARGEST_WEIGHT:
                why = f"holds a weight of {max(-low, high):.3g}, larger than any trained weight"
                raise InputRefused(f"{self.label}: {name}", why, "the file is damaged; download it again")
        return array


def check_finite(source: SourceModel, progress: Callable[[int, int, str], None] | None = None) -> None:
    """Read every tensor once.

    Args:
        source: the model.
        progress: called as (done, total, tensor name) before each tensor.

    Raises:
        InputRefused: naming the first tensor with a NaN, an infinity or an absurd weight.
    """
    names, shapes = source.names(), tensor_shapes(source.config)
    for index, name in enumerate(names):
        if progress is not None:
            progress(index, len(names), name)
        rows, width = shapes[name][0], math.prod(shapes[name][1:])
        step = rows if rows * width <= LARGE_ELEMENTS else PIECE_ELEMENTS // width
        for start in range(0, rows, step):
            source.read_rows(name, start, min(start + step, rows))


def content_hash(file: RegularFile) -> bytes:
    """sha256 of a file's content, read in pieces."""
    total = hashlib.sha256()
    buffer = np.empty(min(PIECE_BYTES, max(file.size, 1)), dtype=np.uint8)
    for start in range(0, file.size, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, file.size - start)]
        file.read_into(piece, start)
        total.update(piece.data)
    return total.digest()


def _describe(array: FloatArray) -> str:
    bad = np.flatnonzero(~np.isfinite(array))
    where = ", ".join(str(int(i)) for i in np.unravel_index(bad[0], array.shape))
    return f"{array.reshape(-1)[bad[0]]} at [{where}] ({bad.size} such values)"
