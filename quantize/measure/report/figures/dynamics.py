"""Massive activations over training: every layer's ratio at the checkpoints, and the fitted curves."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from qtool.quantize.artifacts.site_statistics import Array
from qtool.quantize.measure.analysis.training_dynamics import DynamicsFit
from qtool.quantize.measure.report.canvas import HEAT, figure_style, log_axis, panels, png_of

CURVE_POINTS = 200


def dynamics_png(steps: Array, layers: Sequence[str], ratios: Array, fits: Sequence[DynamicsFit]) -> bytes:
    """A PNG: max|h| / median|h| against the training step; points measured, lines fitted, blocks by colour.

    Args:
        steps: float64 [n], rising.
        layers: names of the block outputs, first block first.
        ratios: [layers, n].
        fits: one per layer.
    """
    with figure_style():
        figure, (panel,) = panels(4.2)
        ramp = ScalarMappable(Normalize(0, max(len(layers) - 1, 1)), mpl.colormaps[HEAT])
        dense = np.linspace(steps[0], steps[-1], CURVE_POINTS)
        for index, (row, fit) in enumerate(zip(ratios, fits, strict=True)):
            colour = mpl.colormaps[HEAT](index / max(len(layers) - 1, 1))
            panel.plot(steps, row, linestyle="none", marker="o", color=colour)
            panel.plot(dense, np.maximum(fit.at(dense), ratios.min() / 2), color=colour, linewidth=1.1)
        log_axis(panel, "y")
        panel.set(xlabel="training step", ylabel="max|h| / median|h|")
        panel.set_title("Massive activations over training")
        figure.colorbar(ramp, ax=panel, label="block")
        return png_of(figure)
