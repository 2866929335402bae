"""Tiny random models on disk, one per family, as a Hugging Face folder with a real tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Triton reads it when it is imported, which transformers does: tests/kernels/interpreted needs it from the start.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a property that fails must fail for everybody, not once in a hundred builds.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 10000.0},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "rope_theta": 10000.0, "head_dim": 16},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "rope_theta": 10000.0,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "rope_theta": 150000,
        "head_dim": 16,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "rope_theta": 10000.0,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "rope_theta": 10000.0, "sliding_window": None, "pad_token_id": 256},
    "opt": {
        "architectures": ["OPTForCausalLM"],
        "activation_function": "relu",
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "do_layer_norm_before": True,
    },
    "mamba": {"architectures": ["MambaForCausalLM"], "state_size": 8, "expand": 2, "intermediate_size": 128},
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"],
        "state_size": 16,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
    },
}
_ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "gemma2": ("hidden_act",),
    "gemma3_text": ("hidden_act",),
    "opt": ("intermediate_size", "num_key_value_heads", "rms_norm_eps", "hidden_act"),
    "mamba": _ATTENTION_KEYS,
    "mamba2": ("intermediate_size", *_ATTENTION_KEYS),
}
ATTENTION_ONLY = ("llama", "mistral", "qwen2", "qwen3")
STATE_SPACE = ("A_log", ".D", "dt_bias", "dt_proj.bias", "conv1d.weight")
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
    }
    values = {key: value for key, value in values.items() if key not in LEFT_OUT.get(family, ())}
    values |= {**FAMILIES[family], **config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)
    state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    for name in state:
        if family not in ATTENTION_ONLY and "norm" in name:
            state[name] = state[name] + torch.randn_like(state[name]) * 0.1
        elif "norm" not in name and not name.endswith(STATE_SPACE):
            state[name] = state[name] * 4 if state[name].dim() == 2 else torch.randn_like(state[name]) * 0.1
    if tied:
        state.pop("lm_head.weight")
    save_file(_as_stored(family, state), folder / "model.safetensors")
    _write_byte_tokenizer(folder)
    return folder


def _as_stored(family: str, state: dict[str, Any]) -> dict[str, Any]:
    """The network's tensors as the family's published checkpoints name and pack them."""
    if family not in ("mixtral", "qwen3_moe"):
        return state
    path, names = {
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    }[family]
    stored: dict[str, Any] = {}
    for name, tensor in state.items():
        block, inside, leaf = name.partition(".mlp.")
        if not inside:
            stored[name] = tensor
        elif leaf == "experts.gate_up_proj":
            for expert, rows in enumerate(tensor):
                for matrix, half in zip(names[:2], rows.chunk(2), strict=True):
                    stored[f"{block}.{path}.experts.{expert}.{matrix}.weight"] = half.clone()
        elif leaf == "experts.down_proj":
            for expert, rows in enumerate(tensor):
                stored[f"{block}.{path}.experts.{expert}.{names[2]}.weight"] = rows.clone()
        else:
            stored[f"{block}.{path}.{leaf}"] = tensor
    return stored


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


@pytest.fixture
def unpacked_parameters() -> Callable[[Any], dict[str, Any]]:
    """A network's own parameters by name, packed experts [E, …] as one nn.Linear's weight and bias for each expert."""

    def unpack(network: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, parameter in network.named_parameters():
            path, _, leaf = name.rpartition(".")
            if not path.endswith(".experts"):
                found[name] = parameter
                continue
            biased = hasattr(network.get_submodule(path), "down_proj_bias")
            for expert, one in enumerate(parameter):
                at = f"{path}.{expert}"
                if leaf.endswith("_bias"):
                    found[f"{at}.{leaf.removesuffix('_bias')}.bias"] = one
                elif biased:
                    found[f"{at}.{leaf}.weight"] = one.T
                elif leaf == "gate_up_proj":
                    middle = one.shape[0] // 2
                    found[f"{at}.gate_proj.weight"], found[f"{at}.up_proj.weight"] = one[:middle], one[middle:]
                else:
                    found[f"{at}.{leaf}.weight"] = one
        return found

    return unpack


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
