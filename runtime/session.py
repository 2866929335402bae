"""What everything that runs a model agrees on: tokens in, logits out, a KV cache that grows between calls."""

from __future__ import annotations

from typing import Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from qtool.errors import UsageError
from qtool.quantize.artifacts.weights import FloatArray

IntArray = npt.NDArray[np.int64]
PREFILL_CHUNK = 512


class Session(Protocol):
    """One loaded model and its KV cache.

    Shapes: B sequences, T tokens, V vocabulary. Logits are float32. `prefill` hands out a fresh array;
    `decode` may reuse one buffer, valid until the next call.
    """

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def max_length(self) -> int | None:
        """How many tokens the KV cache holds; None when it grows without bound."""
        ...

    @property
    def description(self) -> str:
        """What runs, for tables: engine, arithmetic, threads."""
        ...

    def prefill(self, tokens: IntArray) -> FloatArray:
        """Append tokens [B, T] to the cache and return the logits [B, T, V]; called again, it continues."""
        ...

    def decode(self, tokens: IntArray) -> FloatArray:
        """Append one token per sequence, [B], and return the logits [B, V]."""
        ...

    def reset(self) -> None:
        """Forget the cache."""
        ...

    def close(self) -> None:
        """Free what the session holds; using it afterwards is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


@runtime_checkable
class AnswersLast(Protocol):
    """A session that can compute the last position's logits without the others'."""

    def prefill_last(self, tokens: IntArray) -> FloatArray:
        """Append tokens [B, T] to the cache and return the logits of the last position, [B, V]."""
        ...


def last_logits(session: Session, tokens: IntArray) -> FloatArray:
    """Append tokens [B, T] to the cache; the logits [B, V] of the last one, by the shortest way the session has.

    A session that computes all logits gets the tokens in chunks, so that those of a long prompt stay small.
    """
    if isinstance(session, AnswersLast):
        return session.prefill_last(tokens)
    for start in range(0, tokens.shape[1], PREFILL_CHUNK):
        logits = session.prefill(tokens[:, start : start + PREFILL_CHUNK])
    return logits[:, -1]


def check_tokens(tokens: IntArray, *, dims: int, vocab_size: int) -> None:
    """Refuse tokens of another rank, an empty array, or ids outside the vocabulary.

    Raises:
        UsageError: naming the first offending id.
    """
    if tokens.ndim != dims or tokens.size == 0:
        raise UsageError("tokens", f"have shape {tokens.shape}, {dims} non-empty dimensions are wanted", "fix the call")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UsageError(f"token id {wrong}", f"is outside the vocabulary of {vocab_size}", "use the model's tokenizer")
