"""What INT8 activations would add to a linear's error, against the same computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.kernels.quantize_activation import fake_quantize_int8
from qtool.quantize.artifacts.accuracy_levels import open_choices
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.measure.level_errors import FROM_QUANTIZATION, FROM_STEPS, AddedError, added_errors
from qtool.quantize.transforms.block_hadamard import BlockHadamard

GROUP = 32
W4A16, W8A16 = layer_scheme("W4A16", group_size=GROUP), layer_scheme("W8A16", group_size=GROUP)
DOWN = "model.layers.1.mlp.down_proj"
IDS = np.random.default_rng(5).integers(3, 320, (3, 40))


def rounded(weight: torch.Tensor, scheme: LayerScheme, **options: Any) -> QuantizedTensor:
    qmax, zero = scheme.weight.format.qmax, scheme.weight.format.zero_code
    blocks = weight.reshape(len(weight), -1, GROUP)
    scale = blocks.abs().amax(-1) / qmax
    codes = torch.round(blocks / scale[..., None]).clamp(-qmax, qmax) + zero
    codes = codes.to(torch.uint8).reshape(weight.shape)
    return QuantizedTensor(codes=codes, scale=scale, zero_point=None, input_scale=None, scheme=scheme, **options)


class Made:
    """A tiny model's checkpoint with only some linears quantized, and the float weights they were made of."""

    def __init__(self, model: Path, output: Path, schemes: dict[str, LayerScheme], **options: Any) -> None:
        self.floats = load_file(model / "model.safetensors")
        reported = options.pop("reported", {})
        transform = options.pop("transform", None)
        around = {} if transform is None else {"transform": transform, "site": f"{DOWN}.input.hadamard"}
        quantized = {}
        for module, scheme in schemes.items():
            name = "model.embed_tokens.weight" if module == "lm_head" else f"{module}.weight"
            weight = self.floats[name] if transform is None else transform.weight(self.floats[name])[0]
            quantized[module] = rounded(weight, scheme, **around)
        taken = {"model.embed_tokens.weight" if m == "lm_head" else f"{m}.weight" for m in schemes}
        with stage(output) as staging:
            writer = CheckpointWriter(staging.path, json.loads((model / "config.json").read_text()))
            writer.add(quantized, {name: t for name, t in self.floats.items() if name not in taken})
            layers = {module: {"output_error": error} for module, error in reported.items()}
            staging.commit(Manifest(kind="checkpoint", details={**writer.details, "report": {"layers": layers}}))
        self.checkpoint = QuantizedCheckpoint(output)

    def errors(self, ids: np.ndarray = IDS) -> dict[str, AddedError]:
        choices = open_choices(self.checkpoint)
        return added_errors(self.checkpoint, choices, ids, progress=lambda *_: None)


def inputs_of(checkpoint: QuantizedCheckpoint, module: str) -> torch.Tensor:
    """What a linear reads of IDS in transformers' own network on the dequantized weights, [rows, K]."""
    from qtool.quantize.artifacts.network import load_network

    network, caught = load_network(checkpoint), []
    network.get_submodule(module).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        network(torch.from_numpy(IDS))
    return caught[0].reshape(-1, caught[0].shape[-1])


def squares(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


@pytest.mark.parametrize("scheme", [W4A16, W8A16], ids=["W4A16", "W8A16"])
@pytest.mark.parametrize("module", [DOWN, "lm_head"])
def test_added_error_and_energy_are_those_of_the_real_inputs(
    module: str, scheme: LayerScheme, tiny_model: Any, tmp_path: Path
) -> None:
    made = Made(tiny_model("llama"), tmp_path / "checkpoint", {module: scheme})
    found = made.errors()[module]
    x, weight = inputs_of(made.checkpoint, module), made.checkpoint.quantized(module).dequantize()
    assert found.energy == pytest.approx(squares(x @ weight.T), rel=1e-5)
    change = fake_quantize_int8(x, group_size=GROUP) - x
    assert found.added == pytest.approx(squares(change @ weight.T), rel=1e-3)
    assert found.weights_from == FROM_STEPS
    name = "model.embed_tokens.weight" if module == "lm_head" else f"{module}.weight"
    true = squares(x @ (weight - made.floats[name]).T)
    assert found.weights == pytest.approx(true, rel=0.15)


def test_the_report_of_quantization_counts_where_it_has_a_number(tiny_model: Any, tmp_path: Path) -> None:
    made = Made(tiny_model("llama"), tmp_path / "checkpoint", {DOWN: W4A16}, reported={DOWN: 0.25})
    found = made.errors()[DOWN]
    assert found.weights_from == FROM_QUANTIZATION
    assert found.weights == pytest.approx(0.25 * found.energy)


def test_an_outlier_in_a_block_is_seen_and_another_block_is_not_hurt(tiny_model: Any, tmp_path: Path) -> None:
    """Scales are per block: a huge channel spoils only what shares its block."""
    plain = Made(tiny_model("llama"), tmp_path / "plain", {DOWN: W4A16})
    gate = "model.layers.1.mlp.up_proj.weight"

    model = tiny_model("llama")
    weights = load_file(model / "model.safetensors")
    weights[gate][3] *= 1000  # channel 3 of what down_proj reads
    weights[f"{DOWN}.weight"][:, 3] /= 1000  # and nothing else changes
    from safetensors.torch import save_file

    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    planted = Made(model, tmp_path / "planted", {DOWN: W4A16})
    without, having = plain.errors()[DOWN], planted.errors()[DOWN]
    assert having.energy == pytest.approx(without.energy, rel=0.2)
    assert having.added > 5 * without.added


def test_behind_a_transform_its_main_part_is_measured(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    width = load_file(model / "model.safetensors")[f"{DOWN}.weight"].shape[1]
    transform = BlockHadamard.random(width, seed=3, stream="site")
    made = Made(model, tmp_path / "checkpoint", {DOWN: W4A16}, transform=transform)
    found = made.errors()[DOWN]
    main = transform.input(inputs_of(made.checkpoint, DOWN))[0]
    weight = made.checkpoint.quantized(DOWN).dequantize()
    change = fake_quantize_int8(main, group_size=GROUP) - main
    assert found.added == pytest.approx(squares(change @ weight.T), rel=1e-2)


def test_only_linears_with_a_choice_are_measured(tiny_model: Any, tmp_path: Path) -> None:
    schemes = {
        DOWN: W4A16,
        "model.layers.0.self_attn.q_proj": layer_scheme("W4A8", group_size=GROUP),
        "model.layers.0.mlp.down_proj": W8A16,
    }
    made = Made(tiny_model("llama"), tmp_path / "checkpoint", schemes)
    assert sorted(made.errors()) == ["model.layers.0.mlp.down_proj", DOWN]
