"""A text measured in shards and merged is the text measured at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.sink_statistics import SINK_FIELDS
from qtool.quantize.artifacts.site_statistics import FIELDS
from qtool.quantize.artifacts.statistics import Sampling, Statistics
from qtool.quantize.artifacts.store import stage
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import Text, batches, measure
from qtool.quantize.measure.batches import cut

Make = Callable[..., Path]
LENGTH = 24
IDS = np.random.default_rng(8).integers(0, 256, (13, LENGTH))
DOMAIN_OF = np.array([0] * 5 + [1] * 1 + [2] * 7)
TEXT = Text(ids=IDS, domains=("prose", "code", "chat"), domain_of=DOMAIN_OF, sha256="cd" * 32)
SUMS = ("channel_sum", "channel_square", "powers", "errors", "gram")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences to a batch; some rows sampled, as in a long text."""
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 2 * LENGTH)
    some = Sampling(histogram=2, median=2, error=3)
    monkeypatch.setattr(Sampling, "for_tokens", staticmethod(lambda tokens: some))


def run(source: Any, text: Text = TEXT, **options: Any) -> Statistics:
    return measure(source, text, progress=lambda *_: None, **options).statistics


def saved_and_loaded(folder: Path, statistics: Statistics) -> Statistics:
    with stage(folder) as staging:
        statistics.save(staging.path)
        parents = (Parent(kind="model", digest=statistics.model_digest),)
        staging.commit(Manifest(kind="statistics", parents=parents))
    return Statistics.load(folder)


def assert_same(one: Statistics, other: Statistics) -> None:
    for name in ("model_digest", "text_sha256", "length", "shape", "sampling", "roles", "aliases"):
        assert getattr(one, name) == getattr(other, name), name
    assert list(one.roles) == list(other.roles)
    assert list(one.domains) == list(other.domains)
    for name, domain in [*one.domains.items(), ("", one.total)]:
        theirs = other.domains[name] if name else other.total
        assert list(domain.sites) == list(theirs.sites)
        assert list(domain.sinks) == list(theirs.sinks)
        for key, field in itertools.product(domain.sites, FIELDS):
            ours, wanted = (getattr(each.sites[key], field) for each in (domain, theirs))
            assert ours.dtype == wanted.dtype
            if field in SUMS:
                size = np.abs(wanted).max(initial=0)
                np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=1e-12 * size, err_msg=f"{key}.{field}")
            elif field == "ratios":
                np.testing.assert_array_equal(ours[:, [0, 2, 3]], wanted[:, [0, 2, 3]], err_msg=key)
                np.testing.assert_allclose(ours[:, 1], wanted[:, 1], rtol=1e-12)
            else:
                np.testing.assert_array_equal(ours, wanted, err_msg=f"{key}.{field}")
        for key, field in itertools.product(domain.sinks, SINK_FIELDS):
            ours, wanted = (getattr(each.sinks[key], field) for each in (domain, theirs))
            np.testing.assert_allclose(ours, wanted, rtol=1e-12 if field == "importance" else 0)


@pytest.mark.parametrize(("family", "count"), [("llama", 4), ("mixtral", 4), ("llama", 8)])
def test_shards_merge_to_one_run(family: str, count: int, tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model(family)))
    gram = count == 4
    whole = run(source, gram=gram)
    parts = [run(source, shard=(i, count), gram=gram) for i in range(count)]
    assert sum(part.shape[1] for part in parts) == 13 and all(part.shape[0] == 13 for part in parts)
    parts = [saved_and_loaded(tmp_path / str(i), part) for i, part in enumerate(parts)]
    order = np.random.default_rng(count).permutation(count)
    forward, shuffled = (reduce(Statistics.merge, [parts[i] for i in each]) for each in (range(count), order))
    for merged in (forward, shuffled, saved_and_loaded(tmp_path / "merged", shuffled)):
        assert_same(merged, whole)
    halves = [reduce(Statistics.merge, parts[i::2]) for i in (1, 0)]
    assert_same(halves[0].merge(halves[1]), whole)


def test_an_incomplete_merge_says_how_much_it_holds(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    parts = [run(source, shard=(i, 3)) for i in range(3)]
    assert parts[0].merge(parts[1]).shape == (13, parts[0].shape[1] + parts[1].shape[1])
    assert parts[0].merge(parts[1]).merge(parts[2]).shape == (13, 13)


def test_the_same_shard_twice_is_refused(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    one, other = run(source, shard=(0, 2)), run(source, shard=(1, 2))
    for pair in ((one, one), (one.merge(other), other), (one, run(source)), (one, run(source, shard=(0, 3)))):
        with pytest.raises(UsageError, match="once"):
            pair[0].merge(pair[1])


def test_shards_of_other_models_or_texts_are_refused(tiny_model: Make) -> None:
    source, another = (open_model(str(tiny_model(seed=seed))) for seed in (0, 1))
    one = run(source, shard=(0, 2))
    with pytest.raises(UsageError, match="model digest"):
        one.merge(run(another, shard=(1, 2)))
    with pytest.raises(UsageError, match="text sha256"):
        one.merge(run(source, replace(TEXT, sha256="ee" * 32), shard=(1, 2)))
    with pytest.raises(UsageError, match="length"):
        one.merge(run(source, replace(TEXT, ids=IDS[:, :20]), shard=(1, 2)))


def test_more_shards_than_batches_is_a_usage_error(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    run(source, shard=(7, 8))
    with pytest.raises(UsageError, match=r"--shard 9/9.*8 batches"):
        run(source, shard=(8, 9))


def test_batches_hold_one_domain_and_every_sequence_once() -> None:
    whole = cut(IDS, TEXT.domains, DOMAIN_OF)
    assert [batch.sequences.tolist() for batch in whole] == [[0, 1], [2, 3], [4], [5], [6, 7], [8, 9], [10, 11], [12]]
    assert [batch.domain for batch in whole] == ["prose"] * 3 + ["code"] + ["chat"] * 4
    for batch in whole:
        np.testing.assert_array_equal(batch.tokens, IDS[batch.sequences])
    for count in range(1, 9):
        shards = [cut(IDS, TEXT.domains, DOMAIN_OF, (i, count)) for i in range(count)]
        found = sorted(batch.sequences.tolist() for shard in shards for batch in shard)
        assert found == sorted(batch.sequences.tolist() for batch in whole)


def test_a_sequence_longer_than_a_batch_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 10)
    assert [len(batch.sequences) for batch in cut(IDS, TEXT.domains, DOMAIN_OF)] == [1] * 13
