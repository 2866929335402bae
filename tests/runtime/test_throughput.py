"""Timing: what is fed, in which order, and how rounds are compared; on sessions that do nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.errors import UsageError
from qtool.runtime import throughput
from qtool.runtime.throughput import Throughput, measure_throughput, measure_together


class Counting:
    """Notes what it is asked, and lets a clock of its own run."""

    def __init__(self, name: str, log: list[str], clock: list[float], speed: float) -> None:
        self.description, self.vocab_size, self.max_length = name, 50, 24
        self._log, self._clock, self._speed = log, clock, speed

    def prefill(self, tokens: np.ndarray) -> None:
        self._log.append(f"{self.description} prefill {tokens.shape}")
        self._clock[0] += tokens.size / self._speed

    def decode(self, tokens: np.ndarray) -> None:
        assert tokens.shape == (2,) and tokens.min() >= 0 and tokens.max() < 50
        self._log.append(f"{self.description} decode")
        self._clock[0] += 2 * tokens.size / self._speed

    def reset(self) -> None:
        self._log.append("reset")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    return now


def test_sessions_take_turns_and_the_first_round_does_not_count(clock: list[float]) -> None:
    log: list[str] = []
    sessions = [Counting("slow", log, clock, 100), Counting("fast", log, clock, 300)]
    seen: list[tuple[int, int, str]] = []
    slow, fast = measure_together(
        sessions,  # type: ignore[arg-type]
        prompt_tokens=20,
        decode_tokens=3,
        batch=2,
        rounds=2,
        progress=lambda *at: seen.append(at),
    )
    turn = ["reset", "{} prefill (2, 20)", *["{} decode"] * 3, "reset"]
    assert log == [line.format(name) for _ in range(3) for name in ("slow", "fast") for line in turn]
    assert seen[0] == (1, 6, "slow") and seen[-1] == (6, 6, "fast")
    assert slow.rounds == 2 and slow.batch == 2
    assert slow.prefill_tokens_per_s.median == pytest.approx(100)
    assert slow.decode_tokens_per_s.median == pytest.approx(50)
    assert fast.prefill_ratio(slow).median == pytest.approx(3)
    assert fast.decode_ratio(slow).low == pytest.approx(3)


def test_ratios_are_taken_within_rounds() -> None:
    def of(*rounds: float) -> Throughput:
        return Throughput(prefill_rounds=rounds, decode_rounds=rounds, prompt_tokens=1, decode_tokens=1)

    first, other = of(10.0, 1.0, 4.0), of(20.0, 2.0, 2.0)
    ratio = other.prefill_ratio(first)
    assert (ratio.low, ratio.median, ratio.high) == (0.5, 2.0, 2.0)
    own = first.decode_ratio(first)
    assert (own.low, own.median, own.high) == (1.0, 1.0, 1.0)


class OnGpu(Counting):
    """What it computes stays on a GPU, which lets the clock run while the caller goes on."""

    device = torch.device("cuda:1")

    def prefill_on_device(self, tokens: np.ndarray) -> None:
        super().prefill(tokens)

    def decode_on_device(self, tokens: np.ndarray) -> None:
        super().decode(tokens)

    def prefill(self, tokens: np.ndarray) -> None:
        raise AssertionError("the logits need not leave the GPU")

    decode = prefill


class Event:
    """Takes the time of the GPU's clock, in milliseconds, when its stream comes to it."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self._at = self._clock[0]

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return (other._at - self._at) * 1e3


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, log = [0.0], list[str]()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(gpu))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"wait for {device}"))
    session = OnGpu("gpu", log, gpu, 100)
    (found,) = measure_together([session], prompt_tokens=20, decode_tokens=3, batch=2, rounds=2)  # type: ignore[list-item]
    assert found.prefill_tokens_per_s.median == pytest.approx(100)
    assert found.decode_tokens_per_s.median == pytest.approx(50)
    wait = "wait for cuda:1"
    assert log == ["reset", wait, "gpu prefill (2, 20)", wait, *["gpu decode"] * 3, "reset"] * 3


def test_what_cannot_be_timed_is_refused(clock: list[float]) -> None:
    session = Counting("x", [], clock, 1)
    with pytest.raises(UsageError, match="holds 24"):
        measure_throughput(session, prompt_tokens=20, decode_tokens=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least 1"):
        measure_throughput(session, prompt_tokens=20, decode_tokens=0)  # type: ignore[arg-type]
