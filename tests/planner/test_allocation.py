"""Allocation: against brute force, within limits, and the same every time."""

from __future__ import annotations

import itertools
import random

import pytest

from qtool.errors import UsageError
from qtool.quantize.planner.allocation import Limits, Option, allocate
from qtool.quantize.planner.cost import Cost


def option(loss: float, bits: int, work: int = 1, reads: int = 1) -> Option:
    return Option(loss=loss, cost=Cost(bits=bits, reads=reads, work=work))


def convex_sites(seed: int, count: int = 5) -> list[list[Option]]:
    """Options whose loss falls convexly with their bits, in sizes that differ from site to site."""
    draw = random.Random(seed)
    sites = []
    for _ in range(count):
        weight, step = draw.uniform(0.1, 10.0), draw.randint(1, 4)
        sites.append([option(weight * 2.0**-i, 10 + i * step) for i in range(4)])
    return sites


def totals(sites: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[float, int, int]:
    picked = [site[i] for site, i in zip(sites, chosen, strict=True)]
    return sum(p.loss for p in picked), sum(p.cost.bits for p in picked), sum(p.cost.work for p in picked)


@pytest.mark.parametrize("seed", range(8))
def test_close_to_the_optimum_and_within_the_limit(seed: int) -> None:
    sites = convex_sites(seed)
    limit = 54 + 3 * seed
    loss, bits, _ = totals(sites, allocate(sites, Limits(bits=limit)))
    every = [totals(sites, chosen) for chosen in itertools.product(range(4), repeat=len(sites))]
    best = min(loss for loss, bits, _ in every if bits <= limit)
    assert bits <= limit
    # The greedy choice differs from the optimum by less than the largest single step.
    assert loss <= best + max(site[0].loss - site[1].loss for site in sites)
    assert loss < totals(sites, [0] * len(sites))[0]


def test_work_is_a_limit_of_its_own() -> None:
    sites = [[option(1.0, 10, 10), option(0.1, 11, 100)], [option(1.0, 10, 10), option(0.5, 11, 12)]]
    assert allocate(sites, Limits(work=50)) == [0, 1]
    assert allocate(sites, Limits(work=200)) == [1, 1]


def test_reads_are_a_limit_of_their_own() -> None:
    sites = [[option(1.0, 10, reads=10), option(0.1, 10, reads=100)], [option(1.0, 10, reads=10), option(0.5, 11)]]
    assert allocate(sites, Limits(reads=50)) == [0, 1]
    assert allocate(sites, Limits(reads=101)) == [1, 1]


def test_it_stops_where_the_loss_is_reached() -> None:
    sites = [[option(4.0, 10), option(1.0, 12)], [option(4.0, 10), option(3.0, 12)]]
    assert allocate(sites, Limits(loss=5.0)) == [1, 0]
    assert allocate(sites, Limits(loss=8.0)) == [0, 0]
    assert allocate(sites, Limits()) == [1, 1]


def test_a_worse_and_dearer_option_is_never_taken() -> None:
    assert allocate([[option(1.0, 10), option(2.0, 20), option(0.5, 30)]], Limits()) == [2]
    assert allocate([[option(1.0, 10), option(2.0, 20)]], Limits()) == [0]


def test_equal_options_go_to_the_first() -> None:
    sites = [[option(1.0, 10), option(0.5, 12)]] * 2
    assert allocate(sites, Limits(bits=22)) == [1, 0]


@pytest.mark.parametrize(
    ("limits", "named"),
    [(Limits(bits=5), "max-bits"), (Limits(work=0.5), "max-slowdown"), (Limits(reads=0), "max-slowdown")],
)
def test_a_limit_below_the_cheapest_is_refused(limits: Limits, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        allocate([[option(1.0, 10), option(0.5, 12)]], limits)
