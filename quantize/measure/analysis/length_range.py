"""How a site's range grows with the length of the text."""

from __future__ import annotations

import numpy as np

from qtool.quantize.artifacts.site_statistics import FIRST_LENGTH, LENGTHS, SiteStatistics
from qtool.quantize.measure.analysis.findings import LengthRange


def length_range(name: str, site: SiteStatistics, length: int) -> LengthRange:
    """A site's range in texts cut to 128, 256, 512 … tokens; the last length is the measured one.

    Args:
        name: the site.
        site: its statistics.
        length: tokens in a measured sequence.
    """
    lengths = [FIRST_LENGTH << index for index in range(LENGTHS) if index == 0 or FIRST_LENGTH << (index - 1) < length]
    amax = np.maximum.accumulate(site.range_at[: len(lengths)]).tolist()
    lengths[-1] = min(lengths[-1], length)
    return LengthRange(
        site=name, lengths=tuple(lengths), amax=tuple(amax), growth=amax[-1] / amax[0] if amax[0] > 0 else 1.0
    )
