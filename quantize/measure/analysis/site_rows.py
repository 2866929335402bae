"""Every site in numbers."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.findings import SiteRow
from qtool.quantize.measure.analysis.peaks import peaks_of
from qtool.quantize.measure.analysis.site_names import block_of

FLOAT16_MAX = 65504.0
OVERFLOW_MARGIN = 4.0  # another text, or a longer one, may well be four times as large
QUANTILES: Mapping[str, float] = {
    "25": 0.25,
    "50": 0.5,
    "75": 0.75,
    "90": 0.9,
    "99": 0.99,
    "99.9": 0.999,
    "99.99": 0.9999,
}


def site_row(name: str, role: Role, site: SiteStatistics, texts: Mapping[int, str]) -> SiteRow:
    """One site in numbers; `texts` is token id to text."""
    return SiteRow(
        site=name,
        role=role,
        block=block_of(name),
        width=site.width,
        tokens=site.tokens,
        amax=site.amax,
        mean=site.mean,
        std=site.std,
        kurtosis=site.kurtosis,
        crest=site.crest,
        token_ratio_max=site.ratio_max,
        quantiles={label: site.quantile(share) for label, share in QUANTILES.items()},
        spike_tokens=int(site.rows[1]),
        peak=next(peaks_of(name, site, texts)),
        fp16_headroom=FLOAT16_MAX / site.amax if site.amax > 0 else FLOAT16_MAX,
    )
