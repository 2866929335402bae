"""From statistics to findings: what the tables, the report and the JSON say."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.measure.analysis.cache_channels import cache_channels
from qtool.quantize.measure.analysis.domains import domain_row
from qtool.quantize.measure.analysis.experts import expert_loads
from qtool.quantize.measure.analysis.findings import Findings
from qtool.quantize.measure.analysis.format_errors import format_errors
from qtool.quantize.measure.analysis.head_sinks import head_sinks
from qtool.quantize.measure.analysis.length_range import length_range
from qtool.quantize.measure.analysis.massive import massive
from qtool.quantize.measure.analysis.outlier_split import outlier_split
from qtool.quantize.measure.analysis.peaks import largest_peaks
from qtool.quantize.measure.analysis.sample_size import sample_size
from qtool.quantize.measure.analysis.site_names import is_state
from qtool.quantize.measure.analysis.site_rows import FLOAT16_MAX, OVERFLOW_MARGIN, site_row


def analyse(statistics: Statistics, texts: Mapping[int, str]) -> Findings:
    """Everything there is to say about a model's activations.

    Args:
        statistics: at least one domain with one site.
        texts: token id to text; an unknown id gives "".
    """
    sites, roles = statistics.sites, statistics.roles
    by_role: dict[str, dict[str, SiteStatistics]] = {"stream": {}, "input": {}, "cache": {}, "output": {}}
    for name, site in sites.items():
        by_role[roles[name]][name] = site
    return Findings(
        length=statistics.length,
        sequences=statistics.shape[1],
        sites=tuple(site_row(name, roles[name], site, texts) for name, site in sites.items()),
        peaks=largest_peaks(sites, texts),
        massive=massive(by_role["stream"], texts),
        splits=tuple(outlier_split(name, site) for name, site in sites.items() if roles[name] != "output"),
        formats=tuple(row for name, site in sites.items() for row in format_errors(name, roles[name], site)),
        lengths=tuple(length_range(name, site, statistics.length) for name, site in sites.items()),
        overflow=tuple(name for name, site in sites.items() if site.amax > FLOAT16_MAX / OVERFLOW_MARGIN),
        sinks=tuple(head_sinks(module, sinks) for module, sinks in statistics.total.sinks.items()),
        cache=tuple(cache_channels(name, site) for name, site in by_role["cache"].items() if not is_state(name)),
        experts=expert_loads(sites),
        domains=tuple(domain_row(name, domain, roles) for name, domain in statistics.domains.items()),
        sample_size=sample_size(sites),
    )
