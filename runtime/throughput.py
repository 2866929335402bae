"""Tokens per second of sessions: prefill of a prompt, then decoding behind it; several in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from qtool.errors import UsageError
from qtool.runtime.session import IntArray, Session

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int, str], None]


@runtime_checkable
class DeviceSession(Protocol):
    """A session whose logits can stay where they are computed."""

    @property
    def device(self) -> torch.device:
        """Where that is."""
        ...

    def prefill_on_device(self, tokens: IntArray) -> torch.Tensor:
        """`prefill`, its logits left there."""
        ...

    def decode_on_device(self, tokens: IntArray) -> torch.Tensor:
        """`decode`, alike."""
        ...


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and extremes over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median=float(np.median(values)), low=min(values), high=max(values))


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured, and on how much. Tokens count those of all sequences.

    Attributes:
        prefill_rounds: tokens per second in each round, in order.
        decode_rounds: alike.
        prompt_tokens: of a sequence.
        decode_tokens: of a sequence.
        batch: sequences.
    """

    prefill_rounds: tuple[float, ...]
    decode_rounds: tuple[float, ...]
    prompt_tokens: int
    decode_tokens: int
    batch: int = 1

    @property
    def rounds(self) -> int:
        """How often."""
        return len(self.prefill_rounds)

    @property
    def prefill_tokens_per_s(self) -> Spread:
        """Tokens of the prompt per second."""
        return Spread.of(self.prefill_rounds)

    @property
    def decode_tokens_per_s(self) -> Spread:
        """New tokens per second."""
        return Spread.of(self.decode_rounds)

    def prefill_ratio(self, first: Throughput) -> Spread:
        """How many times as fast as another, round by round."""
        return _ratio(self.prefill_rounds, first.prefill_rounds)

    def decode_ratio(self, first: Throughput) -> Spread:
        """Alike."""
        return _ratio(self.decode_rounds, first.decode_rounds)


def measure_throughput(
    session: Session, *, prompt_tokens: int = 512, decode_tokens: int = 64, rounds: int = 5
) -> Throughput:
    """Time one session; see `measure_together`."""
    return measure_together(
        [session], prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, rounds=rounds
    )[0]


def measure_together(
    sessions: Sequence[Session],
    *,
    prompt_tokens: int = 512,
    decode_tokens: int = 64,
    batch: int = 1,
    rounds: int = 5,
    progress: Progress | None = None,
) -> list[Throughput]:
    """Time sessions on random tokens, each once a round, so that what slows the machine for a while slows them all;
    after one round that is not counted, in which graphs are recorded and kernels compiled.

    Prefill computes the logits of every prompt token. Decoding feeds given tokens, so that sampling is not timed. A
    GPU is timed by its own events, and its logits stay on it.

    Args:
        sessions: to be timed; one may come twice.
        prompt_tokens: of a sequence.
        decode_tokens: of a sequence.
        batch: sequences at a time.
        rounds: that count.
        progress: (done, total, session).

    Raises:
        UsageError: for a count below 1, or more tokens than a cache holds.
    """
    if min(prompt_tokens, decode_tokens, batch, rounds) < 1:
        raise UsageError("tokens, batch and rounds", "must be at least 1", "ask for more")
    for session in sessions:
        room = session.max_length
        if room is not None and prompt_tokens + decode_tokens > room:
            why = f"the KV cache holds {room}"
            raise UsageError(f"{prompt_tokens} + {decode_tokens} tokens", why, "ask for fewer")
    texts = [_Text.random(session.vocab_size, batch, prompt_tokens, decode_tokens) for session in sessions]
    seconds: list[list[tuple[float, float]]] = [[] for _ in sessions]
    for done in range(rounds + 1):
        for index, (session, text) in enumerate(zip(sessions, texts, strict=True)):
            seconds[index].append(_round(session, text))
            if progress is not None:
                progress(done * len(sessions) + index + 1, (rounds + 1) * len(sessions), session.description)
    return [
        Throughput(
            prefill_rounds=tuple(batch * prompt_tokens / prefill for prefill, _ in found[1:]),
            decode_rounds=tuple(batch * decode_tokens / decode for _, decode in found[1:]),
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            batch=batch,
        )
        for found in seconds
    ]


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A prompt [B, T] and what follows it, [B] each."""

    prompt: IntArray
    steps: list[IntArray]

    @classmethod
    def random(cls, vocab_size: int, batch: int, prompt_tokens: int, decode_tokens: int) -> _Text:
        generator = np.random.default_rng(0)
        prompt = generator.integers(0, vocab_size, (batch, prompt_tokens), dtype=np.int64)
        return cls(prompt=prompt, steps=list(generator.integers(0, vocab_size, (decode_tokens, batch), dtype=np.int64)))


def _round(session: Session, text: _Text) -> tuple[float, float]:
    """Seconds of a prefill and of the decoding behind it."""
    prefill: Callable[[IntArray], Any] = session.prefill
    decode: Callable[[IntArray], Any] = session.decode
    timed: Callable[[Callable[[], Any]], float] = _wall_seconds
    if isinstance(session, DeviceSession) and session.device.type == "cuda":
        prefill, decode, timed = session.prefill_on_device, session.decode_on_device, _event_seconds(session.device)

    def decoding() -> None:
        for step in text.steps:
            decode(step)

    session.reset()
    found = timed(lambda: prefill(text.prompt)), timed(decoding)
    session.reset()
    return found


def _wall_seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _event_seconds(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """From the GPU's own clock, between an event in front of the work and one behind it."""
    import torch

    def timed(work: Callable[[], Any]) -> float:
        stream = torch.cuda.current_stream(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return timed


def _ratio(ours: Sequence[float], first: Sequence[float]) -> Spread:
    return Spread.of([one / other for one, other in zip(ours, first, strict=True)])
