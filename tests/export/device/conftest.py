"""What the tests of GPU exports share: checkpoints with static inputs too, and their packages."""

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
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.store import stage
from qtool.quantize.export.onnx.tensorrt.package import TensorRtOptions, export_tensorrt_package

CHUNK, CONTEXT = 16, 64
INPUT_SCALES = {"int8": 0.02, "fp8_e4m3": 0.01}
SchemeOf = Callable[[str], LayerScheme | None]


@pytest.fixture
def checkpoint_of(tmp_path: Path, rtn: Callable[..., Any]) -> Callable[..., QuantizedCheckpoint]:
    """checkpoint_of(model, scheme or function of a module's name, input_scale=None), rounded to nearest."""

    def make(model: Any, scheme: LayerScheme | SchemeOf, input_scale: float | None = None) -> QuantizedCheckpoint:
        floats, quantized = set(model.names()), {}
        for module in [*(n.removesuffix(".weight") for n in model.names() if n.endswith("_proj.weight")), "lm_head"]:
            found = scheme(module) if callable(scheme) else scheme
            if found is None:
                continue
            tied = module == "lm_head" and "lm_head.weight" not in model.names()
            name = "model.embed_tokens.weight" if tied else f"{module}.weight"
            tensor = rtn(model.read(name), found)
            if found.input is not None and not found.input.dynamic:
                value = input_scale or INPUT_SCALES[found.input.format.name]
                tensor = replace(tensor, input_scale=torch.tensor(value))
            quantized[module] = tensor
            floats.discard(name)
        output = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        with stage(output) as staging:
            writer = CheckpointWriter(staging.path, model.config)
            writer.add(quantized, {name: torch.from_numpy(model.read(name)) for name in sorted(floats)})
            staging.commit(Manifest(kind="checkpoint", details=writer.details))
        return QuantizedCheckpoint(output)

    return make


@pytest.fixture
def model_of(tiny_model: Callable[..., Path]) -> Callable[..., Any]:
    """model_of(family, **config) -> weight source of a tiny model whose inputs divide into blocks of 64."""
    from qtool.quantize.inputs import open_model

    return lambda family="llama", **config: open_model(str(tiny_model(family, **{"intermediate_size": 128, **config})))


@pytest.fixture
def trt_package(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """trt_package(source, chunk=16, context=64) -> (folder, details)."""

    def make(source: Any, chunk: int = CHUNK, context: int = CONTEXT) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / f"package-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        details = export_tensorrt_package(
            source,
            folder,
            options=TensorRtOptions(chunk=chunk, context=context),
            tokenizer_files={},
            recipe_yaml=None,
            progress=lambda *_: None,
        )
        return folder, details

    return make


@pytest.fixture
def ids() -> np.ndarray:
    """Token ids [2, 40]."""
    return np.random.default_rng(3).integers(0, 256, (2, 40))
