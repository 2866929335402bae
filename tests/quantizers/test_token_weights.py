"""Weights of calibration tokens: gradients by an independent whole-model pass, and what quantize does with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.cli.quantized import quantized
from qtool.quantize.architectures import require_quantizable
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.measure import backwards
from qtool.quantize.quantizers import token_weights
from qtool.quantize.quantizers.hessian import Hessian
from qtool.quantize.quantizers.token_weights import gradient_weights

Make = Callable[..., Path]
IDS = np.random.default_rng(5).integers(0, 64, (6, 24))


def likeliest(logits: Tensor, generator: torch.Generator) -> Tensor:
    return logits.argmax(-1)


def weights_of(source, **options):
    groups = require_quantizable(source.config).linear_groups
    return gradient_weights(source, groups, IDS, seed=0, progress=lambda *_: None, **options)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_are_norms_of_the_whole_models_gradients(
    family: str, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backwards, "_drawn", likeliest)
    source = open_model(str(tiny_model(family)))
    network = load_network(source)
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    sites = {"model.layers.0.self_attn.q_proj": "qkv", "model.layers.1.mlp.down_proj": ("down",)}
    watched = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
    ]
    for name in watched:
        network.get_submodule(name).register_forward_hook(keep(name))
    with torch.enable_grad():
        embedded = network.get_input_embeddings()(torch.from_numpy(IDS)).detach().requires_grad_()
        logits = network(inputs_embeds=embedded, use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), logits.detach().argmax(-1).flatten(), reduction="sum"
        ).backward()
    found = weights_of(source)
    for first, members in zip(sites, (watched[:3], watched[3:]), strict=True):
        squares = sum(outputs[name].grad.square().sum(-1) for name in members)
        expected = squares.sqrt().flatten()
        weights = found.of(first)
        assert weights is not None
        torch.testing.assert_close(weights, expected / expected.mean(), rtol=2e-3, atol=1e-5)
    assert found.of("lm_head") is None


def test_a_few_sequences_at_a_time_give_the_same_weights(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backwards, "_drawn", likeliest)
    source = open_model(str(tiny_model()))
    whole = weights_of(source)
    monkeypatch.setattr(token_weights, "STATES_BYTES", 1)
    pieces = weights_of(source)
    name = "model.layers.0.mlp.gate_proj"
    torch.testing.assert_close(pieces.of(name), whole.of(name), rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_from_the_prediction() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -1.0, float("-inf")]).expand(40_000, 4)
    shares = torch.bincount(backwards._drawn(logits, generator), minlength=4) / 40_000
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.01)
    assert shares[3] == 0


def test_a_weighted_hessian_counts_tokens_by_their_weight() -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(15, generator=torch.Generator().manual_seed(2))
    hessian = Hessian("x", weights)
    hessian.add(x[:2])
    hessian.add(x[2:])
    rows = x.reshape(-1, 8).double()
    torch.testing.assert_close(hessian.matrix(), rows.T @ (weights.double()[:, None] * rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_quantize_weighs_tokens_where_the_recipe_says_so(family: str, tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model(family)))
    tokens = Tokens(ids=IDS, text_sha256="0" * 64, tokenizer_sha256="0" * 64, windows=())
    codes = {}
    for kind in ("uniform", "gradient", "gradient again"):
        recipe = Recipe.preset("W4A8", token_weights=kind.split()[0], group_size=32)
        checkpoint, _ = quantized(source, recipe, tokens, tmp_path / kind, title=kind)
        codes[kind] = checkpoint.quantized("model.layers.1.self_attn.o_proj").codes
    assert torch.equal(codes["gradient"], codes["gradient again"])
    assert not torch.equal(codes["gradient"], codes["uniform"])
