"""The magnitudes that a symmetric numeric format can hold before scaling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from qtool.quantize.artifacts.formats import FP4_E2M1, FP8_E4M3, NumericFormat
from qtool.quantize.measure.analysis.magnitude_density import Floats

_FLOAT_TYPES: dict[str, tuple[Any, int]] = {
    FP8_E4M3.name: (ml_dtypes.float8_e4m3fn, 256),
    FP4_E2M1.name: (ml_dtypes.float4_e2m1fn, 16),
}


@dataclass(frozen=True)
class NumberGrid:
    """A format's magnitudes.

    Attributes:
        levels: float64 [m], rising from 0 to the largest: 0…127 for INT8; 0, ½, 1, 1½, 2, 3, 4, 6 for FP4 E2M1.
        cuts: float64 [m − 1], half-way between neighbours: rounding to nearest changes there.
    """

    levels: Floats
    cuts: Floats

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return float(self.levels[-1])


@cache
def number_grid(fmt: NumericFormat) -> NumberGrid:
    """The grid of a format; integers are symmetric, so INT8 goes to 127 on both sides."""
    if fmt.kind == "int":
        levels = np.arange(fmt.qmax + 1, dtype=np.float64)
    else:
        kind, codes = _FLOAT_TYPES[fmt.name]
        values = np.arange(codes, dtype=np.uint8).view(kind).astype(np.float64)
        levels = np.unique(np.abs(values[np.isfinite(values)]))
    return NumberGrid(levels=levels, cuts=(levels[1:] + levels[:-1]) / 2)
