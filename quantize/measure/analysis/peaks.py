"""The largest values, with where they stood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qtool.quantize.artifacts.site_statistics import TOP_VALUES, SiteStatistics
from qtool.quantize.measure.analysis.findings import Peak


def peaks_of(name: str, site: SiteStatistics, texts: Mapping[int, str], *, at_least: float = 0.0) -> Iterator[Peak]:
    """A site's largest values whose magnitude is at least `at_least`, largest first."""
    for value, place in zip(site.top_values.tolist(), site.top_places.tolist(), strict=True):
        if abs(value) < at_least:
            return
        sequence, position, token, channel = place
        yield Peak(
            site=name,
            value=value,
            sequence=sequence,
            position=position,
            token=token,
            text=texts.get(token, ""),
            channel=channel,
        )


def largest_peaks(sites: Mapping[str, SiteStatistics], texts: Mapping[int, str]) -> tuple[Peak, ...]:
    """The TOP_VALUES largest values of all sites, largest first; ties in forward order."""
    peaks = [peak for name, site in sites.items() for peak in peaks_of(name, site, texts)]
    return tuple(sorted(peaks, key=lambda peak: -abs(peak.value))[:TOP_VALUES])
