"""Checkpoints: codes there and back, the names of the float model, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.quantizers.numerics import choose_grid, encode

SCHEMES: dict[str, LayerScheme] = {
    "int4": layer_scheme("W4A16", group_size=32),
    "int4 asym": layer_scheme("W4A8", group_size=32, symmetric=False),
    "int8": layer_scheme("W8A8"),
    "int8 static": layer_scheme("W8A8", activation="per_tensor"),
    "fp8": layer_scheme("FP8_DYNAMIC"),
}


def quantized(scheme: LayerScheme, rows: int = 6, columns: int = 75) -> QuantizedTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    grid = choose_grid(weight, scheme.weight, mse_clip=False)
    static = scheme.input is not None and not scheme.input.dynamic
    return QuantizedTensor(
        codes=encode(weight, grid, scheme.weight),
        scale=grid.scale,
        zero_point=grid.zero_point,
        input_scale=torch.tensor(0.25) if static else None,
        scheme=scheme,
    )


def saved(folder: Path, tensors: dict[str, QuantizedTensor], *, tied: bool = False, **edit: Any) -> Path:
    with stage(folder) as staging:
        writer = CheckpointWriter(staging.path, {"tie_word_embeddings": tied})
        writer.add(tensors, {})
        writer.add({}, {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)})
        staging.commit(Manifest(kind="checkpoint", details={**writer.details, **edit}))
    return folder


@pytest.mark.parametrize("name", SCHEMES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    tensor = quantized(SCHEMES[name])
    checkpoint = QuantizedCheckpoint(saved(tmp_path / "out", {"model.x": tensor}))
    back = checkpoint.quantized("model.x")
    assert back.scheme == tensor.scheme
    assert torch.equal(back.codes.float(), tensor.codes.float()) and torch.equal(back.scale, tensor.scale)
    assert (back.zero_point is None) == (tensor.zero_point is None)
    assert back.input_scale == tensor.input_scale
    assert np.array_equal(checkpoint.read("model.x.weight"), tensor.dequantize().numpy())
    assert checkpoint.names() == ["model.norm.weight", "model.x.weight"]
    assert checkpoint.stored_dtype("model.norm.weight") == "BF16"
    assert checkpoint.read("model.norm.weight").dtype == np.float32
    files = sum(p.stat().st_size for p in checkpoint.folder.glob("tensors-00000*"))
    assert tensor.stored_bits / 8 <= files <= tensor.stored_bits / 8 + 1000


def test_a_tied_head_stands_for_the_embedding(tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint(saved(tmp_path / "out", {"lm_head": quantized(SCHEMES["int4"])}, tied=True))
    assert checkpoint.names() == ["model.embed_tokens.weight", "model.norm.weight"]
    assert checkpoint.read("model.embed_tokens.weight").shape == (6, 75)


def test_dequantize_by_hand() -> None:
    scheme = SCHEMES["int4 asym"]
    codes = torch.tensor([[0, 15, 3] * 11], dtype=torch.uint8)  # 33 columns: groups of 32 and 1
    tensor = QuantizedTensor(
        codes=codes,
        scale=torch.tensor([[0.5, 2.0]]),
        zero_point=torch.tensor([[3, 1]], dtype=torch.uint8),
        input_scale=None,
        scheme=scheme,
    )
    assert tensor.dequantize()[0, [0, 1, 2, 32]].tolist() == [-1.5, 6.0, 0.0, 4.0]
    assert tensor.stored_bits == 8 * (17 + 4 + 2)  # scales that float16 holds take two bytes


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_no_kernel_can_use_is_refused(tmp_path: Path, value: float) -> None:
    tensor = quantized(SCHEMES["int4"])
    tensor.scale[2, 1] = value
    checkpoint = QuantizedCheckpoint(saved(tmp_path / "out", {"model.x": tensor}))
    with pytest.raises(InputRefused, match=r"model\.x\.scale"):
        checkpoint.quantized("model.x")


def test_shapes_and_names_must_match_the_manifest(tmp_path: Path) -> None:
    scheme = SCHEMES["int4"].to_json()
    wrong = {"model.x": {"scheme": scheme, "shape": [6, 80]}}
    folder = saved(tmp_path / "shape", {"model.x": quantized(SCHEMES["int4"])}, quantized=wrong)
    with pytest.raises(InputRefused, match="shapes"):
        QuantizedCheckpoint(folder).quantized("model.x")
    asymmetric = {"model.x": {"scheme": SCHEMES["int4 asym"].to_json(), "shape": [6, 75]}}
    with pytest.raises(InputRefused, match=r"model\.x\.zero_point"):
        QuantizedCheckpoint(saved(tmp_path / "zero", {"model.x": quantized(SCHEMES["int4"])}, quantized=asymmetric))
    with pytest.raises(InputRefused, match=r"model\.norm\.weight"):
        QuantizedCheckpoint(saved(tmp_path / "extra", {"model.x": quantized(SCHEMES["int4"])}, float={}))
