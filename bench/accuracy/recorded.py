"""Logits that were computed before, as a session: the float model runs once for all rows, a peer in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from qtool.runtime.reference import ReferenceSession


class Recorded:
    """Repeats the logits [T, V] of whole sequences of tokens [T].

    Args:
        tokens: the sequences, [B, T].
        logits: theirs, in the same order; anything that gives an array [T, V] by position.
        description: of whose they are.
    """

    max_length = None

    def __init__(self, tokens: Any, logits: Sequence[Any], description: str) -> None:
        self._logits = {row.tobytes(): logits[place] for place, row in enumerate(tokens)}
        self.vocab_size, self.description = int(logits[0].shape[-1]), description

    @classmethod
    def of(cls, session: ReferenceSession, tokens: Any) -> Self:
        """What a session answers to every sequence by itself."""
        answers = []
        for row in tokens:
            session.reset()
            answers.append(session.prefill(row[None])[0])
        return cls(tokens, answers, session.description)

    def prefill(self, tokens: Any) -> Any:
        return self._logits[tokens[0].tobytes()][None]

    def decode(self, tokens: Any) -> Any:
        raise TypeError("recorded sequences are whole: score them by prefill")

    def reset(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...
