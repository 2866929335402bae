"""config.json, checked and reduced to the keys that decide the network.

The result is complete: every default is written out, so that no library's default decides later, and it holds
nothing that could name code, a path or the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES, Architecture, architecture_of
from qtool.quantize.architectures.settings import Size
from qtool.quantize.inputs.config_attention import MAX_CONTEXT, attention
from qtool.quantize.inputs.config_mixers import derived_sizes
from qtool.quantize.inputs.config_numbers import boolean, given_or, positive_int
from qtool.quantize.inputs.config_rope import SLIDING, rope_parameters
from qtool.quantize.inputs.config_settings import read_setting

_CODE_KEYS = (
    "auto_map",
    "trust_remote_code",
    "_attn_implementation_internal",
    "_attn_implementation",
    "custom_pipelines",
)
QUANTIZED_KEYS = ("quantization_config", "compression_config")
IMPORTED = ("gptq", "awq", "compressed-tensors")  # quant_method of folders whose codes `qtool import` keeps
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path", "attention_dropout", "attn_implementation", "bos_token", "eos_token", "hidden_dropout",
        "initializer_range", "is_decoder", "is_llama_config", "layer_types", "max_window_layers", "pad_token",
        "partial_rotary_factor", "pretraining_tp", "rope_interleaved", "rope_local_base_freq", "rope_parameters",
        "rope_scaling", "rope_theta", "sliding_window", "task_specific_params", "torch_dtype", "dtype",
        "transformers_version", "use_cache", "use_sliding_window", "use_mrope", "unsloth_fixed", "unsloth_version",
        "transformers.js_config", "_sliding_window_pattern", "activation_dropout", "cache_implementation", "dropout",
        "embd_pdrop", "hidden_act", "init_std", "initial_context_length", "layerdrop", "output_router_logits",
        "rescale_prenorm_residual", "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise",
        "time_step_init_scheme", "time_step_scale", "use_associative_scan", "use_mambapy",
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
    config |= {size.key: read_setting(label, raw, size) for size in row.sizes}
    config |= attention(label, raw, row, config)
    config |= {setting.key: read_setting(label, raw, setting) for setting in row.settings}
    config |= derived_sizes(label, raw, config)
    if row.context_default is not None:
        key = "max_position_embeddings"
        config[key] = positive_int(f"{label}: {key}", given_or(raw, key, row.context_default), at_most=MAX_CONTEXT)
    if row.attention == "rotary":
        config["rope_parameters"] = rope_parameters(label, raw, row.rope)
    tied = given_or(raw, "tie_word_embeddings", row.tied_default)
    config["tie_word_embeddings"] = boolean(f"{label}: tie_word_embeddings", tied)
    config |= _biases(label, raw, row)
    config |= _tokens(label, raw, config["vocab_size"])
    return config, _notes(label, raw, row, config)


def _family(label: str, raw: Mapping[str, Any]) -> Architecture:
    known = ARCHITECTURES.get(str(raw.get("model_type")))
    for key in QUANTIZED_KEYS:
        if raw.get(key) is not None:
            remedy = known.float_remedy if known else "give the original float model"
            if isinstance(raw[key], Mapping) and raw[key].get("quant_method") in IMPORTED:
                remedy = f"qtool import keeps its codes; else {remedy}"
            raise InputRefused(f"{label}: {key}", "the model is already quantized", remedy)
    row = architecture_of(raw)
    classes = given_or(raw, "architectures", [row.head_class])
    if not isinstance(classes, list) or classes[:1] != [row.head_class]:
        why = f"is not a language model of type {row.model_type} ({row.head_class})"
        raise InputRefused(f"{label}: architectures = {classes!r:.80}", why, "give the causal language model")
    return row


def _biases(label: str, raw: Mapping[str, Any], row: Architecture) -> dict[str, bool]:
    """The bias switches of this family. One that it does not have changes nothing in its network and is dropped; bias
    tensors that the network has no place for are refused when the tensors are checked."""
    keys = dict.fromkeys((*_SWITCHES, *row.flags))
    switches = {key: boolean(f"{label}: {key}", given_or(raw, key, key in row.flags_on)) for key in keys}
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


def _notes(label: str, raw: Mapping[str, Any], row: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [f"{label}: {key} is ignored; qtool runs no code from a model" for key in _CODE_KEYS if raw.get(key)]
    if config.get("sliding_window") and not row.full_every:
        notes.append(f"attention reaches back {config['sliding_window']} tokens (sliding_window)")
    if row.full_every and (sliding := config["layer_types"].count(SLIDING)):
        of = f"{sliding} of {config['num_hidden_layers']} blocks"
        notes.append(f"attention reaches back {config['sliding_window']} tokens in {of} (sliding_window, layer_types)")
    other_names = {name for size in row.settings if isinstance(size, Size) for name in size.other_names}
    read = {*config, *other_names, row.period_key, *_WITHOUT_EFFECT, *_CODE_KEYS, *QUANTIZED_KEYS, *_SWITCHES}
    unknown = sorted(set(raw) - read)
    if unknown:
        shown = ", ".join(unknown[:5]) + (" …" if len(unknown) > 5 else "")
        notes.append(f"{label}: {len(unknown)} keys without meaning for {config['model_type']} are ignored ({shown})")
    return tuple(notes)


_SWITCHES = ("attention_bias", "mlp_bias")
