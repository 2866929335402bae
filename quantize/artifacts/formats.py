"""Numeric formats as values: what one stored element can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NumericFormat:
    """One element type.

    Attributes:
        name: the name used in recipes and manifests.
        bits: bits of one element.
        kind: "int" formats are affine codes, "float" formats are cast after scaling.
        qmax: largest representable magnitude after scaling (127 for INT8, 448 for FP8 E4M3).
    """

    name: str
    bits: int
    kind: Literal["int", "float"]
    qmax: float

    @property
    def zero_code(self) -> int:
        """The unsigned code that stands for zero in a symmetric integer tensor: 8 for INT4, 128 for INT8."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest unsigned code of an integer format: 15 for INT4, 255 for INT8."""
        return (1 << self.bits) - 1


INT4 = NumericFormat(name="int4", bits=4, kind="int", qmax=7)
INT8 = NumericFormat(name="int8", bits=8, kind="int", qmax=127)
FP8_E4M3 = NumericFormat(name="fp8_e4m3", bits=8, kind="float", qmax=448)
FP4_E2M1 = NumericFormat(name="fp4_e2m1", bits=4, kind="float", qmax=6)

FORMATS: dict[str, NumericFormat] = {f.name: f for f in (INT4, INT8, FP8_E4M3, FP4_E2M1)}
