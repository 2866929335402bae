"""SmoothQuant for every site in the blocks that can be scaled offline, from a measurement of the model.

A channel's range is taken over ordinary tokens: one massive token would otherwise set the factors of all channels. The
head's input is left alone, because scaling it would untie the head from the embedding.
"""

from __future__ import annotations

from qtool.errors import UsageError
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.transforms.smooth import smooth
from qtool.quantize.transforms.smoothing_sites import smoothquant_sites
from qtool.quantize.transforms.transformed_source import TransformedSource


def smooth_measured(source: WeightSource, statistics: Statistics, *, alpha: float) -> TransformedSource:
    """The model with its blocks' activation outliers moved into the weights.

    Args:
        source: the model.
        statistics: of this very model.
        alpha: 0 leaves the difficulty to the activations, 1 moves all of it to the weights.

    Raises:
        UsageError: statistics of another model.
    """
    if statistics.model_digest != source.digest:
        raise UsageError("statistics", "are of another model", "measure the model that is to be smoothed")
    blocks = f"{architecture_of(source.config).spine.blocks}."
    amax = {
        name: site.channel_ordinary.astype("float64")
        for name, site in statistics.sites.items()
        if statistics.roles[name] == "input" and name.startswith(blocks)
    }
    return smooth(source, smoothquant_sites(source, amax, alpha=alpha))
