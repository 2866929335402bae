"""GGUF metadata as the config.json that the same model would have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES, Architecture
from qtool.quantize.inputs.gguf_header import GgufTensor

_ORIGINAL = "give the original model's folder"
_LLAMA3_FACTORS = (8.0, 32.0)


def gguf_architecture(label: str, metadata: Mapping[str, Any]) -> Architecture:
    """The family of a GGUF file.

    Raises:
        InputRefused: an architecture without a row; the message lists those that have one.
    """
    name = metadata.get("general.architecture")
    for row in ARCHITECTURES.values():
        if name in row.gguf_architectures:
            return row
    known = ", ".join(name for row in ARCHITECTURES.values() for name in row.gguf_architectures)
    raise InputRefused(f"{label}: general.architecture = {name!r:.60}", "not supported", f"supported: {known}")


def gguf_config(
    label: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], rope_factors: Any = None
) -> dict[str, Any]:
    """The raw config.

    Args:
        label: how messages name the file.
        metadata: the file's metadata.
        tensors: the file's tensors by GGUF name.
        rope_factors: values of `rope_freqs.weight` [head_dim / 2], when the file holds that tensor.

    Returns:
        Values not yet validated, for `check_config`.

    Raises:
        InputRefused: what GGUF can say and this reader cannot carry over: experts, partial or exotic rotary
            positions, a different number of heads per block.
    """
    row = gguf_architecture(label, metadata)
    prefix = metadata["general.architecture"]

    def get(key: str) -> Any:
        return metadata.get(f"{prefix}.{key}")

    if get("expert_count"):
        raise InputRefused(f"{label}: {prefix}.expert_count", "mixtures of experts are not supported", _ORIGINAL)
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise InputRefused(f"{label}: token_embd.weight", "is missing", _ORIGINAL)
    raw = {
        "model_type": row.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "attention_bias" in row.flags and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "mlp_bias" in row.flags and "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(raw[key], np.ndarray):
            raise InputRefused(f"{label}: {key}", "differs from block to block, which is not supported", _ORIGINAL)
    raw["rope_parameters"] = _rope(label, get, rope_factors)
    _check_heads(label, get, raw)
    return raw


def _rope(label: str, get: Any, factors: Any) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base") or 10000.0}
    kind = get("rope.scaling.type") or "none"
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    elif kind != "none":
        raise InputRefused(f"{label}: rope.scaling.type = {kind!r:.40}", "is not carried over", _ORIGINAL)
    return rope | (_llama3(label, rope["rope_theta"], factors) if factors is not None else {})


def _llama3(label: str, theta: float, factors: Any) -> dict[str, Any]:
    """GGUF keeps Llama 3's frequency scaling as its result, one divisor a frequency; find the numbers behind it."""
    for factor in _LLAMA3_FACTORS:
        if np.allclose(llama3_divisors(theta, 2 * len(factors), factor), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise InputRefused(f"{label}: rope_freqs.weight", "is not Llama 3's frequency scaling", _ORIGINAL)


def llama3_divisors(theta: float, head_dim: int, factor: float) -> Any:
    """What Llama 3's scaling divides each rotary frequency by, float64 [head_dim / 2]: 1 for wavelengths under 2048
    tokens, `factor` for those over 8192, and between them as its published interpolation has it."""
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _check_heads(label: str, get: Any, raw: Mapping[str, Any]) -> None:
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return  # check_config names the field
    head_dim = raw["head_dim"] or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key) not in (None, head_dim):
            why = f"differs from the head size {head_dim}, which is not supported"
            raise InputRefused(f"{label}: {key} = {get(key)!r:.40}", why, _ORIGINAL)
