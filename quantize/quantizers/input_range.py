"""Stored scales of static activations, from what each linear's quantizer is handed in calibration.

The quantizer sees the transformed input, behind predecessors that are quantized already; a measurement of the float
model knows neither. A range is not the largest magnitude but the one with the least expected squared error: clipping
the few largest values costs less than the step that would hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.artifacts.formats import NumericFormat
from qtool.quantize.artifacts.magnitudes import BINS, bin_of
from qtool.quantize.measure.analysis.magnitude_density import MagnitudeDensity
from qtool.quantize.measure.analysis.number_grid import number_grid
from qtool.quantize.measure.analysis.quantization_error import best_range
from qtool.quantize.quantizers.calibration import Inputs
from qtool.quantize.quantizers.layers import QuantizedLayer

SMALLEST_SHARE = 1e-3  # of the largest magnitude: where the search for a range ends


class InputRange:
    """The magnitudes of one site's main input, token by token.

    Args:
        name: of the site, for refusals.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts: npt.NDArray[np.float64] = np.zeros(BINS)
        self._amax = 0.0

    def add(self, inputs: Tensor) -> None:
        """Add inputs [..., K] float32.

        Raises:
            InputRefused: when an input is not finite.
        """
        size = inputs.abs()
        largest = float(size.max()) if size.numel() else 0.0
        if not np.isfinite(largest):
            raise InputRefused(self._name, "is not finite on this text", "check the model's weights")
        self._amax = max(self._amax, largest)
        self._counts += np.bincount(bin_of(size.flatten().numpy()), minlength=BINS)

    def scale(self, fmt: NumericFormat) -> Tensor:
        """The float32 scalar that stands for one code; 1 where nothing but zeros came."""
        if self._amax == 0:
            return torch.ones(())
        density = MagnitudeDensity(self._counts, self._amax)
        grid = number_grid(fmt)
        chosen = best_range(density, grid, self._amax * SMALLEST_SHARE, self._amax)
        return torch.tensor(chosen / grid.largest, dtype=torch.float32)


def with_input_scales(layers: Mapping[str, QuantizedLayer], inputs: Inputs) -> dict[str, QuantizedLayer]:
    """Linears that read one input, each static one without a scale given one.

    Args:
        layers: by module.
        inputs: hands their input [b, T, K] to a function, batch by batch.
    """
    ranges: dict[tuple[str, int], tuple[QuantizedLayer, InputRange]] = {}
    wanting = {module: layer for module, layer in layers.items() if _wants_scale(layer)}
    for module, layer in wanting.items():
        ranges.setdefault(_key(layer), (layer, InputRange(f"{module}.input")))

    def add(x: Tensor) -> None:
        for layer, found in ranges.values():
            transform = layer.tensor.transform
            found.add(x if transform is None else transform.input(x)[0])

    if ranges:
        inputs(add)
    done = dict(layers)
    for module, layer in wanting.items():
        scheme = layer.tensor.scheme.input
        assert scheme is not None
        scale = ranges[_key(layer)][1].scale(scheme.format)
        done[module] = replace(layer, tensor=replace(layer.tensor, input_scale=scale))
    return done


def _key(layer: QuantizedLayer) -> tuple[str, int]:
    return layer.tensor.site, id(layer.tensor.transform)


def _wants_scale(layer: QuantizedLayer) -> bool:
    scheme = layer.tensor.scheme.input
    return scheme is not None and not scheme.dynamic and layer.tensor.input_scale is None
