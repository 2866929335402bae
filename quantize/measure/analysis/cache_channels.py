"""Channels of the KV cache that are far larger than the others."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.findings import CacheChannels
from qtool.quantize.measure.analysis.outlier_channels import channel_ratios

# A channel of four times the median's range leaves the median channel fewer than two steps of a shared 4-bit grid.
CACHE_RATIO = 4.0


def cache_channels(name: str, site: SiteStatistics) -> CacheChannels:
    """A cache site's outlier channels, over ordinary tokens; channels are numbered through all heads."""
    ratios = channel_ratios(site)
    return CacheChannels(
        site=name,
        channels=tuple(np.flatnonzero(ratios > CACHE_RATIO).tolist()),
        worst_ratio=float(ratios.max()),
    )
