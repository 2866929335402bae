"""Which part of a site's quantization error is the fault of spike tokens, and which of outlier channels."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.formats import INT4, INT8, NumericFormat
from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.findings import OutlierSplit
from qtool.quantize.measure.analysis.magnitude_density import MagnitudeDensity, ordinary_density
from qtool.quantize.measure.analysis.number_grid import number_grid
from qtool.quantize.measure.analysis.outlier_channels import outlier_channels
from qtool.quantize.measure.analysis.quantization_error import squared_error_unclipped


def outlier_split(name: str, site: SiteStatistics) -> OutlierSplit:
    """The error of a site's ordinary tokens at a static scale, split by what makes the scale large.

    Four scales are compared: at the maximum of all tokens and channels, without spikes, without outlier channels, and
    without both. What leaves the scale's range then is taken as rounded with the same step, not as clipped: it would
    be kept apart.

    Args:
        name: the site.
        site: its statistics.
    """
    outliers = outlier_channels(site)
    calm = ~outliers
    ranges = np.array(
        [
            site.amax,
            site.channel_ordinary.max(),
            site.channel_amax[calm].max(initial=0.0),
            site.channel_ordinary[calm].max(initial=0.0),
        ],
        dtype=np.float64,
    )
    density = ordinary_density(site)
    return OutlierSplit(
        site=name,
        channels=tuple(np.flatnonzero(outliers).tolist()),
        spike_tokens=int(site.rows[1]),
        int8=_shares(density, INT8, ranges),
        int4=_shares(density, INT4, ranges),
    )


def _shares(
    density: MagnitudeDensity, fmt: NumericFormat, ranges: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> tuple[float, float, float]:
    """(spikes, channels, rest): the Shapley values of two players whose removal lowers the error."""
    grid = number_grid(fmt)
    both, channels, spikes, none = squared_error_unclipped(density, grid, ranges / grid.largest).tolist()
    by_spikes = max(((both - channels) + (spikes - none)) / 2, 0.0)
    by_channels = max(((both - spikes) + (channels - none)) / 2, 0.0)
    total = by_spikes + by_channels + none
    if total <= 0:
        return 0.0, 0.0, 1.0
    return by_spikes / total, by_channels / total, none / total
