"""Massive activations of the residual stream by both published definitions (arXiv 2402.17762, 2605.15572)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qtool.quantize.artifacts.site_statistics import MASSIVE_MAGNITUDE, MASSIVE_RATIO, SiteStatistics
from qtool.quantize.measure.analysis.findings import Massive, Peak
from qtool.quantize.measure.analysis.peaks import peaks_of
from qtool.quantize.measure.analysis.site_names import block_output


def massive(stream: Mapping[str, SiteStatistics], texts: Mapping[int, str]) -> Massive:
    """What is massive in the residual stream.

    Args:
        stream: the sites of role "stream", in forward order.
        texts: token id to text.
    """
    found = [peak for name, site in stream.items() for peak in _massive_values(name, site, texts)]
    found.sort(key=lambda peak: -abs(peak.value))
    blocks = sorted({block for peak in found if (block := block_output(peak.site)) is not None})
    return Massive(
        by_layer=tuple(found),
        by_token={name: _massive_tokens(site) for name, site in stream.items()},
        channels=_counted(peak.channel for peak in found),
        positions=_counted(peak.position for peak in found),
        texts=_counted(peak.text for peak in found),
        first_layer=blocks[0] if blocks else None,
        last_layer=blocks[-1] if blocks else None,
    )


def _massive_values(name: str, site: SiteStatistics, texts: Mapping[int, str]) -> list[Peak]:
    peaks = peaks_of(name, site, texts, at_least=MASSIVE_RATIO * site.quantile(0.5))
    return [peak for peak in peaks if abs(peak.value) > MASSIVE_MAGNITUDE]


def _massive_tokens(site: SiteStatistics) -> int:
    """How many rows are massive by their own median; the rows looked at stand for all of their kind."""
    looked, massive_rows = site.ratios[:, 0], site.ratios[:, 3]
    shares = np.divide(massive_rows, looked, out=np.zeros(2), where=looked > 0)
    return round(float(shares @ site.rows))


def _counted(keys: Iterable[Any]) -> tuple[tuple[Any, int], ...]:
    return tuple(sorted(Counter(keys).items(), key=lambda entry: (-entry[1], entry[0])))
