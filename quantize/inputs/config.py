"""config.json, checked and reduced to the keys that decide the network.

The result is complete: every default is written out, so that no library's default decides later, and it holds
nothing that could name code, a path or the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import Architecture, architecture_of
from qtool.quantize.inputs.config_numbers import boolean, number, positive_int
from qtool.quantize.inputs.config_rope import rope_parameters

_SIZES: Mapping[str, int] = {
    "vocab_size": 2**22,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
}
MAX_HEAD_DIM = 2**13
MAX_CONTEXT = 2**27

_CODE_KEYS = (
    "auto_map",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_attn_implementation",
    "custom_pipelines",
)
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "attention_dropout", "attn_implementation", "bos_token", "eos_token", "hidden_dropout",
        "initializer_range", "is_decoder", "is_llama_config", "layer_types", "max_window_layers", "pad_token",
        "partial_rotary_factor", "pretraining_tp", "rope_interleaved", "rope_parameters", "rope_scaling", "rope_theta",
        "sliding_window", "task_specific_params", "torch_dtype", "dtype", "transformers_version", "use_cache",
        "use_sliding_window", "use_mrope", "unsloth_fixed", "unsloth_version", "transformers.js_config",
    }
)  # fmt: skip


def check_config(label: str, raw: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Validate a parsed config.json.

    Args:
        label: how messages name the file.
        raw: its content.

    Returns:
        The canonical config, and notes on what was ignored.

    Raises:
        InputRefused: an unsupported family, a missing or senseless value, an already quantized model.
    """
    row = _family(label, raw)
    config: dict[str, Any] = {"architectures": [row.head_class], "model_type": row.model_type}
    for key, at_most in _SIZES.items():
        if key not in raw:
            raise InputRefused(f"{label}: {key}", "is missing", "check the config")
        config[key] = positive_int(f"{label}: {key}", raw[key], at_most=at_most)
    config |= _attention(label, raw, row, config)
    config["hidden_act"] = _activation(label, raw)
    config["rms_norm_eps"] = number(f"{label}: rms_norm_eps", _or(raw, "rms_norm_eps", 1e-6), above=0.0, at_most=0.1)
    context = _or(raw, "max_position_embeddings", row.context_default)
    config["max_position_embeddings"] = positive_int(f"{label}: max_position_embeddings", context, at_most=MAX_CONTEXT)
    config["rope_parameters"] = rope_parameters(label, raw)
    config["tie_word_embeddings"] = boolean(f"{label}: tie_word_embeddings", _or(raw, "tie_word_embeddings", False))
    config |= _biases(label, raw, row)
    config |= _tokens(label, raw, config["vocab_size"])
    return config, _notes(label, raw, config)


def _family(label: str, raw: Mapping[str, Any]) -> Architecture:
    for key in _QUANTIZED_KEYS:
        if raw.get(key) is not None:
            raise InputRefused(f"{label}: {key}", "the model is already quantized", "give the original float model")
    row = architecture_of(raw)
    classes = _or(raw, "architectures", [row.head_class])
    if not isinstance(classes, list) or classes[:1] != [row.head_class]:
        why = f"is not a language model of type {row.model_type} ({row.head_class})"
        raise InputRefused(f"{label}: architectures = {classes!r:.80}", why, "give the causal language model")
    return row


def _attention(
    label: str, raw: Mapping[str, Any], row: Architecture, sizes: Mapping[str, int]
) -> dict[str, int | None]:
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if hidden % heads:
        why = f"is not a multiple of num_attention_heads = {heads}"
        raise InputRefused(f"{label}: hidden_size = {hidden}", why, "check the config")
    kv_heads = positive_int(
        f"{label}: num_key_value_heads", _or(raw, "num_key_value_heads", row.kv_heads_default or heads), at_most=heads
    )
    if heads % kv_heads:
        why = f"is not a multiple of num_key_value_heads = {kv_heads}"
        raise InputRefused(f"{label}: num_attention_heads = {heads}", why, "check the config")
    head_dim = positive_int(
        f"{label}: head_dim", _or(raw, "head_dim", row.head_dim_default or hidden // heads), at_most=MAX_HEAD_DIM
    )
    if head_dim % 2:
        raise InputRefused(f"{label}: head_dim = {head_dim}", "is odd, rotary positions need pairs", "check the config")
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim, **_window(label, raw, row)}


def _window(label: str, raw: Mapping[str, Any], row: Architecture) -> dict[str, int | None]:
    """The sliding window: one for all blocks, or none. Blocks that differ are refused."""
    kinds = raw.get("layer_types")
    if raw.get("use_sliding_window") or (isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)):
        raise InputRefused(f"{label}: use_sliding_window", "blocks that attend differently are not supported", "")
    if not row.windowed:
        return {}
    window = raw.get("sliding_window", row.window_default)
    if window is not None:
        window = positive_int(f"{label}: sliding_window", window, at_most=MAX_CONTEXT)
    return {"sliding_window": window}


def _activation(label: str, raw: Mapping[str, Any]) -> str:
    if _or(raw, "hidden_act", "silu") not in ("silu", "swish"):
        raise InputRefused(f"{label}: hidden_act = {raw['hidden_act']!r:.40}", "not supported", "supported: silu")
    return "silu"


def _biases(label: str, raw: Mapping[str, Any], row: Architecture) -> dict[str, bool]:
    """The bias switches of this family. One that it does not have changes nothing in its network and is dropped; bias
    tensors that the network has no place for are refused when the tensors are checked."""
    switches = {key: boolean(f"{label}: {key}", _or(raw, key, False)) for key in ("attention_bias", "mlp_bias")}
    return {key: value for key, value in switches.items() if key in row.flags}


def _tokens(label: str, raw: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """The special token ids that end, begin and pad a text; all must have a row in the embedding."""
    found: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id"):
        value = raw.get(key)
        ids = value if isinstance(value, list) else [value]
        for item in ids if value is not None else ():
            positive_int(f"{label}: {key}", item, at_least=0, at_most=vocabulary - 1)
        found[key] = None if value == [] else value
    pad = raw.get("pad_token_id")
    found["pad_token_id"] = pad if type(pad) is int and 0 <= pad < vocabulary else None
    return found


def _notes(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{label}: {key} is ignored; qtool runs no code from a model" for key in _CODE_KEYS if raw.get(key)]
    if config.get("sliding_window"):
        notes.append(f"attention reaches back {config['sliding_window']} tokens (sliding_window)")
    unknown = sorted(set(raw) - set(config) - _WITHOUT_EFFECT - set(_CODE_KEYS) - set(_QUANTIZED_KEYS) - _SWITCHES)
    if unknown:
        shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        notes.append(f"{label}: {len(unknown)} keys without meaning for {config['model_type']} are ignored ({shown})")
    return tuple(notes)


_SWITCHES = frozenset({"attention_bias", "mlp_bias"})


def _or(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value, where null means the same as an absent key."""
    value = raw.get(key)
    return default if value is None else value
