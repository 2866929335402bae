"""What a recipe says of distillation: how long, and how fast (see quantizers/distill.py)."""

from __future__ import annotations

from pydantic import Field

from qtool.quantize.artifacts.rule import Strict


class Distillation(Strict):
    """Knobs of distillation.

    Attributes:
        epochs: passes over the calibration text.
        batch: sequences in a step.
        rate: of Adam, at its highest: about the share of its value that a scale moves in one step.
    """

    epochs: int = Field(default=2, ge=1, le=1000)
    batch: int = Field(default=4, ge=1)
    rate: float = Field(default=1e-3, gt=0, lt=1)
