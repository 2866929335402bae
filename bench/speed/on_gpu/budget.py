"""Work in the order of its value, as much as fits into a time; what did not is said."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from on_gpu.timing import FAILURES, reason_of

Row = dict[str, Any]
Clock = Callable[[], float]
SMOOTHING = 0.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """One unit.

    Attributes:
        name: for the reader.
        kind: units of a kind are estimated together.
        value: the smallest runs first.
        seconds: expected before any of the kind has run.
        run: does it.
    """

    name: str
    kind: str
    value: float
    seconds: float
    run: Callable[[], list[Row]]


class Budget:
    """Seconds from its making on."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - self._clock()

    def now(self) -> float:
        """The clock."""
        return self._clock()


def run_in_order(
    works: Sequence[Work], budget: Budget, progress: Callable[[Work, list[Row]], None] = lambda work, rows: None
) -> tuple[list[Row], list[str]]:
    """Rows, and the names of what was left out for want of time.

    A unit runs when it is expected to end in time: by its own estimate times what units of its kind took over theirs.
    One that fails as a whole is a row of kind "failed".
    """
    rows: list[Row] = []
    left_out: list[str] = []
    slowness: dict[str, float] = {}
    for work in sorted(works, key=lambda w: w.value):
        expected = work.seconds * slowness.get(work.kind, 1.0)
        if expected > budget.left:
            left_out.append(work.name)
            continue
        start = budget.now()
        try:
            made = work.run()
        except FAILURES as error:
            made = [{"kind": "failed", "name": work.name, "reason": reason_of(error)}]
        took = (budget.now() - start) / work.seconds
        known = slowness.get(work.kind)
        slowness[work.kind] = took if known is None else SMOOTHING * took + (1 - SMOOTHING) * known
        rows += made
        progress(work, made)
    return rows, left_out
