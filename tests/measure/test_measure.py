"""Measurement finds what was planted, where it was planted, and sums up exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.inputs import SourceModel, open_model
from qtool.quantize.measure import measure

Make = Callable[..., Path]
TOKENS = np.random.default_rng(3).integers(0, 256, (50, 64))  # two batches, the second short


def run(source: Any, tokens: Any = TOKENS, **options: Any) -> Statistics:
    groups = architecture_of(source.config).linear_groups
    return measure(source, tokens, groups=groups, progress=lambda *_: None, **options)


class Altered:
    """A source with some tensors changed."""

    def __init__(self, source: SourceModel, **change: Callable[[Any], None]) -> None:
        self._source = source
        self._change = {name.replace("__", "."): edit for name, edit in change.items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Any:
        array = self._source.read(name).copy()
        if name in self._change:
            self._change[name](array)
        return array


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_site_equals_a_plain_forward_pass(tiny_model: Make, family: str) -> None:
    source = open_model(str(tiny_model(family)))
    statistics = run(source)
    network = load_network(source)
    seen: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: object, args: Any, output: Any) -> None:
            if args:
                seen[f"{name}.input"] = args[0]
            seen[f"{name}.output"] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(record(name))
    with torch.no_grad():
        network.model(torch.from_numpy(TOKENS), use_cache=False)
    assert len(statistics.sites) == 2 + 2 * (4 + 7 + 1)
    for name, site in statistics.sites.items():
        values = seen[name].double()
        assert site.count == values.numel()
        assert site.amax == pytest.approx(float(values.abs().max()), rel=1e-4)
        assert site.std == pytest.approx(float(values.std()), rel=1e-3)
        np.testing.assert_allclose(site.channel_amax, values.abs().amax((0, 1)), rtol=1e-3, atol=1e-4)
        first = site.top[0]
        assert float(values[first.sequence, first.position, first.channel]) == pytest.approx(first.value, rel=1e-4)
        assert first.token == TOKENS[first.sequence, first.position]
        centred = values - values.mean()
        kurtosis = float(centred.pow(4).mean() / centred.pow(2).mean() ** 2)
        assert site.kurtosis == pytest.approx(kurtosis, rel=1e-3)
        magnitude = values.flatten(0, 1).abs()
        ratio = magnitude.amax(1) / magnitude.median(1).values
        assert (site.ratio_max, site.ratio_mean) == pytest.approx((float(ratio.max()), float(ratio.mean())), rel=1e-2)


def test_a_planted_outlier_is_found_at_its_place(tiny_model: Make) -> None:
    tokens = TOKENS.copy()
    tokens[tokens == 77] = 78
    tokens[41, 13] = 77

    def plant(embedding: Any) -> None:
        embedding[77, 21] = 1234.5

    source = Altered(open_model(str(tiny_model())), model__embed_tokens__weight=plant)
    site = run(source, tokens).sites["model.embed_tokens.output"]
    top = site.top[0]
    assert (top.value, top.sequence, top.position, top.token, top.channel) == (1234.5, 41, 13, 77, 21)
    assert site.amax == site.high == site.channel_amax[21] == 1234.5
    assert site.ratio_max > 100 > site.ratio_mean


def test_linears_with_one_input_share_a_site(tiny_model: Make) -> None:
    statistics = run(open_model(str(tiny_model())))
    first = statistics.find("model.layers.1.self_attn.q_proj.input")
    assert first is not None
    assert statistics.find("model.layers.1.self_attn.v_proj.input") is first
    assert statistics.find("model.layers.1.mlp.up_proj.input") is statistics.find("model.layers.1.mlp.gate_proj.input")
    assert statistics.find("lm_head.input") is statistics.find("model.norm.output")
    assert statistics.find("model.layers.9.output") is None


def test_parts_merge_to_the_whole(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    whole = run(source)
    parts = [run(source, TOKENS[a:b], first_sequence=a) for a, b in ((0, 7), (7, 40), (40, 50))]
    merged = parts[2].merge(parts[0].merge(parts[1]))
    assert merged.sequences == whole.sequences
    for name, site in whole.sites.items():
        other = merged.sites[name]
        assert (site.count, site.tokens) == (other.count, other.tokens)
        # Another batch size sums the matrix products in another order.
        np.testing.assert_allclose(other.channel_amax, site.channel_amax, rtol=1e-4)
        assert (other.mean, other.std, other.kurtosis) == pytest.approx((site.mean, site.std, site.kurtosis), rel=1e-3)
        assert [v.value for v in other.top] == pytest.approx([v.value for v in site.top], rel=1e-3)
        assert (other.top[0].sequence, other.top[0].channel) == (site.top[0].sequence, site.top[0].channel)


def test_a_value_that_is_not_finite_is_refused_by_site(tiny_model: Make) -> None:
    def explode(weight: Any) -> None:
        weight[:] = 3e38

    source = Altered(open_model(str(tiny_model())), model__layers__0__mlp__gate_proj__weight=explode)
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.gate_proj\.output"):
        run(source)


def test_a_linear_that_never_runs_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    with pytest.raises(InputRefused, match=r"up_proj\.output: saw 0 values"):
        run(open_model(str(tiny_model())))
