"""How often a site's values have which magnitude: a histogram on a logarithmic axis, cheap to fill and exact to merge.

A bin is the exponent and the first four mantissa bits of a float32 magnitude: 16 bins to every power of two, linear
inside it. A bin's upper edge is 3 to 6 % above its lower edge, so a quantile is known to that resolution.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS_PER_OCTAVE = 16
MANTISSA_BITS_DROPPED = 19
BINS = 256 * BINS_PER_OCTAVE

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# The smallest magnitude of every bin, and where the last ends; bins 4080 and up stand for infinities: never used.
EDGES: Floats = np.append(
    (np.arange(BINS - BINS_PER_OCTAVE, dtype=np.uint32) << MANTISSA_BITS_DROPPED).view(np.float32).astype(np.float64),
    2.0**128,
)


def bin_of(magnitudes: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """The bin of every magnitude (float32, not negative, finite)."""
    return (np.ascontiguousarray(magnitudes).view(np.int32) >> MANTISSA_BITS_DROPPED).astype(np.int32)


def quantile(counts: Counts, share: float) -> float:
    """The magnitude below which `share` of the values lie, linear inside a bin.

    Args:
        counts: values per bin [BINS].
        share: in [0, 1].

    Returns:
        0.0 for an empty histogram.
    """
    total = int(counts.sum())
    if total == 0:
        return 0.0
    below = np.cumsum(counts)
    wanted = share * total
    index = int(np.searchsorted(below, wanted, side="left"))
    index = min(index, int(np.flatnonzero(counts)[-1]))
    inside = (wanted - (below[index] - counts[index])) / counts[index] if counts[index] else 0.0
    return float(EDGES[index] + min(max(inside, 0.0), 1.0) * (EDGES[index + 1] - EDGES[index]))
