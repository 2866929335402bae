"""How massive activations grow over a model's training: max|h| / median|h| of every layer at every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qtool.errors import UsageError
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.site_statistics import Array
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.analysis.training_dynamics import FEWEST_POINTS, DynamicsFit, fit_dynamics
from qtool.quantize.measure.measure import Text, measure

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One model at several training steps.

    Attributes:
        steps: float64 [n], rising.
        layers: names of the block outputs.
        ratios: float64 [layers, n], max|h| / median|h|.
        fits: one per layer.
    """

    steps: Array
    layers: tuple[str, ...]
    ratios: Array
    fits: tuple[DynamicsFit, ...]


def measure_series(sources: Sequence[WeightSource], steps: Sequence[float], text: Text, progress: Progress) -> Series:
    """Measure the block outputs of every checkpoint on one text, and fit each layer's curve.

    Args:
        sources: the checkpoints.
        steps: their training steps.
        text: what they read.
        progress: called with (checkpoints done, checkpoints, layer).

    Raises:
        UsageError: too few checkpoints, two of one step, or checkpoints of different depth.
    """
    if len(set(steps)) < len(steps):
        raise UsageError("the series", "has two checkpoints of one training step", "give --steps")
    if len(steps) < FEWEST_POINTS:
        why = f"has {len(steps)} training steps; the curve has five parameters"
        raise UsageError("the series", why, f"give at least {FEWEST_POINTS} checkpoints")
    columns: dict[float, dict[str, float]] = {}
    for number, (step, source) in enumerate(zip(steps, sources, strict=True)):
        done = measure(source, text, stream_only=True, progress=lambda *_: None)
        columns[step] = _ratios(done.statistics, source)
        progress(number + 1, len(sources), f"step {step:g}")
    ordered = sorted(columns)
    layers = tuple(columns[ordered[0]])
    for step in ordered:
        if tuple(columns[step]) != layers:
            raise UsageError(f"step {step:g}", "has other layers than the first checkpoint", "give one model's steps")
    ratios = np.array([[columns[step][layer] for step in ordered] for layer in layers])
    fits = tuple(fit_dynamics(np.array(ordered), row) for row in ratios)
    return Series(steps=np.array(ordered), layers=layers, ratios=ratios, fits=fits)


def _ratios(statistics: Statistics, source: WeightSource) -> dict[str, float]:
    prefix = f"{architecture_of(source.config).spine.blocks}."
    return {
        name: site.amax / site.quantile(0.5)
        for name, site in statistics.sites.items()
        if name.startswith(prefix) and site.quantile(0.5) > 0
    }
