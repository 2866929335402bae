from dataclasses import replace
from types import SimpleNamespace

import pytest

from qtool.quantize.measure.analysis import Findings
from qtool.quantize.measure.analysis.findings import FormatError
from qtool.quantize.measure.report.format_costs import kind_costs, recommendations, scale_words
from qtool.quantize.measure.report.headline import headlines
from qtool.quantize.measure.report.tables import recommendation_table
from qtool.quantize.measure.report.telling import hardest, telling_sites


def with_costs(findings: Findings, costs: dict[tuple[int, str, str], float]) -> Findings:
    """The findings with made-up errors of one kind: (block, format, scale) to dB on ordinary tokens."""
    formats = tuple(
        FormatError(
            site=f"model.layers.{block}.mlp.down_proj.input",
            format=fmt,
            scale=scale,
            relative_mae=0.1,
            relative_mae_ordinary=0.1,
            sqnr_db=99.0,
            sqnr_ordinary_db=db,
            clip_rate=0.0,
        )
        for (block, fmt, scale), db in costs.items()
    )
    return replace(findings, formats=formats)


def test_the_cheapest_scale_that_is_enough_in_every_block_is_recommended(llama: SimpleNamespace) -> None:
    costs = {
        (0, "int8", "per token"): 40.0,
        (1, "int8", "per token"): 31.0,
        (0, "int8", "static max"): 45.0,
        (1, "int8", "static max"): 12.0,
        (0, "int8", "per token, 64"): 50.0,
        (1, "int8", "per token, 64"): 50.0,
        (0, "int4", "static max"): 3.0,
        (0, "int4", "per token, 64"): 14.9,
    }
    findings = with_costs(llama.findings, costs)
    chosen = [(r.format, r.scale, r.cost.worst, r.enough) for r in recommendations(findings)]
    assert chosen == [("int8", "per token", 31.0, True), ("int4", "per token, 64", 14.9, False)]
    assert recommendation_table(findings).rows == (
        ("down_proj.input", "per token: 31.0 dB", "no (token by 64: 14.9 dB)"),
    )
    cost = kind_costs(findings)["mlp.down_proj.input"][("int8", "static max")]
    assert (cost.median, cost.worst, cost.worst_site) == (28.5, 12.0, "model.layers.1.mlp.down_proj.input")


def test_scales_are_called_the_same_everywhere() -> None:
    assert [scale_words(s) for s in ("static mse", "per token", "per token, 64")] == [
        "static MSE",
        "per token",
        "token by 64",
    ]


def test_sites_that_nobody_quantizes_do_not_count(llama: SimpleNamespace) -> None:
    (kind,) = kind_costs(with_costs(llama.findings, {(0, "int8", "static max"): 1.0}))
    assert kind == "mlp.down_proj.input"
    every = kind_costs(llama.findings)
    assert "output" not in every
    assert "mlp.act_fn.output" not in every
    assert {"self_attn.k_rope", "self_attn.q_proj.input"} <= set(every)


def test_the_telling_sites_are_of_different_kinds_and_hold_the_extremes(llama: SimpleNamespace) -> None:
    sites = [row.site for row in telling_sites(llama.findings, 6)]
    assert sites[0] == max(llama.findings.sites, key=lambda row: row.amax).site
    assert len({site.split(".", 3)[-1] for site in sites}) == 6
    int8 = {e.site: e for e in llama.findings.formats if (e.format, e.scale) == ("int8", "static max")}
    inputs = {row.site for row in llama.findings.sites if row.role in ("input", "cache")}
    assert sites[1] == hardest({site: e for site, e in int8.items() if site in inputs})[0]


@pytest.mark.parametrize(
    ("factor", "near", "level", "words"),
    [
        (1.0, (), "fine", "float16 has room"),
        (1.0, ("a", "b"), "watch", "2 sites come within"),
        (100.0, (), "problem", "overflows"),
    ],
)
def test_the_headline_warns_of_float16(
    llama: SimpleNamespace, factor: float, near: tuple[str, ...], level: str, words: str
) -> None:
    rows = tuple(replace(row, amax=row.amax * factor) for row in llama.findings.sites)
    largest = headlines(replace(llama.findings, sites=rows, overflow=near))[0]
    assert (largest.title, largest.level) == ("Largest value", level)
    assert words in largest.sentence


def test_too_few_samples_are_said_so(llama: SimpleNamespace) -> None:
    size = replace(llama.findings.sample_size, enough=None)
    (samples,) = (h for h in headlines(replace(llama.findings, sample_size=size)) if h.title == "Samples")
    assert (samples.level, samples.figure) == ("watch", "too few")
    assert samples.sentence.startswith("Not enough: with 6 sequences")
