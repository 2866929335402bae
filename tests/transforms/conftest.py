"""Tiny models whose norms and biases are far from neutral, so that a gain folded into the wrong place shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TOKENS = torch.randint(0, 256, (2, 29), generator=torch.Generator().manual_seed(4))
WITH_BIAS = ("llama", "qwen3", "qwen3_moe", "gemma2", "gemma3_text")
STATE_SPACE_STEP = ("dt_proj.bias", "dt_bias")


def _make_wild(folder: Path) -> None:
    path = folder / "model.safetensors"
    state, generator = load_file(path), torch.Generator().manual_seed(1)
    for name in sorted(state):
        shape = state[name].shape
        if "norm" in name and name.endswith("weight"):
            signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
            state[name] = torch.exp(torch.randn(shape, generator=generator)) * signs
        elif name.endswith(("bias", "_bias")) and not name.endswith(STATE_SPACE_STEP):
            state[name] = torch.randn(shape, generator=generator)
    save_file(state, path)


@pytest.fixture(scope="session")
def wild_folder(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """wild_folder(family, tied=True, **config): a model folder with strong norm gains and biases; made once."""
    made: dict[str, Path] = {}

    def make(family: str, *, tied: bool = True, **config: Any) -> Path:
        key = f"{family} {tied} {sorted(config.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("wild") / "model"
            extra = {"attention_bias": True} if family in WITH_BIAS else {}
            write_model(folder, family, tied=tied, **{**extra, **config})
            _make_wild(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[Any], Tensor]:
    """The logits [2, 29, V] of a source's network."""
    from qtool.quantize.artifacts.network import load_network

    def logits(source: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = load_network(source)(TOKENS).logits
        return out

    return logits
