"""Site statistics on hand-made values, merging, and the artifact on disk."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.statistics import NUMBERS, SiteStatistics, Statistics, TopValue
from qtool.quantize.artifacts.store import stage

DIGEST = "ab" * 32


def site(values: torch.Tensor, first_sequence: int = 0) -> SiteStatistics:
    tokens = torch.arange(values.shape[0] * values.shape[1]).reshape(values.shape[:2]) + 1000 * first_sequence
    return SiteStatistics.of(values, tokens, first_sequence=first_sequence)


def statistics(**sites: SiteStatistics) -> Statistics:
    return Statistics(model_digest=DIGEST, sequences=2, length=3, sites=sites, aliases={"b": "a"})


def saved(folder: Path, content: Statistics) -> Path:
    with stage(folder) as staging:
        content.save(staging.path)
        staging.commit(Manifest(kind="statistics", parents=(Parent(kind="model", digest=DIGEST),)))
    return folder


def test_by_hand() -> None:
    values = torch.tensor([[[1.0, -2.0, 0.5], [4.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [-3.0, 2.0, 1.0]]])
    one = site(values)
    assert (one.count, one.low, one.high, one.amax) == (12, -3.0, 4.0, 4.0)
    assert one.mean == pytest.approx(6.5 / 12)
    assert one.square == pytest.approx(1 + 4 + 0.25 + 16 + 3 + 9 + 4 + 1)
    assert one.channel_amax.tolist() == [4.0, 2.0, 1.0]
    assert one.top[0] == TopValue(value=4.0, sequence=0, position=1, token=1, channel=0)
    assert one.top[1] == TopValue(value=-3.0, sequence=1, position=1, token=3, channel=0)
    # Ties: −2 at (0, 0, 1) stands before 2 at (1, 1, 1).
    assert [(v.value, v.sequence) for v in one.top[2:4]] == [(-2.0, 0), (2.0, 1)]
    assert one.tokens == 3  # the token with median 0 has no ratio
    assert (one.ratio_max, one.ratio_mean) == pytest.approx((2.0, (2 + 1 + 1.5) / 3))


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    assert site(torch.randn(4, 500, 100, generator=generator) + 5).kurtosis == pytest.approx(3, abs=0.05)
    assert site(torch.rand(4, 500, 100, generator=generator)).kurtosis == pytest.approx(1.8, abs=0.02)
    assert site(torch.full((1, 2, 3), 2.0)).kurtosis == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 9999),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True),
    coarse=st.booleans(),
)
def test_merging_in_any_order_is_one_run(seed: int, cuts: list[int], coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((10, 5, 7)).astype(np.float32))
    if coarse:
        values = values.round()  # many ties
    tokens = torch.from_numpy(rng.integers(0, 50, (10, 5)))
    whole = SiteStatistics.of(values, tokens, first_sequence=0)
    edges = [0, *sorted(cuts), 10]
    parts = [
        SiteStatistics.of(values[a:b], tokens[a:b], first_sequence=a) for a, b in itertools.pairwise(edges)
    ]
    rng.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.top == whole.top
    assert np.array_equal(merged.channel_amax, whole.channel_amax)
    exact = ("count", "low", "high", "tokens", "ratio_max")
    assert [getattr(merged, name) for name in exact] == [getattr(whole, name) for name in exact]
    for name in ("total", "square", "cube", "fourth", "ratio_total"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12, abs=1e-9)


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    content = statistics(a=site(torch.randn(2, 3, 20)), c=site(torch.randn(2, 3, 4)))
    loaded = Statistics.load(saved(tmp_path / "stats", content))
    assert loaded.digest
    for name in ("a", "c"):
        assert np.array_equal(loaded.sites[name].channel_amax, content.sites[name].channel_amax)
        ours, theirs = (replace(s.sites[name], channel_amax=np.zeros(1, np.float32)) for s in (content, loaded))
        assert ours == theirs
    assert loaded.find("b") is loaded.sites["a"]
    assert (loaded.model_digest, loaded.sequences, loaded.length) == (DIGEST, 2, 3)


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    content = statistics(a=site(torch.randn(2, 3, 20)))
    first, second = (saved(tmp_path / name, content) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.pop("sites"),
        lambda data: data["sites"]["a"].pop("square"),
        lambda data: data["sites"]["a"].update(surprise=1),
        lambda data: data["sites"]["a"]["top"][0].pop(),
        lambda data: data["sites"].update(z=data["sites"]["a"]),
        lambda data: data.update(model_digest="cd" * 32),
    ],
)
def test_malformed_statistics_are_refused(tmp_path: Path, edit: object) -> None:
    with stage(tmp_path / "stats") as staging:
        statistics(a=site(torch.randn(2, 3, 20))).save(staging.path)
        data = json.loads((staging.path / NUMBERS).read_text())
        edit(data)  # type: ignore[operator]
        (staging.path / NUMBERS).write_text(json.dumps(data))
        staging.commit(Manifest(kind="statistics", parents=(Parent(kind="model", digest=DIGEST),)))
    with pytest.raises(InputRefused):
        Statistics.load(tmp_path / "stats")


def test_statistics_of_different_models_do_not_merge() -> None:
    one = statistics(a=site(torch.randn(2, 3, 4)))
    with pytest.raises(UsageError):
        one.merge(replace(one, model_digest="cd" * 32))
