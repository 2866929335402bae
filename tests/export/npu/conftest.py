"""What the NPU tests share: float models, their checkpoints, and packages of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.store import stage
from qtool.quantize.export.onnx.npu.package import NpuOptions, export_npu_package

CHUNK, CONTEXT = 8, 32


def windows(count: int = 3, length: int = CONTEXT, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, length))


@pytest.fixture
def static_checkpoint(tmp_path: Path, rtn: Callable[..., Any]) -> Callable[..., QuantizedCheckpoint]:
    """static_checkpoint(model, scheme_of, input_scale=None) -> checkpoint rounded to nearest, every static input given
    this scale."""

    def make(model: Any, scheme_of: Callable[[str], Any], input_scale: float | None = None) -> QuantizedCheckpoint:
        floats = set(model.names())
        quantized = {}
        linears = [n.removesuffix(".weight") for n in model.names() if n.endswith("_proj.weight")]
        for module in [*linears, "lm_head"]:
            scheme = scheme_of(module)
            if scheme is None:
                continue
            tied = module == "lm_head" and "lm_head.weight" not in floats
            name = "model.embed_tokens.weight" if tied else f"{module}.weight"
            tensor = rtn(model.read(name), scheme)
            half = tensor.scale.half().float()
            scale = None if input_scale is None else torch.tensor(input_scale)
            quantized[module] = replace(tensor, scale=half, input_scale=scale)
            floats.discard(name)
        output = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        with stage(output) as staging:
            writer = CheckpointWriter(staging.path, model.config)
            writer.add(quantized, {name: torch.from_numpy(model.read(name)) for name in sorted(floats)})
            staging.commit(Manifest(kind="checkpoint", details=writer.details))
        return QuantizedCheckpoint(output)

    return make


@pytest.fixture(scope="session")
def npu_package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """npu_package(source, statistics=None, windows=…, **options) -> (folder, details)."""

    def make(source: Any, **given: Any) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("npu-package")
        values = {"windows": windows(), "statistics": None, "tokenizer_files": {}, "recipe_yaml": None}
        values |= {name: given.pop(name) for name in list(given) if name in values}
        options = NpuOptions(**{"chunk": CHUNK, "context": CONTEXT, **given})
        done = export_npu_package(source, folder, options=options, progress=lambda *_: None, threads=1, **values)
        return folder, done

    return make


@pytest.fixture(scope="session")
def llama(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied tiny llama as a weight source."""
    from qtool.quantize.inputs import open_model

    return open_model(str(write_model(tmp_path_factory.mktemp("npu-model") / "llama")))


@pytest.fixture(scope="session")
def llama_package(llama: Any, npu_package: Callable[..., tuple[Path, dict[str, Any]]]) -> Path:
    """The 16-bit package of that model."""
    return npu_package(llama)[0]


@pytest.fixture
def random_windows() -> Callable[..., np.ndarray]:
    """random_windows(count, length, seed) -> token ids."""
    return windows
