"""The reference of a package with a graph for prompts: one network fills the cache, another steps behind it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Self

import numpy as np
from transformers import DynamicCache

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.reference.model import ReferenceSession
from qtool.runtime.session import IntArray, check_tokens


class FilledReference:
    """`Session`, one sequence: row t of a prefill answers a prompt that ends at token t.

    Args:
        checkpoint: takes the steps; its weights on an 8-bit grid fill the cache.
        new_cache: of the steps, see ReferenceSession; the prompt itself is read with one of floats.
        int8: which linears are on that grid, see Int8Weights.
    """

    def __init__(
        self,
        checkpoint: QuantizedCheckpoint,
        *,
        new_cache: Callable[[Any], DynamicCache] | None = None,
        int8: Collection[str] | None = None,
    ) -> None:
        self._fill = ReferenceSession(Int8Weights(checkpoint, int8))
        self._step = ReferenceSession(checkpoint, new_cache=new_cache)

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return self._step.vocab_size

    @property
    def max_length(self) -> int | None:
        """See Session; the cache grows."""
        return None

    @property
    def description(self) -> str:
        """See Session."""
        return f"{self._step.description}, prompts in INT8"

    def perturbed(self, seed: int) -> FilledReference:
        """See ReferenceSession.perturbed; both networks get the noise."""
        other = object.__new__(FilledReference)
        other._fill, other._step = self._fill.perturbed(seed), self._step.perturbed(seed)
        return other

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session. What follows sees the steps' own entry of the last token, and the filled ones of the others."""
        check_tokens(tokens, dims=2, vocab_size=self.vocab_size)
        before = self._step.cache.get_seq_length()
        self._fill.cache = _copied(self._step.cache, before, self._fill.new_cache())
        self._fill.prefill(tokens)
        rows = []
        for row in range(tokens.shape[1]):
            self._step.cache = _copied(self._fill.cache, before + row, self._step.new_cache())
            rows.append(self._step.decode(tokens[:, row]))
        return np.stack(rows, axis=1)

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        return self._step.decode(tokens)

    def reset(self) -> None:
        """See Session."""
        self._fill.reset()
        self._step.reset()

    def close(self) -> None:
        """See Session."""
        self._fill.close()
        self._step.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _copied(cache: DynamicCache, count: int, into: DynamicCache) -> DynamicCache:
    """An empty cache with the first `count` positions of another."""
    for index, layer in enumerate(cache.layers if count else ()):
        into.update(layer.keys[:, :, :count].clone(), layer.values[:, :, :count].clone(), index)
    return into
