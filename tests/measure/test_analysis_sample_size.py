"""The bootstrap in closed form against drawing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.measure.analysis.sample_size import bootstrap_cv, sample_size

SiteOf = Callable[..., SiteStatistics]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_as_if_drawn(size: int) -> None:
    rng = np.random.default_rng(0)
    ranked = np.sort(rng.lognormal(size=(3, 16)), axis=1)
    drawn = ranked[:, rng.integers(0, 16, (20_000, size))].max(axis=2)
    assert bootstrap_cv(ranked, size) == pytest.approx(drawn.std(axis=1) / drawn.mean(axis=1), rel=0.03)


def test_zeros_do_not_vary() -> None:
    assert bootstrap_cv(np.zeros((2, 4)), 2).tolist() == [0.0, 0.0]


def test_sizes_worst_site_and_what_is_enough(site_of: SiteOf) -> None:
    rng = np.random.default_rng(0)
    calm, wild, part = (rng.standard_normal((6, 4, 8)).astype(np.float32) for _ in range(3))
    wild[2] *= 100
    found = sample_size({"calm": site_of(calm), "wild": site_of(wild), "part": site_of(part[:2])})
    assert found.sequences == (1, 2, 4, 6)
    assert found.worst_site == "wild"
    assert all(median <= worst for median, worst in zip(found.cv, found.worst_cv, strict=True))
    assert found.worst_cv[-1] > 0.3
    assert found.enough is None
    calm_only = sample_size({"calm": site_of(calm)})
    assert calm_only.enough == next(
        size for size, cv in zip(calm_only.sequences, calm_only.cv, strict=True) if cv <= 0.1
    )


def test_one_sequence_proves_nothing(site_of: SiteOf) -> None:
    assert sample_size({"a": site_of(np.ones((1, 3, 4), dtype=np.float32))}).enough is None
