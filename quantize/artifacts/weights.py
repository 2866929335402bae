"""What every stage asks of a model's weights, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


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
