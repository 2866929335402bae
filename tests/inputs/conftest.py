"""A tiny model folder written byte by byte, without torch, so that a test can spoil any part of it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtool.quantize.architectures import tensor_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def safetensors_bytes(tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A whole safetensors file; arrays as they are, their bytes being of `dtype`."""
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of this header and data."""
    return struct.pack("<Q", len(header)) + header + data


@dataclass
class TinyFolder:
    """A model folder to be spoiled: change `config` or `tensors` and call `save`, or write into `path` directly."""

    path: Path
    config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def fill(self) -> None:
        """Random tensors for the config."""
        rng = np.random.default_rng(0)
        shapes = tensor_shapes(self.config)
        self.tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def save(self) -> None:
        self.path.mkdir(exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(self.config))
        (self.path / "model.safetensors").write_bytes(safetensors_bytes(self.tensors))
        (self.path / "tokenizer.json").write_text("{}")

    def shard(self) -> dict[str, Any]:
        """Split the weights into two shards with an index; returns the index."""
        (self.path / "model.safetensors").unlink()
        names = sorted(self.tensors)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, half in halves.items():
            (self.path / file).write_bytes(safetensors_bytes({name: self.tensors[name] for name in half}))
        index = {"metadata": {}, "weight_map": {name: file for file, half in halves.items() for name in half}}
        self.write_index(index)
        return index

    def write_index(self, index: object) -> None:
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))

    def write_weights(self, data: bytes) -> None:
        (self.path / "model.safetensors").write_bytes(data)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> TinyFolder:
    """A valid folder."""
    folder = TinyFolder(tmp_path / "model")
    folder.fill()
    folder.save()
    return folder


@pytest.fixture
def pack_safetensors() -> Callable[..., bytes]:
    """`safetensors_bytes`."""
    return safetensors_bytes


@pytest.fixture
def pack_header() -> Callable[..., bytes]:
    """`with_header`."""
    return with_header
