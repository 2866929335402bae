"""Which option each site gets so that the total loss is least within limits on what it costs.

Every site starts with its cheapest option. Then, again and again until nothing fits, the change is made that saves most
loss for the share it takes of what is left of the limits. On options whose loss falls convexly with their cost this is
the optimum but for the last step. Ties go to the earlier site and option: the same numbers give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from qtool.errors import UsageError
from qtool.quantize.planner.cost import NOTHING, Cost

# What an option costs, and which option of the command limits it.
RESOURCES = {"bits": "--max-bits", "reads": "--max-slowdown", "work": "--max-slowdown"}
UNLIMITED_WEIGHT = 1e-3  # of a share of an unlimited total: only decides between changes that are free otherwise


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one choice for a site loses and costs."""

    loss: float
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Limits:
    """On the totals over all sites, resource by resource; `loss` ends the search as soon as it is reached."""

    bits: float = inf
    reads: float = inf
    work: float = inf
    loss: float = 0.0

    def exceeded(self, total: Cost) -> str | None:
        """The option behind the first limit that a total is over."""
        return next((option for name, option in RESOURCES.items() if getattr(total, name) > getattr(self, name)), None)


def allocate(sites: Sequence[Sequence[Option]], limits: Limits) -> list[int]:
    """The chosen option's index for every site.

    Raises:
        UsageError: when even the cheapest options exceed a limit.
    """
    chosen = [min(range(len(options)), key=lambda i: _cheapest(options[i], i)) for options in sites]
    total = sum((s[i].cost for s, i in zip(sites, chosen, strict=True)), NOTHING)
    loss = sum(s[i].loss for s, i in zip(sites, chosen, strict=True))
    if (option := limits.exceeded(total)) is not None:
        raise UsageError(option, "is below the cheapest candidates", "allow more, or ask for a cheaper scheme")
    while loss > limits.loss:
        best = _best_change(sites, chosen, total, limits)
        if best is None:
            break
        site, index = best
        before, after = sites[site][chosen[site]], sites[site][index]
        total = total + after.cost - before.cost
        loss += after.loss - before.loss
        chosen[site] = index
    return chosen


def _cheapest(option: Option, index: int) -> tuple[float, ...]:
    return (*(getattr(option.cost, name) for name in RESOURCES), option.loss, index)


def _best_change(
    sites: Sequence[Sequence[Option]], chosen: Sequence[int], total: Cost, limits: Limits
) -> tuple[int, int] | None:
    best, best_rate = None, 0.0
    for site, options in enumerate(sites):
        now = options[chosen[site]]
        for index, option in enumerate(options):
            saved = now.loss - option.loss
            if saved <= 0:
                continue
            more = option.cost - now.cost
            if limits.exceeded(total + more) is not None:
                continue
            share = sum(_share(*(getattr(each, name) for each in (more, total, limits))) for name in RESOURCES)
            rate = inf if share <= 0 else saved / share
            if rate > best_rate:
                best, best_rate = (site, index), rate
    return best


def _share(more: int, total: int, limit: float) -> float:
    return UNLIMITED_WEIGHT * more / max(total, 1) if limit == inf else more / max(limit - total, more, 1e-9)
