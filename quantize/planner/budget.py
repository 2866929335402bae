"""What a plan may use."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_BITS = 1.15  # room for some sixteen directions at every site


@dataclass(frozen=True, kw_only=True)
class Budget:
    """With neither bits nor loss given, DEFAULT_BITS times those of the scheme as asked.

    Attributes:
        max_bits: stored bits per weight of the planned linears, everything counted.
        max_loss: increase of the perplexity on the planner's held-out text, as a share: 0.03 is 3 %.
        max_slowdown: decode reads and prefill work (see `Cost`) of the planned linears, each relative to the scheme as
            asked.
    """

    max_bits: float | None = None
    max_loss: float | None = None
    max_slowdown: float | None = None
