"""AQAS's and AWQ's factors for a whole model: the function stays, what is rounded loses less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.cli.quantized import quantized
from qtool.errors import UsageError
from qtool.quantize.architectures import linear_names
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.quantizers.search_rounding import search_rounding
from qtool.quantize.transforms.measured_smoothing import smooth_searched
from qtool.quantize.transforms.site_samples import site_samples
from qtool.quantize.transforms.smoothing_sites import site_name
from qtool.runtime.reference import ReferenceSession

Wild = Callable[..., Path]
TOKENS = np.random.default_rng(3).integers(0, 256, (4, 32))


def searched(source: Any, search: str, scheme: str = "W4A8", **rule: Any) -> Any:
    recipe = Recipe.preset(scheme, lm_head="float", **{"group_size": 32, "activation": "per_token", **rule})
    quantizers = search_rounding(recipe.assign(linear_names(source.config)), 0)
    return smooth_searched(source, TOKENS, quantizers, search, lambda *_: None)


@pytest.mark.parametrize("search", ["aqas", "awq"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma2", "phi3", "opt"])
def test_the_function_stays(family: str, search: str, wild_folder: Wild, logits_of: Callable[[Any], Tensor]) -> None:
    source = open_model(str(wild_folder(family)))
    smoothed = searched(source, search)
    before, after = logits_of(source), logits_of(smoothed)
    assert float((after - before).abs().max() / (before.max() - before.min())) < 1e-3
    assert smoothed.notes[-1].startswith("smoothed ")
    assert smoothed.digest != source.digest


def loud(folder: Path) -> Path:
    """Two channels of every norm a hundred times louder, their readers' columns a hundredth: the same function."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for prefix in ("model.layers.0.", "model.layers.1."):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{prefix}{norm}.weight"][[3, 40]] *= 100
            for reader in readers:
                tensors[f"{prefix}{reader}.weight"][:, [3, 40]] /= 100
    save_file(tensors, file)
    return folder


def rounded(folder: Path, source: Any, scheme: str, **rule: Any) -> QuantizedCheckpoint:
    recipe = Recipe.preset(scheme, lm_head="float", quantizer="rtn", **rule)
    text = Tokens(ids=TOKENS, text_sha256="", tokenizer_sha256="", windows=())
    return quantized(source, recipe, text, folder, title="test")[0]


def logits(source: Any) -> Tensor:
    with ReferenceSession(source) as session:
        return torch.from_numpy(session.prefill(TOKENS))


@pytest.mark.parametrize(
    ("search", "scheme", "rule"),
    [
        ("aqas", "W8A8", {"group_size": "channel", "activation": "per_tensor"}),
        ("aqas", "W4A8", {"group_size": 32, "activation": "per_token"}),
        ("awq", "W4A16", {"group_size": 32}),
    ],
)
def test_planted_outliers_are_taken_back(
    search: str, scheme: str, rule: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_model(str(loud(tiny_model(seed=7))))
    expected = logits(source)
    activation = {"activation": None} if scheme == "W4A16" else {}
    smoothed = searched(source, search, scheme, quantizer="rtn", **{**activation, **rule})
    lost = [
        float((logits(rounded(tmp_path / name, model, scheme, **rule)) - expected).square().mean())
        for name, model in (("plain", source), ("smoothed", smoothed))
    ]
    assert lost[1] < (0.2 if scheme != "W4A16" else 1.0) * lost[0]


def test_what_stays_in_float_is_not_smoothed_for(tiny_model: Callable[..., Path]) -> None:
    source = open_model(str(tiny_model()))
    mlp = searched(source, "awq", "W4A16", activation=None, ignore=["*.self_attn.*"])
    scaled = {name for name in source.names() if not np.array_equal(mlp.read(name), source.read(name))}
    assert scaled and not any("self_attn" in name or "input_layernorm" in name for name in scaled)


def test_samples_are_of_what_the_readers_read(tiny_model: Callable[..., Path]) -> None:
    source = open_model(str(tiny_model()))
    rows: dict[str, Tensor] = {}
    network = load_network(source)
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: args[0]} if args else {}))
    with torch.no_grad():
        network(torch.from_numpy(TOKENS))
    found = {site_name(sample.place): sample for sample in site_samples(source, TOKENS)}
    assert len(found) == 8
    reads = {
        "model.layers.1.input_layernorm.output": "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.down_proj.input": "model.layers.1.mlp.down_proj",
    }
    for name, reader in reads.items():
        x = rows[reader].flatten(0, 1)
        np.testing.assert_allclose(found[name].amax, x.abs().amax(dim=0).numpy(), rtol=1e-5)
        np.testing.assert_allclose(found[name].mean, x.abs().mean(dim=0).numpy(), rtol=1e-5)
        assert found[name].rows.shape == x.shape  # a short text is taken whole


def test_directions_are_not_searched_with_scales(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="quad"):
        searched(open_model(str(tiny_model())), "aqas", transform="quad")
