"""Which option each site gets so that the total loss is least within limits on bits and work.

Every site starts with its cheapest option. Then, again and again until nothing fits, the change is made that saves most
loss for the share it takes of what is left of the limits. On options whose loss falls convexly with their cost this is
the optimum but for the last step. Ties go to the earlier site and option: the same numbers give the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from qtool.errors import UsageError
from qtool.quantize.planner.cost import Cost

UNLIMITED_WEIGHT = 1e-3  # of a share of an unlimited total: only decides between changes that are free otherwise


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one choice for a site loses and costs."""

    loss: float
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Limits:
    """On the totals over all sites; `loss` ends the search as soon as it is reached."""

    bits: float = inf
    work: float = inf
    loss: float = 0.0


def allocate(sites: Sequence[Sequence[Option]], limits: Limits) -> list[int]:
    """The chosen option's index for every site.

    Raises:
        UsageError: when even the cheapest options exceed a limit.
    """
    chosen = [min(range(len(s)), key=lambda i: (s[i].cost.bits, s[i].cost.work, s[i].loss, i)) for s in sites]
    total = sum((s[i].cost for s, i in zip(sites, chosen, strict=True)), Cost(bits=0, work=0))
    loss = sum(s[i].loss for s, i in zip(sites, chosen, strict=True))
    if total.bits > limits.bits:
        raise UsageError("--max-bits", "is below the cheapest candidates", "allow more bits, or fewer in the scheme")
    if total.work > limits.work:
        raise UsageError("--max-slowdown", "is below the cheapest candidates", "allow more")
    while loss > limits.loss:
        best = _best_change(sites, chosen, total, limits)
        if best is None:
            break
        site, option = best
        before, after = sites[site][chosen[site]], sites[site][option]
        total = Cost(bits=total.bits + after.cost.bits - before.cost.bits, work=total.work + _more(after, before))
        loss += after.loss - before.loss
        chosen[site] = option
    return chosen


def _more(after: Option, before: Option) -> int:
    return after.cost.work - before.cost.work


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
            bits, work = option.cost.bits - now.cost.bits, _more(option, now)
            if total.bits + bits > limits.bits or total.work + work > limits.work:
                continue
            share = _share(bits, total.bits, limits.bits) + _share(work, total.work, limits.work)
            rate = inf if share <= 0 else saved / share
            if rate > best_rate:
                best, best_rate = (site, index), rate
    return best


def _share(more: int, total: int, limit: float) -> float:
    return UNLIMITED_WEIGHT * more / max(total, 1) if limit == inf else more / max(limit - total, more, 1e-9)
