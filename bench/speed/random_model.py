"""A Llama of a given shape with random weights, as a Hugging Face folder and as a GGUF file: for speed, not text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# hidden, MLP, layers, heads, KV heads; vocabulary and tokenizer are SmolLM2's.
SHAPES = {"1b": (2048, 8192, 16, 32, 8), "tiny": (256, 512, 2, 4, 2)}
VOCABULARY = 49152


def config_of(shape: str) -> dict[str, Any]:
    """A config.json."""
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float16 values, the same in every run."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", _normal(0, (VOCABULARY, hidden))
    for layer in range(config["num_hidden_layers"]):
        for number, (name, shape) in enumerate(shapes.items()):
            yield f"model.layers.{layer}.{name}.weight", _normal(1 + layer * 10 + number, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", np.ones(hidden, np.float16)
    yield "model.norm.weight", np.ones(hidden, np.float16)


def write_folder(shape: str, folder: Path, tokenizer_files: Mapping[str, bytes]) -> None:
    """config.json, model.safetensors and the tokenizer."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    for name, data in tokenizer_files.items():
        (folder / name).write_bytes(data)
    config = config_of(shape)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors(config)), folder / "model.safetensors", metadata={"format": "pt"})


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(shape: str, path: Path) -> None:
    """The same weights for llama.cpp, float16, without a vocabulary."""
    import gguf

    config = config_of(shape)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    for name, values in tensors(config):
        if ".q_proj" in name or ".k_proj" in name:
            values = _interleaved(values, heads if ".q_proj" in name else kv_heads)
        writer.add_tensor(_gguf_name(name), values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[rest.removesuffix('.weight')]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama.cpp's rotary embedding: pairs side by side instead of in two halves."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return (values * 0.02).astype(np.float16)
