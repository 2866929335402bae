"""Planted outliers, found by the analysis of statistics that plain loops made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.sink_statistics import KEYS, SinkStatistics
from qtool.quantize.artifacts.site_statistics import SiteStatistics, empty_histogram
from qtool.quantize.artifacts.statistics import DomainStatistics, Sampling, Statistics
from qtool.quantize.measure.analysis import Findings, analyse
from qtool.quantize.measure.analysis.format_errors import format_errors
from qtool.quantize.measure.analysis.massive import massive
from qtool.quantize.measure.analysis.outlier_split import outlier_split

SiteOf = Callable[..., SiteStatistics]
Values = npt.NDArray[np.float32]
SEQUENCES, LENGTH, WIDTH = 4, 200, 32
TEXTS = {1000: "<s>", 1007: "."}
ROLES: dict[str, Role] = {
    "model.embed_tokens.output": "stream",
    "model.layers.0.self_attn.q_proj.input": "input",
    "model.layers.0.self_attn.k": "cache",
    "model.layers.0.mixer.state": "cache",
    "model.layers.0.mlp.gate.logits": "output",
    "model.layers.0.mlp.experts.0.gate_proj.input": "input",
    "model.layers.0.mlp.experts.0.down_proj.input": "input",
    "model.layers.0.mlp.experts.2.gate_proj.input": "input",
    "model.layers.0.output": "stream",
    "model.layers.1.output": "stream",
    "model.layers.2.output": "stream",
    "model.norm.output": "stream",
}


def normal(seed: int, width: int = WIDTH, sequences: int = SEQUENCES) -> Values:
    return np.random.default_rng(seed).standard_normal((sequences, LENGTH, width)).astype(np.float32)


def planted() -> dict[str, Values]:
    values = {name: normal(index) for index, name in enumerate(ROLES)}
    values["model.layers.0.mlp.gate.logits"] = normal(3, width=5)
    values["model.layers.0.mlp.experts.2.gate_proj.input"] = normal(4, sequences=1)[:, :30] * 2
    values["model.layers.0.self_attn.k"][..., 11] *= 10
    values["model.layers.0.self_attn.k"][..., 3] *= 2
    values["model.layers.1.output"][:, 0, 5] = [2000, 2100, -2200, 1900]
    values["model.layers.1.output"][1, 7, 6] = 1500
    values["model.layers.2.output"][2, 0, 5] = 30_000
    values["model.layers.2.output"][0, 150, 9] = 300  # large, but not massive: the median is 0.7
    return values


def domain(values: Mapping[str, Values], site_of: SiteOf, first: int) -> DomainStatistics:
    sinks = SinkStatistics(
        sequences=np.array([4, 2]),
        first_short=np.array([4, 1]),
        first_full=np.array([1, 0]),
        any_full=np.array([1, 0]),
        importance=np.tile(np.array([[1.0], [0.5]]), (1, KEYS)),
    )
    return DomainStatistics(
        sites={name: site_of(part, first_sequence=first) for name, part in values.items()},
        sinks={"model.layers.0.self_attn": sinks},
    )


@pytest.fixture(scope="module")
def statistics(site_of: SiteOf) -> Statistics:
    calm = {name: normal(50 + index)[:2] for index, name in enumerate(ROLES) if ".experts." not in name}
    calm["model.layers.0.mlp.gate.logits"] = normal(3, width=5)[:2]
    return Statistics(
        model_digest="ab" * 32,
        text_sha256="cd" * 32,
        length=LENGTH,
        shape=(6, 6),
        sampling=Sampling.for_tokens(6 * LENGTH),
        roles=ROLES,
        aliases={"model.layers.0.self_attn.k_proj.input": "model.layers.0.self_attn.q_proj.input"},
        domains={"calm": domain(calm, site_of, 4), "prose": domain(planted(), site_of, 0)},
    )


@pytest.fixture(scope="module")
def found(statistics: Statistics) -> Findings:
    return analyse(statistics, TEXTS)


def test_massive_values_are_named(found: Findings) -> None:
    named = found.massive
    assert [(peak.value, peak.sequence, peak.position, peak.channel) for peak in named.by_layer] == [
        (30_000, 2, 0, 5),
        (-2200, 2, 0, 5),
        (2100, 1, 0, 5),
        (2000, 0, 0, 5),
        (1900, 3, 0, 5),
        (1500, 1, 7, 6),
    ]
    assert {peak.site for peak in named.by_layer} == {"model.layers.1.output", "model.layers.2.output"}
    assert named.channels == ((5, 5), (6, 1))
    assert named.positions == ((0, 5), (7, 1))
    assert named.texts == (("<s>", 5), (".", 1))
    assert (named.first_layer, named.last_layer) == (1, 2)
    assert named.by_token == {
        "model.embed_tokens.output": 0,
        "model.layers.0.output": 0,
        "model.layers.1.output": 5,
        "model.layers.2.output": 1,
        "model.norm.output": 0,
    }


def test_massive_rows_that_were_sampled_stand_for_all(site_of: SiteOf) -> None:
    values = normal(0)
    values[..., 5] = 3000
    sampled = site_of(values, every=4)
    assert (sampled.rows.tolist(), sampled.ratios[0, 0]) == ([SEQUENCES * LENGTH, 0], SEQUENCES * LENGTH / 4)
    assert massive({"a": sampled}, {}).by_token == {"a": SEQUENCES * LENGTH}


def test_peaks_and_overflow(found: Findings) -> None:
    assert found.peaks[0].value == 30_000
    assert found.peaks[0].text == "<s>"
    assert len(found.peaks) == 100
    assert [abs(peak.value) for peak in found.peaks] == sorted((abs(peak.value) for peak in found.peaks), reverse=True)
    assert found.overflow == ("model.layers.2.output",)


def test_rows_are_the_data(found: Findings) -> None:
    assert [row.site for row in found.sites] == list(ROLES)
    row = next(row for row in found.sites if row.site == "model.layers.1.output")
    values = np.concatenate([planted()[row.site], normal(50 + list(ROLES).index(row.site))[:2]]).astype(np.float64)
    assert (row.block, row.role, row.width, row.tokens, row.amax) == (1, "stream", WIDTH, 6 * LENGTH, 2200)
    assert (row.mean, row.std) == pytest.approx((values.mean(), values.std()))
    assert row.crest == pytest.approx(2200 / np.sqrt((values**2).mean()))
    for label, share in {"50": 50, "99": 99, "99.9": 99.9}.items():
        assert row.quantiles[label] == pytest.approx(np.percentile(np.abs(values), share), rel=0.06)
    assert row.spike_tokens == 5
    assert row.fp16_headroom == pytest.approx(65504 / 2200)
    assert found.sites[0].block is None


def test_lengths_end_at_the_measured_one(found: Findings) -> None:
    grown = {entry.site: entry for entry in found.lengths}["model.layers.0.self_attn.q_proj.input"]
    assert grown.lengths == (128, 200)
    values = np.abs(
        np.concatenate([planted()[grown.site], normal(50 + list(ROLES).index(grown.site))[:2]])
    )
    assert grown.amax == (values[:, :128].max(), values.max())
    assert grown.growth == pytest.approx(grown.amax[1] / grown.amax[0])


def test_cache_experts_sinks_and_domains(found: Findings) -> None:
    (cache,) = found.cache
    assert cache.channels == (11,)
    assert 6 < cache.worst_ratio < 14
    (load,) = found.experts
    assert (load.module, load.block) == ("model.layers.0.mlp", 0)
    assert load.hits == (SEQUENCES * LENGTH, 0, 30, 0, 0)
    assert load.amax[2] == np.abs(planted()["model.layers.0.mlp.experts.2.gate_proj.input"]).max()
    (sinks,) = found.sinks
    assert (sinks.rate_short, sinks.rate_full) == ((1.0, 0.25), (0.5, 0.0))
    assert sinks.importance[0] == pytest.approx(0.375)  # (2 + 1) over 2 heads and 4 whole sequences
    calm, prose = found.domains
    assert (calm.domain, calm.sequences, calm.tokens) == ("calm", 2, 2 * LENGTH)
    assert (prose.amax, prose.site) == (30_000, "model.layers.2.output")
    assert prose.amax_by_role["stream"] == 30_000
    assert set(prose.amax_by_role) == {"stream", "input", "cache", "output"}
    assert found.sample_size.worst_site == "model.layers.2.output"


def test_format_rows(found: Findings) -> None:
    rows = {(row.site, row.format, row.scale): row for row in found.formats}
    assert len(rows) == len(found.formats)
    # Twelve static candidates and eight dynamic ones; outputs have two.
    assert len(rows) == 20 * 11 + 2
    site = "model.layers.1.output"
    at_max, at_quantile = (rows[site, "int8", f"static {scale}"] for scale in ("max", "q0.999"))
    # The scale of 2200 / 127 rounds every ordinary value to zero; the quantile keeps them and loses the massive ones.
    assert at_max.relative_mae_ordinary == pytest.approx(1.0, abs=1e-3)
    assert at_max.sqnr_ordinary_db == pytest.approx(0.0, abs=0.01)
    assert at_max.sqnr_db > 25
    assert at_quantile.sqnr_ordinary_db > 30
    assert at_quantile.sqnr_db < 1
    assert (at_max.clip_rate, at_quantile.clip_rate) == (0.0, pytest.approx(1e-3, rel=0.1))
    for fmt in ("int8", "int4", "fp8_e4m3", "fp4_e2m1"):
        best = rows[site, fmt, "static mse"].sqnr_db
        assert best >= max(rows[site, fmt, scale].sqnr_db for scale in ("static max", "static q0.999")) - 0.01
    # The builder makes candidate k err by (k + 1) %.
    assert rows[site, "int4", "per token"].relative_mae == pytest.approx(0.02)
    assert rows[site, "int8", "per token, 64"].sqnr_ordinary_db == pytest.approx(-20 * np.log10(0.05))


def test_a_site_too_small_to_be_sampled_has_no_candidates(site_of: SiteOf) -> None:
    values = normal(0)[:1, :1]
    assert list(format_errors("a", "input", site_of(values)))
    unsampled = replace(site_of(values), ordinary=empty_histogram(), errors=np.zeros((2, 9, 2)))
    assert list(format_errors("a", "input", unsampled)) == []
    unquantized = replace(site_of(values), errors=np.zeros((2, 9, 2)))
    assert {row.scale.split()[0] for row in format_errors("a", "input", unquantized)} == {"static"}


def test_static_rows_are_what_quantizing_gives(site_of: SiteOf, statistics: Statistics, found: Findings) -> None:
    name = "model.layers.1.output"
    values = np.concatenate([planted()[name], normal(50 + list(ROLES).index(name))[:2]]).astype(np.float64)
    row = next(row for row in found.formats if (row.site, row.format, row.scale) == (name, "int8", "static max"))
    scale = 2200 / 127
    error = np.clip(np.rint(values / scale), -127, 127) * scale - values
    assert row.relative_mae == pytest.approx(np.abs(error).sum() / np.abs(values).sum(), rel=0.01)
    assert row.sqnr_db == pytest.approx(10 * np.log10((values**2).sum() / (error**2).sum()), abs=0.1)


def test_sampled_rows_stand_for_all(site_of: SiteOf) -> None:
    values = normal(0)
    values[:, 0, 5] = 500
    whole, sampled = site_of(values), site_of(values, every=4)
    assert sampled.ordinary.sum() * 3 < whole.ordinary.sum()
    assert sampled.channel_ordinary.tolist() == whole.channel_ordinary.tolist()
    for one, other in zip(format_errors("a", "input", sampled), format_errors("a", "input", whole), strict=True):
        if other.scale != "static mse":
            assert (one.relative_mae, one.clip_rate) == pytest.approx((other.relative_mae, other.clip_rate), rel=0.05)
    assert outlier_split("a", sampled).int8 == pytest.approx(outlier_split("a", whole).int8, rel=0.05)


@pytest.mark.parametrize(
    ("spikes", "channels", "largest"), [(False, False, 2), (True, False, 0), (False, True, 1)], ids=str
)
def test_what_was_planted_gets_the_blame(spikes: bool, channels: bool, largest: int, site_of: SiteOf) -> None:
    values = normal(1)
    if spikes:
        values[1:3, 4] *= 60
    if channels:
        values[..., [7, 20]] *= 40
    split = outlier_split("a", site_of(values))
    assert split.spike_tokens == (2 if spikes else 0)
    assert split.channels == ((7, 20) if channels else ())
    for shares in (split.int8, split.int4):
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
        assert int(np.argmax(shares)) == largest
        assert shares[largest] > 0.8


def test_both_kinds_share_the_blame(site_of: SiteOf) -> None:
    values = normal(1)
    values[..., 7] *= 30
    values[2, 9] = 600
    split = outlier_split("a", site_of(values))
    assert (split.channels, split.spike_tokens) == ((7,), 1)
    # Without the spike the channel still rounds all others to zero in INT4; without the channel the spike does.
    assert split.int4[0] > split.int4[1] > 0.01 > split.int4[2]
    assert sum(split.int4) == pytest.approx(1)


def test_a_site_of_zeros(site_of: SiteOf, statistics: Statistics) -> None:
    zeros = np.zeros((1, 5, 4), dtype=np.float32)
    nothing = Statistics(
        model_digest="",
        text_sha256="",
        length=5,
        shape=(1, 1),
        sampling=Sampling.for_tokens(5),
        roles={"model.layers.0.self_attn.v": "cache", "model.layers.0.output": "stream"},
        aliases={},
        domains={
            "a": DomainStatistics(
                sites={"model.layers.0.self_attn.v": site_of(zeros), "model.layers.0.output": site_of(zeros)}, sinks={}
            )
        },
    )
    found = analyse(nothing, {})
    assert found.splits[0].int8 == (0.0, 0.0, 1.0)
    assert found.cache[0].worst_ratio == 0.0
    assert found.lengths[0].lengths == (5,)
    assert found.massive.by_layer == ()
    assert found.massive.first_layer is None
    assert all(np.isfinite([row.sqnr_db, row.relative_mae]).all() for row in found.formats)
    assert found.sites[0].peak.text == ""
