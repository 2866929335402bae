"""The range of every tensor of a graph on a text: mergeable, whatever the number of windows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused
from qtool.quantize.artifacts.statistics import Statistics

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The smallest and largest value that a tensor took, the sum of its squares, and how many values that were."""

    low: float
    high: float
    square: float = 0.0
    count: int = 0

    @property
    def rms(self) -> float | None:
        """The root of the mean square, None where nothing was counted or all was zero."""
        return (self.square / self.count) ** 0.5 if self.count and self.square > 0 else None

    def merge(self, other: Range) -> Range:
        """Both together."""
        return Range(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            square=self.square + other.square,
            count=self.count + other.count,
        )

    def widened(self, headroom: float) -> Range:
        """Each end that is not zero farther out by this share."""
        return replace(self, low=self.low * (1 + headroom), high=self.high * (1 + headroom))

    @staticmethod
    def of(values: Array, name: str) -> Range:
        """The range of an array.

        Raises:
            InputRefused: when a value is not finite.
        """
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise InputRefused(name, "is not finite on this text", "check the model's weights")
        flat = values.astype(np.float64).ravel()
        return Range(low=low, high=high, square=float(flat @ flat), count=flat.size)


def merge(parts: Iterable[Mapping[str, Range]]) -> dict[str, Range]:
    """The ranges of all parts of a text, by tensor; order does not matter."""
    merged: dict[str, Range] = {}
    for part in parts:
        for name, found in part.items():
            merged[name] = merged[name].merge(found) if name in merged else found
    return merged


def with_statistics(ranges: Mapping[str, Range], statistics: Statistics) -> tuple[dict[str, Range], int]:
    """Ranges widened by what `qtool measure` saw at the sites that carry a tensor's name; and how many those are."""
    widened, found = dict(ranges), 0
    for name, own in ranges.items():
        site = statistics.find(name)
        if site is not None:
            widened[name] = own.merge(Range(low=float(site.channel_low.min()), high=float(site.channel_high.max())))
            found += 1
    return widened, found


def to_bytes(ranges: Mapping[str, Range]) -> bytes:
    """Canonical JSON: tensor → [low, high, root mean square or null]."""
    data = {name: [found.low, found.high, _rounded(found.rms)] for name, found in ranges.items()}
    return (json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
