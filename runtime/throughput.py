"""Tokens per second of a session: prefill of a prompt, then decoding behind it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from qtool.errors import UsageError
from qtool.runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and extremes over the rounds, tokens per second."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured, and on how much."""

    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    prompt_tokens: int
    decode_tokens: int
    rounds: int


def measure_throughput(
    session: Session, *, prompt_tokens: int = 512, decode_tokens: int = 64, rounds: int = 5
) -> Throughput:
    """Time a session on random tokens after one round that is not counted.

    Prefill computes the logits of every prompt token. Decoding feeds given tokens, so that sampling is not timed.

    Raises:
        UsageError: for a count below 1, or more tokens than the cache holds.
    """
    if min(prompt_tokens, decode_tokens, rounds) < 1:
        raise UsageError("tokens and rounds", "must be at least 1", "ask for more")
    room = session.max_length
    if room is not None and prompt_tokens + decode_tokens > room:
        raise UsageError(f"{prompt_tokens} + {decode_tokens} tokens", f"the KV cache holds {room}", "ask for fewer")
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, session.vocab_size, (1, prompt_tokens), dtype=np.int64)
    steps = generator.integers(0, session.vocab_size, (decode_tokens, 1), dtype=np.int64)
    prefill, decode = [], []
    for _ in range(rounds + 1):
        session.reset()
        start = time.perf_counter()
        session.prefill(prompt)
        middle = time.perf_counter()
        for step in steps:
            session.decode(step)
        end = time.perf_counter()
        prefill.append(prompt_tokens / (middle - start))
        decode.append(decode_tokens / (end - middle))
    session.reset()
    return Throughput(
        prefill_tokens_per_s=_spread(prefill[1:]),
        decode_tokens_per_s=_spread(decode[1:]),
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        rounds=rounds,
    )


def _spread(values: list[float]) -> Spread:
    return Spread(median=float(np.median(values)), low=min(values), high=max(values))
