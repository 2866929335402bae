"""What every stage asks of a model's weights, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ROWS_TOGETHER = 256  # rows so close that they are read at once


class WeightSource(Protocol):
    """A model as checked numbers: its config, and tensors read one at a time so that memory stays bounded.

    A source lists every tensor that its config asks for, once. With tied embeddings the head
    (`lm_head.weight`) is not listed: it is `model.embed_tokens.weight`.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json, already validated."""
        ...

    @property
    def digest(self) -> str:
        """sha256 (hex) over the content of everything that determines the weights and the config."""
        ...

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        ...

    def stored_dtype(self, name: str) -> str:
        """The safetensors dtype that holds this tensor exactly: "F32", "F16" or "BF16"."""
        ...

    def read(self, name: str) -> FloatArray:
        """One tensor, widened to float32, C-contiguous and owned by the caller. Unknown names raise KeyError."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start … stop − 1 of a tensor, equal to those of `read`, for tensors too large to hold."""
        ...


def read_rows_of(source: WeightSource, name: str, numbers: npt.NDArray[np.int64]) -> FloatArray:
    """Some rows [n, K] of a matrix that is not read whole.

    Args:
        source: of the matrix.
        name: of the matrix.
        numbers: of the rows, rising, at least one.
    """
    found = []
    for start in np.unique(numbers // ROWS_TOGETHER) * ROWS_TOGETHER:
        wanted = numbers[(numbers >= start) & (numbers < start + ROWS_TOGETHER)]
        first, last = int(wanted[0]), int(wanted[-1])
        found.append(source.read_rows(name, first, last + 1)[wanted - first])
    return np.concatenate(found)
