"""Attention sinks: how much of all attention the first tokens of a text receive (arXiv 2410.10781).

A key's importance is the mean attention weight that the queries at and after it give it. A head has a sink at a key
when the importance is above SINK_THRESHOLD. It is taken over the first SHORT tokens, and over the whole sequence with
every fourth query.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.site_statistics import Array

SINK_THRESHOLD = 0.3
SHORT = 64
KEYS = 64


@dataclass(frozen=True, kw_only=True)
class SinkStatistics:
    """One attention module's sinks. H is its query heads.

    Attributes:
        sequences: int64 [2], sequences looked at over their first SHORT tokens, and over their whole length (one
            sequence of every batch).
        first_short, first_full: int64 [H], in how many of each the head has a sink at the first token.
        any_full: int64 [H], in how many of them some key among the first KEYS is a sink over the whole sequence.
        importance: float64 [H, KEYS], sums over the sequences of the importance of the first keys, whole sequence.
    """

    sequences: Array
    first_short: Array
    first_full: Array
    any_full: Array
    importance: Array

    def merge(self, other: SinkStatistics) -> SinkStatistics:
        """Both parts together."""
        return SinkStatistics(**{name: getattr(self, name) + getattr(other, name) for name in SINK_FIELDS})

    @property
    def rate_short(self) -> npt.NDArray[np.float64]:
        """[H]: the sink rate of the first key over the first SHORT tokens."""
        return self.first_short / self.sequences[0]

    @property
    def rate_full(self) -> npt.NDArray[np.float64]:
        """[H]: the sink rate of the first key over the whole sequence."""
        return self.first_full / self.sequences[1]


SINK_FIELDS = tuple(field.name for field in fields(SinkStatistics))
