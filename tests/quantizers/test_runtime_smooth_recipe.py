"""Runtime Smooth asked for in a recipe: what is stored, what runs, who may see whom, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qtool.cli.quantized import quantized
from qtool.errors import InputRefused, UsageError
from qtool.kernels.quantize_activation import fake_quantize_int4
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.quantizers import pipeline
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.then_divide import ThenDivide
from qtool.runtime.reference.model import load_reference

Make = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, (4, 48))
DOWN = "model.layers.0.mlp.down_proj"


def build(folder: Path, model: Path, **rule: Any) -> QuantizedCheckpoint:
    source = open_model(str(model))
    recipe = Recipe.preset("W4A4", lm_head="float", group_size=32, **rule)
    text = Tokens(ids=TOKENS, text_sha256="", tokenizer_sha256="", windows=())
    return quantized(source, recipe, text, folder, title="test")[0]


@pytest.mark.parametrize("form", ["robust", "published"])
def test_a_request_is_smoothed_by_its_own_tokens_alone(form: str, tiny_model: Make, tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "checkpoint", tiny_model(), transform="hadamard", runtime_smooth=form)
    scheme = checkpoint.schemes[DOWN]
    assert LayerScheme.from_json(scheme.to_json()) == scheme
    linear = QuantizedLinear(checkpoint.quantized(DOWN), None)
    x = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 2, 96)
    together = linear(x)
    alone = torch.cat([linear(request.clone()) for request in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)
    assert not torch.equal(linear(x[:1, :2].clone()), together[:1, :2])  # but its tokens do see each other
    with pytest.raises(InputRefused, match="several requests"):
        linear(x.flatten(0, 1))


@pytest.mark.parametrize("form", ["robust", "published"])
def test_at_one_token_it_is_int4_per_block(form: str, tiny_model: Make, tmp_path: Path) -> None:
    tensor = build(tmp_path / "checkpoint", tiny_model(), runtime_smooth=form, activation_clip=1.0).quantized(DOWN)
    x = torch.randn(5, 1, 96, generator=torch.Generator().manual_seed(1))
    expected = fake_quantize_int4(x, group_size=32) @ tensor.dequantize().T
    torch.testing.assert_close(QuantizedLinear(tensor, None)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", [{}, {"transform": "hadamard"}, {"transform": "quad", "rank": 4}])
def test_frozen_factors_are_stored_behind_the_transform(
    transform: dict[str, Any], tiny_model: Make, tmp_path: Path
) -> None:
    model = tiny_model()
    checkpoint = build(tmp_path / "checkpoint", model, runtime_smooth="frozen", **transform)
    tensor = checkpoint.quantized(DOWN)
    stored = tensor.transform
    assert isinstance(stored, ThenDivide if transform else DivideChannels)
    division = stored.division if isinstance(stored, ThenDivide) else stored
    tiles = division.factors.reshape(-1, 32)
    assert (tiles == tiles[:, :1]).all() and len(tiles[:, 0].unique()) > 1
    weight = torch.from_numpy(open_model(str(model)).read(f"{DOWN}.weight"))
    assert float((tensor.effective() - weight).norm() / weight.norm()) < 0.2
    linear = QuantizedLinear(tensor, None)
    x = torch.randn(1, 20, 96, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.cat([linear(x[:, t : t + 1].clone()) for t in range(20)], dim=1)
    torch.testing.assert_close(linear(x), one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["robust", "published", "frozen"])
def test_calibration_runs_what_will_run(
    form: str, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[torch.Tensor] = []
    advance = pipeline.Calibration.advance

    def watch(self: Any, block: nn.Module, name: str) -> None:
        advance(self, block, name)
        outputs[:] = [torch.cat(list(self.hidden))]

    monkeypatch.setattr(pipeline.Calibration, "advance", watch)
    checkpoint = build(tmp_path / "checkpoint", tiny_model(), transform="hadamard", runtime_smooth=form)
    seen: list[torch.Tensor] = []
    network = load_reference(checkpoint)
    network.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(torch.from_numpy(TOKENS))
    torch.testing.assert_close(seen[0], outputs[0], rtol=1e-4, atol=1e-4)


def test_only_int4_inputs_per_token_in_groups_are_smoothed() -> None:
    for options in (
        {"name": "W4A8"},
        {"name": "W4A16"},
        {"name": "W4A4", "activation": "per_token_group"},
        {"name": "W4A4", "group_size": "channel"},
    ):
        with pytest.raises(UsageError, match="smooth"):
            layer_scheme(**options, runtime_smooth="robust")


def test_the_head_of_a_preset_is_not_smoothed() -> None:
    rules = Recipe.preset("W4A4", runtime_smooth="robust").rules
    assert [rule.runtime_smooth for rule in rules] == ["robust", None]


def test_experts_see_tokens_of_several_requests() -> None:
    names = ["model.layers.0.mlp.experts.3.down_proj", "model.layers.0.self_attn.q_proj"]
    with pytest.raises(UsageError, match=r"experts\.3\.down_proj"):
        Recipe.preset("W4A4", runtime_smooth="robust", lm_head="W4A4").assign(names)
    decided = Recipe.preset("W4A4", runtime_smooth="frozen", lm_head="W4A4").assign(names)
    assert all(assignment.frozen_smooth for assignment in decided.values())
