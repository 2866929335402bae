"""Scales on disk: exactly what they were, in exactly the bits they cost."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qtool.errors import InputRefused
from qtool.kernels.small_floats import power_of_two
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.quantizers.numerics import choose_grid, encode

SCHEMES = {
    "fp4": layer_scheme("W4A8_FP"),
    "fp4 shift": layer_scheme("W4A8_FP", scale="shift"),
    "fp4 e8m0": layer_scheme("W4A16_FP", scale="e8m0"),
    "int4 shift": layer_scheme("W4A8_INT_FP", scale="shift", group_size=16),
    "int4 integer": layer_scheme("W4A8", scale="integer"),
    "qoq": layer_scheme("W4A8", scale="integer", symmetric=False, group_size=16),
    "mxfp4": layer_scheme("MXFP4"),
    "mxfp4 a8": layer_scheme("MXFP4A8"),
    "nvfp4": layer_scheme("NVFP4"),
}


def quantized(scheme: LayerScheme, rows: int = 6, columns: int = 75) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-3, 3, rows).unsqueeze(1)
    grid = choose_grid(weight, scheme.weight, mse_clip=True)
    return QuantizedTensor(
        codes=encode(weight, grid, scheme.weight),
        scale=grid.scale,
        scale_factor=grid.factor,
        zero_point=grid.zero_point,
        input_scale=None,
        scheme=scheme,
    )


def saved(folder: Path, tensor: QuantizedTensor) -> Path:
    with stage(folder) as staging:
        writer = CheckpointWriter(staging.path, {})
        writer.add({"model.x": tensor}, {})
        staging.commit(Manifest(kind="checkpoint", details=writer.details))
    return folder


@pytest.mark.parametrize("name", SCHEMES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    tensor = quantized(SCHEMES[name])
    folder = saved(tmp_path / "out", tensor)
    back = QuantizedCheckpoint(folder).quantized("model.x")
    assert back.scheme == tensor.scheme
    assert torch.equal(back.codes, tensor.codes) and torch.equal(back.scale, tensor.scale)
    assert (back.zero_point is None) == (tensor.zero_point is None)
    assert torch.equal(back.dequantize(), tensor.dequantize())
    again = saved(tmp_path / "again", back)
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("mxfp4", 4.25),
        ("nvfp4", 4.5 + 32 / (64 * 1024)),
        ("fp4", 4.25),
        ("fp4 e8m0", 4.125),
        ("fp4 shift", 4 + 4 / 64 + 32 / 1024),
        ("int4 shift", 4 + 4 / 16 + 32 / 1024),
        ("int4 integer", 4 + 4 / 64 + 16 / 1024),
        ("qoq", 4 + 12 / 16 + 16 / 1024),
    ],
)
def test_bits_per_weight_are_those_on_disk(tmp_path: Path, name: str, bits: float) -> None:
    tensor = quantized(SCHEMES[name], rows=64, columns=1024)
    assert tensor.stored_bits / (64 * 1024) == bits
    stored = load_file(saved(tmp_path / "out", tensor) / "tensors-00000.safetensors")
    assert sum(8 * t.numel() * t.element_size() for t in stored.values()) == tensor.stored_bits


def test_an_mxfp4_weight_is_what_the_standard_says(tmp_path: Path) -> None:
    tensor = quantized(SCHEMES["mxfp4"], columns=64)
    stored = load_file(saved(tmp_path / "out", tensor) / "tensors-00000.safetensors")
    packed = stored["model.x.codes"].numpy()
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(6, 64)
    values = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(6, 2, 32)
    scale = stored["model.x.scale_exponent"].numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal((values * scale[..., None]).reshape(6, 64), tensor.dequantize().numpy())


@pytest.mark.parametrize(
    ("name", "suffix", "broken"),
    [
        ("mxfp4", "scale_exponent", torch.tensor(255, dtype=torch.uint8)),
        ("fp4 shift", "scale_shift", torch.tensor(0xFF, dtype=torch.uint8)),
        ("fp4 shift", "scale_factor", torch.tensor(-1.0)),
        ("int4 integer", "scale_factor", torch.tensor(float("nan"))),
        ("nvfp4", "scale_e4m3", torch.tensor(0.0).to(torch.float8_e4m3fn)),
        ("nvfp4", "scale_factor", torch.tensor(float("inf"))),
    ],
)
def test_scales_that_no_kernel_can_use_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str, broken: torch.Tensor
) -> None:
    write = QuantizedTensor.to_tensors

    def breaking(self: QuantizedTensor, module: str) -> dict[str, torch.Tensor]:
        tensors = {key: tensor.clone() for key, tensor in write(self, module).items()}
        tensors[f"{module}.{suffix}"].view(-1)[0] = broken
        return tensors

    monkeypatch.setattr(QuantizedTensor, "to_tensors", breaking)
    checkpoint = QuantizedCheckpoint(saved(tmp_path / "out", quantized(SCHEMES[name])))
    with pytest.raises(InputRefused, match="finite and positive"):
        checkpoint.quantized("model.x")


@pytest.mark.parametrize("odd", [1, 2, 5])
def test_shifts_of_an_odd_number_of_groups(odd: int) -> None:
    factor = torch.tensor([[3.3], [0.7]])
    scale = factor * power_of_two(-torch.arange(2 * odd).reshape(2, odd))
    form = STORED_SCALES["shift"]
    stored = form.write(scale, factor)
    assert {name: tuple(t.shape) for name, t in stored.items()} == form.shapes(2, odd)
    back, factors = form.read(stored, odd)
    assert torch.equal(back, scale) and factors is not None and torch.equal(factors, factor)
