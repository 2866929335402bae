"""How often each expert of a mixture was chosen, and what it read."""

from __future__ import annotations

import re
from collections.abc import Mapping

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.findings import ExpertLoad
from qtool.quantize.measure.analysis.site_names import block_of

# What an expert reads; the input of its last linear is not what the router sent to it.
_EXPERT_INPUT = re.compile(r"^(?P<module>.+)\.experts\.(?P<number>\d+)\.(?:gate_proj|gate_up_proj)\.input$")
_ROUTERS = ("gate.logits", "router.logits")


def expert_loads(sites: Mapping[str, SiteStatistics]) -> tuple[ExpertLoad, ...]:
    """The load of every mixture's experts, in forward order; an expert without a site was never hit."""
    modules: dict[str, dict[int, SiteStatistics]] = {}
    for name, site in sites.items():
        found = _EXPERT_INPUT.match(name)
        if found:
            modules.setdefault(found["module"], {}).setdefault(int(found["number"]), site)
    return tuple(_load(module, experts, sites) for module, experts in modules.items())


def _load(module: str, experts: Mapping[int, SiteStatistics], sites: Mapping[str, SiteStatistics]) -> ExpertLoad:
    routers = [sites[f"{module}.{router}"].width for router in _ROUTERS if f"{module}.{router}" in sites]
    count = max([*routers, max(experts) + 1])
    return ExpertLoad(
        module=module,
        block=block_of(module) or 0,
        hits=tuple(experts[number].tokens if number in experts else 0 for number in range(count)),
        amax=tuple(experts[number].amax if number in experts else 0.0 for number in range(count)),
    )
