"""Token by token: greedy, or seeded sampling with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.session import IntArray, Session, last_logits


def generate(
    session: Session,
    prompt_ids: IntArray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Iterable[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue the prompt; an end-of-sequence id ends it and is not yielded.

    Args:
        session: is reset first.
        prompt_ids: [T], at least one id.
        max_new_tokens: at least 0.
        temperature: 0 is greedy (ties to the smallest id).
        top_k: keep the k likeliest ids; 0 keeps all.
        top_p: keep the smallest set of ids that holds this probability.
        seed: of this call's own generator.
        eos_ids: ids that end the text.

    Raises:
        UsageError: at once, for an empty prompt, options out of range, or more tokens than the cache holds.
        InputRefused: when the logits are not finite.
    """
    _check(session, prompt_ids, max_new_tokens, temperature, top_k, top_p)
    return _generate(
        session, prompt_ids, max_new_tokens, temperature, top_k, top_p, np.random.default_rng(seed), frozenset(eos_ids)
    )


def _generate(
    session: Session,
    prompt: IntArray,
    count: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: np.random.Generator,
    eos_ids: frozenset[int],
) -> Iterator[int]:
    session.reset()
    logits = last_logits(session, prompt[None])[0]
    for i in range(count):
        token = pick(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if token in eos_ids:
            return
        yield token
        if i + 1 < count:
            logits = session.decode(np.array([token], dtype=np.int64))[0]


def pick(
    logits: FloatArray, *, temperature: float, top_k: int, top_p: float, generator: np.random.Generator
) -> int:
    """One id from logits [V]; see `generate`."""
    if not np.isfinite(logits).all():
        raise InputRefused("logits", "are not finite", "verify the package")
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    scaled = logits[order].astype(np.float64) / temperature
    probability = np.exp(scaled - scaled[0])
    probability /= probability.sum()
    kept = int(np.searchsorted(probability.cumsum(), top_p)) + 1
    cumulative = probability[:kept].cumsum()
    drawn = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
    return int(order[min(drawn, len(cumulative) - 1)])


def _check(session: Session, prompt: IntArray, count: int, temperature: float, top_k: int, top_p: float) -> None:
    if prompt.ndim != 1 or len(prompt) == 0:
        raise UsageError("the prompt", "holds no token", "give some text")
    ranges = (
        ("max_new_tokens", count, count >= 0, "0 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 or more"),
        ("top_k", top_k, top_k >= 0, "0 or more"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
    )
    for name, value, good, wanted in ranges:
        if not good:
            raise UsageError(f"{name} {value}", "out of range", f"use {wanted}")
    room = session.max_length
    if room is not None and len(prompt) + count > room:
        raise UsageError(
            f"{len(prompt)} + {count} tokens", f"the KV cache holds {room}", "ask for fewer, or raise max_length"
        )
