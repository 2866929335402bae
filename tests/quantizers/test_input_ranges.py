"""Stored input scales: the range with the least error, of what the quantizer is really handed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.cli.quantized import quantized
from qtool.errors import InputRefused, UsageError
from qtool.kernels.quantize_activation import fake_quantize_fp8_static, fake_quantize_int8_static
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.formats import FP8_E4M3, INT8
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.quantizers.input_range import InputRange
from qtool.runtime.reference import ReferenceSession

Make = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, (8, 48))
BLOCKS = ("model.layers.0.", "model.layers.1.")


def found(x: torch.Tensor, parts: int = 3) -> InputRange:
    seen = InputRange("here")
    for part in x.chunk(parts):
        seen.add(part)
    return seen


def test_a_range_loses_less_than_the_maximum_and_nearly_the_least() -> None:
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    x[7, 3] = 60.0

    def lost(scale: float) -> float:
        return float((fake_quantize_int8_static(x, torch.tensor(scale)) - x).square().sum())

    scale = float(found(x).scale(INT8))
    best = min(lost(float(r) / 127) for r in np.geomspace(2, 60, 400))
    assert lost(scale) <= 1.02 * best
    assert lost(scale) < 0.9 * lost(60 / 127)


def test_the_range_of_even_values_is_their_maximum() -> None:
    x = torch.linspace(-3, 3, 4096).reshape(64, 64)
    assert float(found(x).scale(INT8)) == pytest.approx(3 / 127, rel=0.02)
    scale = found(x).scale(FP8_E4M3)
    assert float((fake_quantize_fp8_static(x, scale) - x).abs().max()) < 0.13


def test_nothing_but_zeros_and_what_is_not_finite() -> None:
    assert float(found(torch.zeros(4, 8)).scale(INT8)) == 1
    with pytest.raises(InputRefused, match="here"):
        found(torch.full((4, 8), torch.inf))


def build(folder: Path, source: Any, tokens: Any = TOKENS, **rule: Any) -> QuantizedCheckpoint:
    recipe = Recipe.preset("W8A8", activation="per_tensor", **rule)
    text = None if tokens is None else Tokens(ids=tokens, text_sha256="", tokenizer_sha256="", windows=())
    return quantized(source, recipe, text, folder, title="test")[0]


def logits(source: Any) -> torch.Tensor:
    with ReferenceSession(source) as session:
        return torch.from_numpy(session.prefill(TOKENS))


def loud(folder: Path) -> Path:
    """Norm gains a hundred times larger on two channels, their readers' columns a hundredth: the same function."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for prefix in BLOCKS:
        for norm, readers in (("input_layernorm", "qkv"), ("post_attention_layernorm", ("gate", "up"))):
            tensors[f"{prefix}{norm}.weight"][[3, 40]] *= 100
            part = "self_attn" if readers == "qkv" else "mlp"
            for reader in readers:
                tensors[f"{prefix}{part}.{reader}_proj.weight"][:, [3, 40]] /= 100
    save_file(tensors, file)
    return folder


@pytest.mark.parametrize("transform", [{"transform": "quad", "rank": 4}, {"transform": "hadamard"}])
def test_the_scale_is_of_the_transformed_input(transform: dict[str, Any], tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(loud(tiny_model(seed=5))))
    checkpoint = build(tmp_path / "with", source, lm_head="float", **transform)
    module = "model.layers.0.self_attn.q_proj"
    tensor = checkpoint.quantized(module)
    assert tensor.transform is not None and tensor.input_scale is not None
    rows: list[torch.Tensor] = []
    network = load_network(source)
    network.get_submodule(module).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad():
        network(torch.from_numpy(TOKENS))
    main = tensor.transform.input(rows[0])[0].abs()  # block 0 has no quantized predecessor
    assert 0.3 * float(main.max()) <= 127 * float(tensor.input_scale) <= float(main.max()) * 1.0001
    expected = logits(source)
    plain = float((logits(build(tmp_path / "plain", source, lm_head="float")) - expected).square().mean())
    ours = float((logits(checkpoint) - expected).square().mean())
    assert ours < 0.1 * plain


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_static_head_gets_the_range_of_the_last_norm(
    tied: bool, quantizer: str, tiny_model: Make, tmp_path: Path
) -> None:
    source = open_model(str(tiny_model(tied=tied)))
    checkpoint = build(tmp_path / "checkpoint", source, quantizer=quantizer)
    scale = checkpoint.quantized("lm_head").input_scale
    assert scale is not None
    with torch.no_grad():
        states = load_network(source).model(torch.from_numpy(TOKENS)).last_hidden_state
    assert 127 * float(scale) == pytest.approx(float(states.abs().max()), rel=0.3)
    expected = logits(source)
    assert float((logits(checkpoint) - expected).abs().max() / (expected.max() - expected.min())) < 0.05


def test_without_a_text_or_statistics_there_is_no_range(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="measured ranges"):
        build(tmp_path / "checkpoint", open_model(str(tiny_model())), tokens=None, quantizer="rtn")
