"""Tiny random models on disk, one per family, as a Hugging Face folder with a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run: a property that fails must fail for everybody, not once in a hundred builds.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 10000.0},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 10000.0, "head_dim": 16},
}
VOCABULARY = 320


def write_tiny_model(folder: Path, family: str = "llama", *, tied: bool = True, seed: int = 0, **config: Any) -> Path:
    """A random two-block model: hidden 64, 4/2 heads, MLP 96, vocabulary 320, bytes as tokens."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 257,
        "eos_token_id": 258,
        **FAMILIES[family],
        **config,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    for name in state:
        if "norm" not in name:
            state[name] = state[name] * 4 if state[name].dim() == 2 else torch.randn_like(state[name]) * 0.1
    if tied:
        state.pop("lm_head.weight")
    save_file(state, folder / "model.safetensors")
    _write_byte_tokenizer(folder)
    return folder


def _write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"})
    )


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_tiny_model` itself, for fixtures that outlive one test."""
    return write_tiny_model


@pytest.fixture
def tiny_model(tmp_path: Path) -> Callable[..., Path]:
    """A factory: tiny_model(family="llama", tied=True, seed=0, **config) writes a model folder and returns its path."""

    def make(family: str = "llama", **options: Any) -> Path:
        return write_tiny_model(tmp_path / f"model-{len(list(tmp_path.iterdir()))}", family, **options)

    return make
