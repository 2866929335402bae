"""genai_config.json: what onnxruntime-genai needs to know to run the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtool.quantize.artifacts.package_files import MODEL_FILE

# The KV cache is one buffer of max_length tokens, allocated before the first token: a default of the full context
# (131072 for Llama 3) would take gigabytes. Callers raise it with set_search_options(max_length=…).
DEFAULT_MAX_LENGTH = 4096

SEARCH_DEFAULTS: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    provider_options: Sequence[Mapping[str, Mapping[str, str]]] = (),
) -> dict[str, Any]:
    """The contents of genai_config.json.

    Args:
        config: the model's config.json.
        generation: its generation_config.json, or empty.
        provider_options: one entry an execution provider; none is the CPU.
    """
    eos = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    heads = config["num_attention_heads"]
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    tokens = {
        "bos_token_id": generation.get("bos_token_id", config.get("bos_token_id")),
        "eos_token_id": eos or None,
        "pad_token_id": pad if pad is not None else (eos[0] if eos else None),
    }
    context = config["max_position_embeddings"]
    return {
        "model": {
            "type": "decoder",
            **{key: value for key, value in tokens.items() if value is not None},
            "context_length": context,
            "vocab_size": config["vocab_size"],
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": list(provider_options)},
                "head_size": config.get("head_dim") or config["hidden_size"] // heads,
                "hidden_size": config["hidden_size"],
                "num_attention_heads": heads,
                "num_key_value_heads": config.get("num_key_value_heads") or heads,
                "num_hidden_layers": config["num_hidden_layers"],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            **{key: _search(generation, key, default) for key, default in SEARCH_DEFAULTS.items()},
            "max_length": min(context, DEFAULT_MAX_LENGTH),
            "past_present_share_buffer": True,
        },
    }


def as_pipeline(contents: Mapping[str, Any], prompt_file: str) -> dict[str, Any]:
    """The same configuration with a graph of its own for prompts: onnxruntime-genai runs it where it is given more than
    one token, and the model where it is given one. Both take and hand out the same values, the cache among them.

    Args:
        contents: of `genai_config`.
        prompt_file: the graph's name.
    """
    model, decoder = contents["model"], contents["model"]["decoder"]
    layers, taken, made = range(decoder["num_hidden_layers"]), decoder["inputs"], decoder["outputs"]

    def cache(names: Mapping[str, str], *templates: str) -> list[str]:
        return [names[template] % layer for layer in layers for template in templates]

    tokens = [taken["input_ids"], taken["attention_mask"]]

    def stage(file: str, *, prompt: bool) -> dict[str, Any]:
        return {
            "filename": file,
            "inputs": [*tokens, *cache(taken, "past_key_names", "past_value_names")],
            "outputs": [made["logits"], *cache(made, "present_key_names", "present_value_names")],
            "run_on_prompt": prompt,
            "run_on_token_gen": not prompt,
        }

    stages = [{"prompt": stage(prompt_file, prompt=True)}, {"step": stage(decoder["filename"], prompt=False)}]
    rest = {key: value for key, value in decoder.items() if key != "filename"}
    return {**contents, "model": {**model, "type": "decoder-pipeline", "decoder": {**rest, "pipeline": stages}}}


def _search(generation: Mapping[str, Any], key: str, default: Any) -> Any:
    value = generation.get(key)
    return default if value is None else value


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
