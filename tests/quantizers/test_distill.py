"""Distillation: its targets, its gradients, what it changes in a checkpoint, and what becomes of it when it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from qtool.cli.quantized import quantized
from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.quantizers import distill as distill_module
from qtool.quantize.quantizers.distill import FloatPredictions, distill, hold_back
from qtool.quantize.quantizers.held_out import HeldOutScores
from qtool.quantize.quantizers.trained_scales import TrainedScales
from qtool.runtime.reference import load_reference

Make = Callable[..., Path]
IDS = np.random.default_rng(5).integers(0, 64, (17, 16))
TOKENS = Tokens(ids=IDS, text_sha256="", tokenizer_sha256="", windows=())
FITTED = dataclasses.replace(TOKENS, ids=hold_back(IDS)[0])
# Coarse enough for scales to matter.
COARSE = {"quantizer": "rtn", "group_size": 32, "lm_head": "float"}


def recipe_of(scheme: str = "W4A16", **fields) -> Recipe:
    return Recipe.preset(scheme, **{**COARSE, **fields})


def checkpoint_of(source, folder: Path, recipe: Recipe) -> QuantizedCheckpoint:
    return quantized(source, recipe, TOKENS, folder, title="t")[0]


def kl_of(source, checkpoint: QuantizedCheckpoint, numbers) -> float:
    network, teacher = load_reference(checkpoint), load_network(source)
    ids = torch.from_numpy(IDS[list(numbers)])
    with torch.no_grad():
        given, found = (log_softmax(n(input_ids=ids, use_cache=False).logits, -1) for n in (teacher, network))
    return float(kl_div(found.flatten(0, 1), given.flatten(0, 1), log_target=True, reduction="batchmean"))


def loss_of(checkpoint: QuantizedCheckpoint, numbers) -> float:
    ids = torch.from_numpy(IDS[list(numbers)])
    with torch.no_grad():
        return float(load_reference(checkpoint)(input_ids=ids, labels=ids, use_cache=False).loss)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mixtral", "qwen3_moe"])
def test_predictions_are_those_of_the_whole_float_model(family: str, tiny_model: Make) -> None:
    source = open_model(str(tiny_model(family)))
    predictions, network = FloatPredictions(source, IDS[:3]), load_network(source)
    for number in (2, 0, 1):
        with torch.no_grad():
            wanted = log_softmax(network(input_ids=torch.from_numpy(IDS[number : number + 1])).logits, -1)
        torch.testing.assert_close(predictions.of(number), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_of_scales_are_those_of_finite_differences(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama")))
    checkpoint = checkpoint_of(source, tmp_path / "c", recipe_of())
    network, name = load_reference(checkpoint).requires_grad_(False), "model.layers.1.mlp.up_proj"
    linear, tensor = network.get_submodule(name), checkpoint.quantized(name)
    trained = TrainedScales(linear, tensor)
    target, ids = torch.randn(17, 16, 320, generator=torch.Generator().manual_seed(0)), torch.from_numpy(IDS)

    def loss() -> torch.Tensor:
        return (network(input_ids=ids, use_cache=False).logits * target).sum()

    loss().backward()
    assert trained.shifts is not None and trained.shifts.grad is not None and linear.weight.grad is None
    exact = linear.weight.data.clone()
    for row, group in ((0, 0), (5, 1)):
        moved = []
        for step in (1e-2, -1e-2):
            linear.weight.data = exact.clone()
            linear.weight.data[row, 32 * group : 32 * group + 32] *= np.exp(step)
            with torch.no_grad():
                moved.append(float(loss()))
        assert float(trained.shifts.grad[row, group]) == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=0.02, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"scheme": "W4A16"},
        {"scheme": "W4A8", "activation": "per_token", "transform": "quad", "rank": 4},
        {"scheme": "W4A8", "activation": "per_token", "low_rank": 4},
        {"scheme": "FP8_DYNAMIC", "group_size": "channel"},
        {"scheme": "W4A16", "kv": {"format": "int8"}},
    ],
    ids=["W4A16", "QUAD", "low rank", "FP8", "KV INT8"],
)
def test_distilled_checkpoints_predict_better_and_keep_their_codes(
    fields: dict, tiny_model: Make, tmp_path: Path
) -> None:
    source = open_model(str(tiny_model("llama")))
    plain, _ = quantized(source, recipe_of(**fields), FITTED, tmp_path / "plain", title="t")
    better, report = quantized(
        source, recipe_of(**fields, distill={"epochs": 3, "batch": 2}), TOKENS, tmp_path / "better", title="t"
    )
    assert report.distilled is not None and report.distilled.epoch > 0
    assert report.distilled.kl_after < report.distilled.kl_before
    held = (0, 8, 16)
    assert kl_of(source, plain, held) == pytest.approx(report.distilled.kl_before, rel=1e-3)
    assert loss_of(plain, held) == pytest.approx(report.distilled.loss_before, rel=1e-3)
    assert loss_of(better, held) == pytest.approx(report.distilled.loss_after, rel=1e-3)
    # What is stored is what was measured, but for the rounding of 16-bit products.
    assert kl_of(source, better, held) == pytest.approx(report.distilled.kl_after, rel=1e-2)
    changed = 0
    for module in plain.schemes:
        before, after = plain.quantized(module), better.quantized(module)
        assert torch.equal(before.codes.view(torch.uint8), after.codes.view(torch.uint8))
        assert before.stored_bits == after.stored_bits
        changed += not torch.equal(before.scale, after.scale)
        for name in ("side", "low_rank"):
            assert (getattr(before, name) is None) == (getattr(after, name) is None)
        if before.side is not None:
            assert not torch.equal(before.side, after.side)
    assert changed > len(plain.schemes) / 2


def test_a_tied_head_and_its_embedding_stay_one(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama", tied=True)))
    recipe = recipe_of(lm_head="W4A16", distill={"epochs": 2, "batch": 4})
    checkpoint, report = quantized(source, recipe, TOKENS, tmp_path / "c", title="t")
    assert report.distilled is not None
    assert kl_of(source, checkpoint, (0, 8, 16)) == pytest.approx(report.distilled.kl_after, rel=1e-3)


def test_nothing_changes_when_nothing_helps(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(tiny_model("llama")))
    fields = {"scheme": "W4A8", "activation": "per_token", "transform": "quad", "rank": 4}
    plain = checkpoint_of(source, tmp_path / "plain", recipe_of(**fields))
    before = {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.safetensors")}
    network = load_reference(plain)
    tensors = {module: plain.quantized(module) for module in plain.schemes}
    scores = iter(HeldOutScores(kl_nats=(kl, kl), losses=(3.0, 3.0)) for kl in (0.1, 0.2, 0.3))
    monkeypatch.setattr(distill_module, "_judge", lambda *_: next(scores))
    changed, result = distill(
        network, tensors, source, *hold_back(IDS), Distillation(epochs=2, rate=0.1), seed=0, progress=lambda *_: None
    )
    assert changed == {} and result.epoch == 0
    assert result.kl_after == result.kl_before == 0.1 and result.loss_after == result.loss_before == 3.0
    for name, tensor in tensors.items():
        assert torch.equal(network.get_submodule(name).weight, tensor.dequantize())
        assert network.get_submodule(name).side is tensor.side
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*.safetensors")}


def test_the_same_run_gives_the_same_bytes(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama")))
    recipe = recipe_of("W4A8", activation="per_token", transform="quad", rank=4, distill={"epochs": 2})
    files = []
    for name in ("a", "b"):
        checkpoint_of(source, tmp_path / name, recipe)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()})
    assert files[0] == files[1]


def test_one_sequence_in_eight_is_held_back_from_everything() -> None:
    fitted, judged = hold_back(IDS)
    assert np.array_equal(judged, IDS[[0, 8, 16]])
    assert np.array_equal(fitted, IDS[[n for n in range(17) if n not in (0, 8, 16)]])
    with pytest.raises(UsageError, match="two calibration sequences"):
        hold_back(IDS[:1])


def test_the_quantizers_do_not_see_what_is_judged(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(tiny_model("llama")))
    monkeypatch.setattr(distill_module, "distill", lambda *_, **__: ({}, None))
    fields = {"quantizer": "gptq", "token_weights": "gradient"}
    distilled = checkpoint_of(source, tmp_path / "a", recipe_of(**fields, distill={}))
    alone = quantized(source, recipe_of(**fields), FITTED, tmp_path / "b", title="t")[0]
    whole = checkpoint_of(source, tmp_path / "c", recipe_of(**fields))
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(distilled.quantized(name).codes, alone.quantized(name).codes)
    assert not torch.equal(distilled.quantized(name).codes, whole.quantized(name).codes)


def test_scales_that_are_no_plain_numbers_are_left_alone(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama")))
    with pytest.raises(UsageError, match="nothing to train"):
        quantized(source, recipe_of("W4A16", scale="e8m0", distill={}), TOKENS, tmp_path / "c", title="t")
