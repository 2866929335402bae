"""The stress model: the same function with planted outliers. On eight channels of every norm's output the values are a
hundred times as large, and the weights that read them a hundred times as small."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms import smooth, smoothable_sites
from qtool.quantize.transforms.wiring import NormPlace

CHANNELS, FACTOR = 8, 100.0


def planted(source: WeightSource) -> WeightSource:
    """The model with its outliers; the same channels in every norm, as in real models."""
    width = int(source.config["hidden_size"])
    channels = np.random.default_rng(0).choice(width, CHANNELS, replace=False)
    divided = np.ones(width)
    divided[channels] = 1 / FACTOR
    final = "lm_head.input"
    sites, seen = smoothable_sites(source.config), set()
    factors = {}
    for site, place in sorted(sites.items()):
        if isinstance(place, NormPlace) and id(place) not in seen and place is not sites.get(final):
            seen.add(id(place))
            factors[site] = divided
    return smooth(source, factors)
