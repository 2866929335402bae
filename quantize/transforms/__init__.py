"""Transforms: functions of a model that leave its float outputs as they are and make its numbers easier to round.

A transform of the whole model wraps its source and is done before anything else looks at the weights; they compose:
`rotate(fold_norms(source), seed=0)`. A transform of one site's inputs runs online, in front of a linear.
"""

from __future__ import annotations

from qtool.quantize.transforms.fold_norms import fold_norms
from qtool.quantize.transforms.rotate import rotate
from qtool.quantize.transforms.smooth import smooth, smoothable_sites
from qtool.quantize.transforms.smoothing_sites import smoothquant_sites
from qtool.quantize.transforms.transformed_source import TransformedSource

__all__ = [
    "TransformedSource",
    "fold_norms",
    "rotate",
    "smooth",
    "smoothable_sites",
    "smoothquant_sites",
]
