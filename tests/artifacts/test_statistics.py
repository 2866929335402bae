"""The statistics artifact: what is written is what is read, and parts that do not belong together do not merge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused, QtoolError, UsageError
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.sink_statistics import KEYS, SINK_FIELDS, SinkStatistics
from qtool.quantize.artifacts.site_statistics import FIELDS, SiteStatistics
from qtool.quantize.artifacts.statistics import SUMMARY, DomainStatistics, Sampling, Statistics
from qtool.quantize.artifacts.store import stage
from qtool.quantize.measure.places import Places
from qtool.quantize.measure.site_batch import statistics_of

DIGEST = "ab" * 32
ALL = Sampling(histogram=1, median=1, error=1)
ROLES: dict[str, Any] = {"embed": "stream", "q.input": "input", "q.output": "output", "norm": "stream"}
WIDTHS = {"embed": 5, "q.input": 70, "q.output": 3, "norm": 5}


def site(name: str, numbers: list[int], *, gram: bool = False) -> SiteStatistics:
    rng = np.random.default_rng([len(name), *numbers])
    values = rng.standard_normal((len(numbers) * 6, WIDTHS[name])).astype(np.float32)
    places = Places.of(np.array(numbers), rng.integers(0, 50, (len(numbers), 6)), ALL)
    return statistics_of(torch.from_numpy(values), places, ROLES[name], gram=gram)


def sinks(numbers: list[int]) -> SinkStatistics:
    rng = np.random.default_rng(numbers)
    return SinkStatistics(
        sequences=np.array([len(numbers), 1]),
        first_short=rng.integers(0, 2, 4),
        first_full=rng.integers(0, 2, 4),
        any_full=rng.integers(0, 2, 4),
        importance=rng.random((4, KEYS)),
    )


def statistics(*, prose: list[int], code: list[int], gram: bool = False) -> Statistics:
    numbers = {name: mine for name, mine in (("prose", prose), ("code", code)) if mine}
    domains = {
        name: DomainStatistics(
            sites={each: site(each, mine, gram=gram and each == "q.input") for each in ROLES},
            sinks={"attention": sinks(mine)},
        )
        for name, mine in numbers.items()
    }
    return Statistics(
        model_digest=DIGEST,
        text_sha256="cd" * 32,
        length=6,
        shape=(8, len(prose) + len(code)),
        sampling=ALL,
        roles=ROLES,
        aliases={"k.input": "q.input"},
        domains=domains,
    )


def saved(folder: Path, content: Statistics, edit: Callable[[Path], None] = lambda _: None) -> Path:
    with stage(folder) as staging:
        content.save(staging.path)
        edit(staging.path)
        staging.commit(Manifest(kind="statistics", parents=(Parent(kind="model", digest=DIGEST),)))
    return folder


def assert_equal(one: Statistics, other: Statistics) -> None:
    for name in ("model_digest", "text_sha256", "length", "shape", "sampling", "roles", "aliases"):
        assert getattr(one, name) == getattr(other, name), name
    assert list(one.domains) == list(other.domains)
    for name, domain in one.domains.items():
        assert list(domain.sites) == list(other.domains[name].sites)
        assert list(domain.sinks) == list(other.domains[name].sinks)
        theirs_all = other.domains[name]
        pairs = [(domain.sites, theirs_all.sites, FIELDS), (domain.sinks, theirs_all.sinks, SINK_FIELDS)]
        for mine, theirs, fields in pairs:
            for (key, record), field in itertools.product(mine.items(), fields):
                ours, read = getattr(record, field), getattr(theirs[key], field)
                assert (ours.dtype, ours.shape) == (read.dtype, read.shape), (key, field)
                np.testing.assert_array_equal(ours, read, err_msg=f"{key}.{field}")


@pytest.mark.parametrize("gram", [False, True])
def test_saved_and_loaded_is_equal(tmp_path: Path, gram: bool) -> None:
    # Without sequence 0 no site has a picture; with it some have; XᵀX only where it was asked for.
    for number, content in enumerate(
        [statistics(prose=[0, 1], code=[5], gram=gram), statistics(prose=[3], code=[], gram=gram)]
    ):
        loaded = Statistics.load(saved(tmp_path / str(number), content))
        assert_equal(loaded, content)
        assert len(loaded.digest) == 64
    assert loaded.sites["q.input"].gram.shape == ((70, 70) if gram else (0, 0))


def test_an_unknown_expert_site_of_one_domain_stays_there(tmp_path: Path) -> None:
    content = statistics(prose=[0], code=[4])
    domains = dict(content.domains)
    domains["code"] = replace(domains["code"], sites={"embed": domains["code"].sites["embed"]}, sinks={})
    loaded = Statistics.load(saved(tmp_path / "stats", replace(content, domains=domains)))
    assert list(loaded.domains["code"].sites) == ["embed"]
    assert loaded.sites["embed"].tokens == 12 and loaded.sites["norm"].tokens == 6
    assert list(loaded.sites) == list(ROLES)


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / n, statistics(prose=[0, 1], code=[5])) for n in ("one", "two"))
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_find_follows_aliases_and_totals_all_domains() -> None:
    content = statistics(prose=[0, 1], code=[5])
    assert content.find("k.input") is content.find("q.input") is content.sites["q.input"]
    assert content.find("elsewhere") is None
    assert content.sites["embed"].sequences.tolist() == [0, 1, 5]
    assert content.total.sinks["attention"].sequences.tolist() == [3, 2]


def test_merging_shards_in_any_order_gives_the_same_bytes(tmp_path: Path) -> None:
    shards = [
        statistics(prose=[0], code=[]),
        statistics(prose=[2], code=[4]),
        statistics(prose=[], code=[5]),
        statistics(prose=[1], code=[]),
    ]
    wanted = None
    for number, order in enumerate(itertools.permutations(shards)):
        merged = reduce(Statistics.merge, order)
        assert list(merged.domains) == ["prose", "code"]
        assert merged.shape == (8, 5)
        top = merged.sites["q.input"].top_values.tolist()
        wanted = wanted or top
        assert top == wanted
        if number in (0, 13, 23):
            assert_maxima_equal(merged, reduce(Statistics.merge, shards))
            loaded = Statistics.load(saved(tmp_path / str(number), merged))
            assert_equal(loaded, merged)


def assert_maxima_equal(one: Statistics, other: Statistics) -> None:
    for name, mine in one.sites.items():
        for field in ("channel_low", "channel_high", "ordinary", "spikes", "top_values", "top_places", "sequences"):
            np.testing.assert_array_equal(getattr(mine, field), getattr(other.sites[name], field))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_digest": "ee" * 32}, "model digest"),
        ({"text_sha256": "ee" * 32}, "text sha256"),
        ({"length": 7}, "length"),
        ({"sampling": Sampling(histogram=8, median=16, error=64)}, "sampling"),
        ({"roles": {**ROLES, "norm": "input"}}, "roles"),
        ({"shape": (9, 1)}, "same"),
    ],
)
def test_parts_of_different_measurements_do_not_merge(change: dict[str, Any], words: str) -> None:
    one, other = statistics(prose=[0], code=[]), statistics(prose=[1], code=[])
    one.merge(other)
    for pair in ((one, replace(other, **change)), (replace(other, **change), one)):
        with pytest.raises(UsageError, match=words):
            pair[0].merge(pair[1])


def test_the_same_sequences_do_not_merge_twice() -> None:
    one, other = statistics(prose=[0, 1], code=[5]), statistics(prose=[2], code=[5])
    for pair in ((one, one), (one, other), (one.merge(statistics(prose=[3], code=[])), one)):
        with pytest.raises(UsageError, match="once"):
            pair[0].merge(pair[1])


def edit_summary(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / SUMMARY).read_text())
        change(data)
        (folder / SUMMARY).write_text(json.dumps(data))

    return edit


def edit_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "domain-00.safetensors")
        change(tensors)
        save_file(tensors, folder / "domain-00.safetensors")

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        edit_summary(lambda data: data.pop("domains")),
        edit_summary(lambda data: data.update(schema=1)),
        edit_summary(lambda data: data.update(sampling={"histogram": 1})),
        edit_summary(lambda data: data.update(shape=[8])),
        edit_summary(lambda data: data.update(model_digest="ee" * 32)),
        edit_summary(lambda data: data["domains"]["prose"]["sites"].pop()),
        edit_summary(lambda data: data["domains"]["prose"]["sites"].append("norm")),
        edit_summary(lambda data: data["domains"].update(more={"sites": [], "sinks": []})),
        edit_tensors(lambda tensors: tensors.pop("site.rows")),
        edit_tensors(lambda tensors: tensors.pop("site.ordinary.places")),
        edit_tensors(lambda tensors: tensors.update({"site.range_at": tensors["site.range_at"][:-1]})),
        edit_tensors(lambda tensors: tensors["site.ordinary.places"].__setitem__(0, 100_000)),
        lambda folder: (folder / "domain-00.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
        lambda folder: (folder / "domain-00.safetensors").write_bytes(b""),
        lambda folder: (folder / SUMMARY).write_text("[]"),
        lambda folder: (folder / SUMMARY).write_bytes(b"\xff{"),
    ],
)
def test_malformed_statistics_are_refused(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    folder = saved(tmp_path / "stats", statistics(prose=[0, 1], code=[5]), edit)
    with pytest.raises(InputRefused):
        Statistics.load(folder)


def test_a_byte_changed_after_the_fact_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "stats", statistics(prose=[0], code=[4]))
    file = folder / "domain-01.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputRefused, match="changed"):
        Statistics.load(folder)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    with stage(tmp_path / "other") as staging:
        (staging.path / "x").write_text("x")
        staging.commit(Manifest(kind="checkpoint", parents=()))
    with pytest.raises(QtoolError, match="not a statistics"):
        Statistics.load(tmp_path / "other")
