"""Times of several things in turn: a graph of many calls each, replayed in every round, so that a drift meets all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from qtool.errors import QtoolError

Run = Callable[[int], object]  # the number of the copy of the weights to use
# What a kernel, ours or a peer's, or what compiles it may raise; RuntimeError is CUDA's and torch's.
FAILURES = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, QtoolError)


@dataclass(frozen=True)
class Calls:
    """Something to time.

    Attributes:
        run: one call with copy 0 … copies − 1 of its weights.
        copies: how many there are.
    """

    run: Run
    copies: int = 1


@dataclass(frozen=True)
class Spread:
    """Seconds a call over the rounds; `spread` is what lies between the 20th and the 80th percentile, of the median."""

    p20: float
    median: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """At least one round."""
        ordered = sorted(seconds)
        low, middle, high = (percentile(ordered, share) for share in (0.2, 0.5, 0.8))
        return cls(p20=low, median=middle, spread=(high - low) / middle if middle else 0.0, rounds=len(ordered))

    def to_json(self) -> dict[str, Any]:
        """Microseconds."""
        return {"p20": self.p20 * 1e6, "median": self.median * 1e6, "spread": self.spread, "rounds": self.rounds}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between neighbours of a sorted sequence, linearly."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios; both were timed in the same rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


@dataclass(frozen=True)
class Graph:
    """A recorded CUDA graph and how many calls it holds."""

    graph: Any
    calls: int


class Timer(Protocol):
    """Seconds a call of each, one number a round; or why it cannot be timed."""

    def __call__(self, calls: Mapping[str, Calls]) -> dict[str, list[float] | str]:
        """All of them in every round."""
        ...


class ClockTimer:
    """By the wall clock, for a CPU."""

    def __init__(self, rounds: int = 3) -> None:
        self.rounds = rounds

    def __call__(self, calls: Mapping[str, Calls]) -> dict[str, list[float] | str]:
        """See Timer."""
        found: dict[str, list[float] | str] = {}
        for name, each in calls.items():
            found[name] = attempt(partial(each.run, 0)) or []
        for number in range(self.rounds):
            for name, each in calls.items():
                seconds = found[name]
                if isinstance(seconds, list):
                    start = time.perf_counter()
                    each.run(number % each.copies)
                    seconds.append(time.perf_counter() - start)
        return found


class GraphTimer:
    """By a GPU's events around replays of graphs.

    Args:
        device: the GPU.
        rounds: of all.
        least: seconds that a graph should take at least, by which calls are repeated in it.
        most_calls: that a graph may hold.
    """

    def __init__(
        self, device: torch.device, rounds: int = 15, least: float = 5e-4, most_calls: int = 300
    ) -> None:
        self.device, self.rounds, self.least, self.most_calls = device, rounds, least, most_calls
        self._stream: Any = torch.cuda.Stream(device)

    def __call__(self, calls: Mapping[str, Calls]) -> dict[str, list[float] | str]:
        """See Timer."""
        graphs: dict[str, Graph] = {}
        torch.cuda.synchronize(self.device)  # operands were made on another stream
        # Warm-up, capture and replay on one stream: a kernel's scratch memory belongs to a stream.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            reasons = {name: attempt(partial(self._record, graphs, name, each)) for name, each in calls.items()}
            seconds = self._rounds(graphs) if graphs else {}
        graphs.clear()
        free_memory()
        return {name: reason or seconds[name] for name, reason in reasons.items()}

    def _rounds(self, graphs: Mapping[str, Graph]) -> dict[str, list[float]]:
        names = list(graphs)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.rounds + 1):
            # A round starts with another one each time, behind a replay that nobody times.
            turn = names[number % len(names) :] + names[: number % len(names)]
            graphs[turn[0]].graph.replay()
            marks = {name: self._marked(graphs[name]) for name in turn}
            torch.cuda.synchronize(self.device)
            if number:  # the first round warms up
                for name, (before, after) in marks.items():
                    seconds[name].append(float(before.elapsed_time(after)) / 1e3 / graphs[name].calls)
        return seconds

    def _marked(self, graph: Graph) -> tuple[Any, Any]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.graph.replay()
        after.record()
        return before, after

    def _record(self, graphs: dict[str, Graph], name: str, calls: Calls) -> None:
        for copy in range(calls.copies):  # compiles, and tunes where a peer does
            calls.run(copy)
        torch.cuda.synchronize(self.device)
        graph = self._captured(calls, 1)
        graph.graph.replay()
        before, after = self._marked(graph)
        torch.cuda.synchronize(self.device)
        once = max(float(before.elapsed_time(after)) / 1e3, 1e-6)
        passes = min(int(self.least / once) + 1, max(1, self.most_calls // calls.copies))
        graphs[name] = graph if passes == 1 else self._captured(calls, passes)

    def _captured(self, calls: Calls, passes: int) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # What torch.cuda.graph does beside this, it collects garbage, takes longer than the measurement.
        graph.capture_begin()
        try:
            for _ in range(passes):
                for copy in range(calls.copies):
                    calls.run(copy)
        finally:
            graph.capture_end()
        return Graph(graph, passes * calls.copies)


def free_memory() -> None:
    """Give back what nothing uses; torch refuses to after a capture that failed, which is no reason to stop."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def attempt(action: Callable[[], object]) -> str:
    """Why it fails; empty when it does not."""
    try:
        action()
    except FAILURES as error:
        return reason_of(error)
    return ""


def reason_of(error: Exception) -> str:
    """The first line of what an error says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def timer_for(device: torch.device) -> Timer:
    """Graphs on a GPU, the clock elsewhere."""
    return GraphTimer(device) if device.type == "cuda" else ClockTimer()
