"""How many sequences are enough: how much a site's maximum varies with the choice of the sequences.

The bootstrap draws n of S sequences with replacement and takes their maximum. Its distribution is known: the r-th
smallest of the S maxima is the largest of n draws with probability (r/S)ⁿ − ((r−1)/S)ⁿ. So its mean and its
spread are sums, exact and without a random number. Near n = S they are too small: no draw exceeds what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.findings import SampleSize
from qtool.quantize.measure.analysis.magnitude_density import Floats

ENOUGH_CV = 0.1


def sample_size(sites: Mapping[str, SiteStatistics]) -> SampleSize:
    """The bootstrap coefficient of variation of max|x| for 1, 2, 4 … and all sequences.

    Sites that did not see every sequence (experts) are left out.

    Args:
        sites: all sites; at least one has seen every sequence.
    """
    most = max(len(site.sequences) for site in sites.values())
    names = [name for name, site in sites.items() if len(site.sequences) == most]
    ranked = np.sort(np.stack([sites[name].sequence_amax for name in names]).astype(np.float64), axis=1)
    sizes = sorted({1 << power for power in range(most.bit_length())} | {most})
    spread = np.stack([bootstrap_cv(ranked, size) for size in sizes])
    median = np.median(spread, axis=1)
    enough = [size for size, cv in zip(sizes, median, strict=True) if cv <= ENOUGH_CV and most > 1]
    return SampleSize(
        sequences=tuple(sizes),
        cv=tuple(median.tolist()),
        worst_cv=tuple(spread.max(axis=1).tolist()),
        worst_site=names[int(np.argmax(spread[-1]))],
        enough=enough[0] if enough else None,
    )


def bootstrap_cv(ranked: Floats, size: int) -> Floats:
    """Standard deviation over mean of the maximum of `size` draws with replacement, per row.

    Args:
        ranked: float64 [sites, S], every row rising, not negative.
        size: draws.

    Returns:
        float64 [sites]; 0 for a row of zeros.
    """
    shares = np.arange(ranked.shape[1] + 1) / ranked.shape[1]
    weights = np.diff(shares**size)
    mean = ranked @ weights
    deviation = np.sqrt((ranked - mean[:, None]) ** 2 @ weights)
    return np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 0)
