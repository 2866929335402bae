"""Outliers planted in a tiny model of every family, at places that the findings must name exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qtool.quantize.architectures import ARCHITECTURES, architecture_of
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import Text, measure
from qtool.quantize.measure.analysis import Findings, analyse

TOKEN, CHANNEL, LOUD, INNER = 90, 37, 12, 11
MASSIVE, GAIN = 50000.0, 60.0

# The norm whose gain makes channel LOUD loud, the site that reads it; and, of the last block, tensors, the index of
# what makes one inner channel loud, and the sites whose channel INNER must be found.
_GATED = (("mlp.up_proj.weight",), INNER, ("mlp.down_proj.input",))
NORM: dict[str, tuple[str, str]] = {
    "opt": ("self_attn_layer_norm", "self_attn.q_proj.input"),
    "phi3": ("input_layernorm", "self_attn.qkv_proj.input"),
    "mamba": ("norm", "mixer.in_proj.input"),
    "mamba2": ("norm", "mixer.in_proj.input"),
}
_NORM_OF_EXPERTS = ("post_attention_layernorm.weight",)


def _experts(linear: str) -> tuple[str, ...]:
    return tuple(f"mlp.experts.{expert}.{linear}.input" for expert in range(4))


INSIDE: dict[str, tuple[tuple[str, ...], Any, tuple[str, ...]]] = {
    "phi3": (("mlp.gate_up_proj.weight",), 96 + INNER, ("mlp.down_proj.input",)),
    "opt": (("fc1.weight",), INNER, ("fc2.input",)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (_NORM_OF_EXPERTS, INNER, _experts("gate_proj"))),
    "gpt_oss": (_NORM_OF_EXPERTS, INNER, _experts("gate_up_proj")),
    "mamba": (("mixer.in_proj.weight",), INNER, ("mixer.x_proj.input",)),
    "mamba2": (("mixer.in_proj.weight",), 128 + INNER, ("mixer.x",)),
}


def planted(folder: Path, family: str) -> None:
    """Make channel CHANNEL of token TOKEN massive, channel LOUD of the first norm loud, and one inner channel."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    spine = ARCHITECTURES[family].spine
    tensors[f"{spine.embedding}.weight"][TOKEN, CHANNEL] = MASSIVE
    norm, _ = NORM.get(family, ("input_layernorm", ""))
    tensors[f"{spine.blocks}.0.{norm}.weight"][LOUD] = GAIN
    names, index, _ = INSIDE.get(family, _GATED)
    for name in names:
        tensors[f"{spine.blocks}.1.{name}"][index] *= 40
    if family == "mamba":  # its random mixers drown any outlier
        for block in range(2):
            tensors[f"{spine.blocks}.{block}.mixer.out_proj.weight"] *= 1e-9
    save_file(tensors, file)


def text_with(token: int) -> Text:
    ids = np.random.default_rng(1).integers(0, 80, (6, 48))
    for sequence, position in ((0, 0), (2, 17), (5, 47)):
        ids[sequence, position] = token
    return Text(ids=ids, domains=("one", "two"), domain_of=np.array([0, 0, 0, 1, 1, 1]), sha256="0" * 64)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_planted_outliers_are_named_exactly(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    planted(folder, family)
    source, text = open_model(str(folder)), text_with(TOKEN)
    statistics = measure(source, text, progress=lambda *_: None).statistics
    findings = analyse(statistics, {TOKEN: "Z"})
    spine = architecture_of(source.config).spine
    check_massive(findings, [f"{spine.embedding}.output", *(f"{spine.blocks}.{i}.output" for i in (0, 1))])
    check_channels(findings, family, spine.blocks)


def check_massive(findings: Findings, streams: list[str]) -> None:
    massive = findings.massive
    places = {(peak.site, peak.sequence, peak.position, peak.channel, peak.token) for peak in massive.by_layer}
    wanted = {(site, s, p, CHANNEL, TOKEN) for site in streams for s, p in ((0, 0), (2, 17), (5, 47))}
    assert places == wanted
    assert massive.channels == ((CHANNEL, len(wanted)),)
    assert massive.texts == (("Z", len(wanted)),)
    assert (massive.first_layer, massive.last_layer) == (0, 1)
    assert {site: count for site, count in massive.by_token.items() if count} == dict.fromkeys(streams, 3)
    spikes = {row.site: row.spike_tokens for row in findings.sites}
    assert [spikes[site] for site in streams] == [3, 3, 3]


def check_channels(findings: Findings, family: str, blocks: str) -> None:
    loud = {split.site: split for split in findings.splits}
    _, reads = NORM.get(family, ("", "self_attn.q_proj.input"))
    _, _, inner = INSIDE.get(family, _GATED)
    assert loud[f"{blocks}.0.{reads}"].channels == (LOUD,)
    measured = [f"{blocks}.1.{site}" for site in inner if f"{blocks}.1.{site}" in loud]
    assert measured
    for site in measured:
        assert loud[site].channels == (INNER,), site
        spike, channel, rest = loud[site].int4
        assert channel > 0.5 > spike, site
        assert spike + channel + rest == pytest.approx(1)


def test_a_loud_value_channel_is_found_in_the_cache(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    file = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.self_attn.v_proj.weight"][5] *= 50
    tensors["model.layers.0.self_attn.k_proj.weight"][16 + 3] *= 50
    save_file(tensors, file)
    statistics = measure(open_model(str(folder)), text_with(TOKEN), progress=lambda *_: None).statistics
    cache = {entry.site: entry for entry in analyse(statistics, {}).cache}
    assert cache["model.layers.1.self_attn.v_proj.output"].channels == (5,)
    # Rotary positions turn channel 3 of a head into channels 3 and 3 + head_dim / 2.
    assert cache["model.layers.0.self_attn.k_rope"].channels == (16 + 3, 16 + 11)
    assert cache["model.layers.0.self_attn.v_proj.output"].channels == ()
