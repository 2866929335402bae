"""Channels that are large at every token, not only at spikes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.magnitude_density import Floats

# Eight times the range leaves the median channel three bits less of a grid that all channels share.
CHANNEL_RATIO = 8.0


def channel_ratios(site: SiteStatistics) -> Floats:
    """Per channel max|x| over ordinary tokens, over the median of the channels that are not always zero [C].

    All 0.0 where every channel is always zero.
    """
    ranges = site.channel_ordinary.astype(np.float64)
    alive = ranges[ranges > 0]
    return ranges / np.median(alive) if alive.size else ranges


def outlier_channels(site: SiteStatistics) -> npt.NDArray[np.bool_]:
    """[C]: which channels are more than CHANNEL_RATIO times the median one."""
    return channel_ratios(site) > CHANNEL_RATIO
