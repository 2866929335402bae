"""Each domain of the text apart."""

from __future__ import annotations

from collections.abc import Mapping

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.statistics import DomainStatistics
from qtool.quantize.measure.analysis.findings import DomainRow


def domain_row(name: str, domain: DomainStatistics, roles: Mapping[str, Role]) -> DomainRow:
    """One domain in numbers; among equal maxima the first site in forward order is named."""
    sites = {site: domain.sites[site] for site in roles if site in domain.sites}
    first = next(iter(sites.values()))
    largest = max(sites, key=lambda site: sites[site].amax)
    by_role: dict[str, float] = {}
    for site, role in roles.items():
        if site in sites:
            by_role[role] = max(by_role.get(role, 0.0), sites[site].amax)
    return DomainRow(
        domain=name,
        sequences=len(first.sequences),
        tokens=first.tokens,
        amax=sites[largest].amax,
        site=largest,
        amax_by_role=by_role,
    )
