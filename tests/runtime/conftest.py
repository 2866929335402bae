"""A tiny model as a weight source, quantized checkpoints of it, and packages, made once per test session."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme, layer_scheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.quantizers.numerics import choose_grid, encode


class FolderSource:
    """A Hugging Face folder as a WeightSource."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors = load_file(folder / "model.safetensors")
        self.digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def names(self) -> Sequence[str]:
        return sorted(self.tensors)

    def stored_dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].numpy().copy()


def round_to_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedTensor:
    """The plainest quantizer there is; integer formats and FP8."""
    fmt, symmetric = scheme.weight.format, scheme.weight.symmetric
    n, k = weight.shape
    group = group_size_of(scheme.weight.granularity) or k
    blocks = pad(weight, (0, -k % group)).reshape(n, -1, group)
    input_scale = None
    if scheme.input is not None and not scheme.input.dynamic:
        input_scale = torch.tensor(0.02)
    if fmt.kind == "float":
        scale = blocks.abs().amax(-1) / fmt.qmax
        codes = (blocks / scale[..., None]).to(torch.float8_e4m3fn).reshape(n, -1)[:, :k]
        return QuantizedTensor(
            codes=codes.contiguous(), scale=scale, zero_point=None, input_scale=input_scale, scheme=scheme
        )
    if scheme.weight.scale != "float":
        grid = choose_grid(weight, scheme.weight, mse_clip=False)
        return QuantizedTensor(
            codes=encode(weight, grid, scheme.weight),
            scale=grid.scale,
            scale_factor=grid.factor,
            zero_point=grid.zero_point,
            input_scale=input_scale,
            scheme=scheme,
        )
    if symmetric:
        scale = blocks.abs().amax(-1) / fmt.qmax
        zero = torch.full_like(scale, fmt.zero_code)
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = (high - low) / fmt.max_code
        zero = torch.round(-low / scale)
    codes = (torch.round(blocks / scale[..., None]) + zero[..., None]).clamp(0, fmt.max_code)
    return QuantizedTensor(
        codes=codes.reshape(n, -1)[:, :k].to(torch.uint8).contiguous(),
        scale=scale,
        zero_point=None if symmetric else zero.to(torch.uint8),
        input_scale=input_scale,
        scheme=scheme,
    )


Quantizer = Callable[[str, Tensor, LayerScheme], QuantizedTensor]


def write_checkpoint(
    source: FolderSource,
    output: Path,
    schemes: Mapping[str, LayerScheme],
    quantizer: Quantizer = lambda module, weight, scheme: round_to_nearest(weight, scheme),
) -> QuantizedCheckpoint:
    """Quantize these modules of a model, keep the rest in float."""
    tied = bool(source.config["tie_word_embeddings"])
    tensor_of = {
        m: "model.embed_tokens.weight" if m == "lm_head" and tied else f"{m}.weight" for m in schemes
    }
    with stage(output) as staging:
        writer = CheckpointWriter(staging.path, source.config)
        quantized = {m: quantizer(m, source.tensors[tensor_of[m]], scheme) for m, scheme in schemes.items()}
        floats = {name: t for name, t in source.tensors.items() if name not in tensor_of.values()}
        writer.add(quantized, floats)
        staging.commit(
            Manifest(kind="checkpoint", parents=(Parent(kind="model", digest=source.digest),), details=writer.details)
        )
    return QuantizedCheckpoint(output)


def linears(source: FolderSource) -> list[str]:
    """All linear modules of a model, the head included."""
    found = [n.removesuffix(".weight") for n in source.names() if n.endswith("_proj.weight")]
    return [*found, "lm_head"]


@pytest.fixture(scope="session")
def make_source(
    tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]
) -> Callable[..., FolderSource]:
    """make_source(family, **options): a tiny model."""

    def make(family: str = "llama", **options: Any) -> FolderSource:
        folder = tmp_path_factory.mktemp("models") / "model"
        return FolderSource(write_model(folder, family, **options))

    return make


@pytest.fixture(scope="session")
def make_checkpoint(
    make_source: Callable[..., FolderSource],
    quantize_all: Callable[[FolderSource, Path, LayerScheme], QuantizedCheckpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., QuantizedCheckpoint]:
    """make_checkpoint(scheme name, family=…, **scheme options): every linear quantized."""

    def make(name: str, *, family: str = "llama", tied: bool = True, **options: Any) -> QuantizedCheckpoint:
        source = make_source(family, tied=tied)
        output = tmp_path_factory.mktemp("checkpoints") / "checkpoint"
        return quantize_all(source, output, layer_scheme(name, **options))

    return make


@pytest.fixture(scope="session")
def quantize_all() -> Callable[[FolderSource, Path, LayerScheme], QuantizedCheckpoint]:
    """quantize_all(source, output, scheme): every linear of this model."""
    return lambda source, output, scheme: write_checkpoint(source, output, dict.fromkeys(linears(source), scheme))


@pytest.fixture(scope="session")
def quantize_blocks() -> Callable[[FolderSource, Path, LayerScheme, Quantizer], QuantizedCheckpoint]:
    """quantize_blocks(source, output, scheme, quantizer): every linear but the head, by a function of a module's name,
    its weight and the scheme."""
    return lambda source, output, scheme, quantizer: write_checkpoint(
        source, output, dict.fromkeys(linears(source)[:-1], scheme), quantizer
    )


@pytest.fixture(scope="session")
def quantize_modules() -> Callable[[FolderSource, Path, Mapping[str, LayerScheme]], QuantizedCheckpoint]:
    """quantize_modules(source, output, schemes): these linears, the rest in float."""
    return write_checkpoint


@pytest.fixture(scope="session")
def round_nearest() -> Callable[[Tensor, LayerScheme], QuantizedTensor]:
    """round_nearest(weight, scheme)."""
    return round_to_nearest


@pytest.fixture(scope="session")
def export_to() -> Callable[[WeightSource, Path], dict[str, Any]]:
    """export_to(source, folder): a package that is not staged; returns the manifest's details."""
    from qtool.quantize.export.onnx.package import export_package

    def export(source: WeightSource, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        return export_package(source, folder, tokenizer_files={}, recipe_yaml=None, progress=lambda *_: None)

    return export


@pytest.fixture(scope="session")
def float_package(
    make_source: Callable[..., FolderSource],
    export_to: Callable[[WeightSource, Path], dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny float package; must not be changed."""
    folder = tmp_path_factory.mktemp("packages") / "float"
    export_to(make_source("llama"), folder)
    return folder


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Random token ids [3, 48]."""
    return np.random.default_rng(0).integers(0, 256, (3, 48), dtype=np.int64)
