"""Each family's config against transformers' own configuration classes, and what is refused in it."""

from __future__ import annotations

from typing import Any

import pytest

from qtool.errors import InputRefused
from qtool.quantize.architectures import ARCHITECTURES
from qtool.quantize.inputs.config import check_config

NEW = [name for name, row in ARCHITECTURES.items() if not row.quantizable]
SIZES: dict[str, Any] = {
    "vocab_size": 40000,
    "hidden_size": 4096,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
}
REQUIRED: dict[str, tuple[str, ...]] = {
    "opt": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "mamba": ("vocab_size", "hidden_size", "num_hidden_layers"),
    "mamba2": ("vocab_size", "hidden_size", "num_hidden_layers"),
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"head_dim": 64, "num_experts": 16, "norm_topk_prob": True, "rope_theta": 1e6}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": 99}),
    ("mixtral", {"rope_theta": 5e5, "num_local_experts": 4, "sliding_window": 128}),
    ("gpt_oss", {"rope_theta": 5e4, "rope_scaling": YARN, "sliding_window": 64, "attention_bias": False}),
    ("gpt_oss", {"layer_types": ["full_attention"] * 8, "rope_parameters": {**YARN, "rope_theta": 3e4}}),
    ("gemma2", {"query_pre_attn_scalar": 144, "attn_logit_softcapping": None, "final_logit_softcapping": 20.0}),
    ("gemma2", {"layer_types": ["sliding_attention"] * 8, "sliding_window": 7, "rope_theta": 2e4}),
    ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR}),
    ("gemma3_text", {"rope_parameters": GEMMA3_ROPE, "layer_types": ["full_attention"] * 8}),
    ("gemma3_text", {"sliding_window_pattern": 3, "final_logit_softcapping": 30.0, "attention_bias": True}),
    ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 8, "sliding_window": 2047}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.75}}),
    ("opt", {"ffn_dim": 100, "enable_bias": False, "word_embed_proj_dim": 4096, "max_position_embeddings": 100}),
    ("mamba", {"state_size": 4, "time_step_rank": 7, "use_bias": True, "use_conv_bias": False, "expand": 3}),
    ("mamba2", {"num_heads": 64, "head_dim": 128, "n_groups": 1, "time_step_limit": [0.1, 5.0], "chunk_size": 64}),
]
# Keys that decide nothing, or that one of the two writes down and the other derives.
UNREAD = {
    "architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window_pattern",
    "_sliding_window_pattern", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "head_dim",
    "use_bidirectional_attention",
}  # fmt: skip


def raw_config(family: str, **changes: Any) -> dict[str, Any]:
    kept = {key: SIZES[key] for key in REQUIRED.get(family, tuple(SIZES))}
    return {"model_type": family, **kept, **({"ffn_dim": 96} if family == "opt" else {}), **changes}


@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in NEW), *VARIANTS])
def test_the_checked_config_means_what_transformers_reads(family: str, changes: dict[str, Any]) -> None:
    import copy

    from transformers import AutoConfig

    raw = raw_config(family, **changes)
    canonical = check_config("config.json", copy.deepcopy(raw))[0]
    ours = AutoConfig.for_model(**copy.deepcopy(canonical)).to_dict()
    theirs = AutoConfig.for_model(**copy.deepcopy(raw)).to_dict()
    if theirs.get("time_step_limit", [0, 0])[1] == float("inf"):
        theirs["time_step_limit"] = [0.0, 3.4028234663852886e38]
    for key in set(theirs) - UNREAD:
        assert ours[key] == theirs[key], key
    hard_coded = {"swiglu_alpha", "swiglu_limit"} - set(theirs)  # in older transformers
    for key in set(canonical) - UNREAD - hard_coded:
        assert canonical[key] == theirs[{"num_experts": "num_local_experts"}.get(key, key)], key


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: blocks without experts"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers = .*: blocks without experts"),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok = 5: is more than"),
    ("qwen3_moe", {"num_experts": 4, "num_local_experts": 8}, "num_experts and num_local_experts"),
    ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob = 1: is not true or false"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    ("qwen3_moe", {"num_experts": 16384}, "num_experts = 16384: in each of 8 blocks are more than any model has"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts = 0"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu': not supported"),
    ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types: is not a list of one kind for each of the 8 blocks"),
    ("gpt_oss", {"layer_types": "full_attention"}, "layer_types"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 8}, "layer_types: 'chunked_attention'"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    ("gemma2", {"sliding_window": 0}, "sliding_window = 0"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar = 0"),
    ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma3_text", {"sliding_window_pattern": "6"}, "sliding_window_pattern = '6'"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters: is not one set of parameters for"),
    ("gemma3_text", {"rope_parameters": GEMMA3_ROPE, "rope_theta": 7.0}, "rope_theta: is given twice"),
    ("gemma3_text", {"rope_parameters": GEMMA3_ROPE, "rope_local_base_freq": 7.0}, "rope_local_base_freq: is given"),
    ("gemma3_text", {"architectures": ["Gemma3ForConditionalGeneration"]}, "is not a language model"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
    ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type = 'linear': not supported"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False: norms after"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    ("opt", {"word_embed_proj_dim": 512}, "word_embed_proj_dim = 512: is not 4096, which is hidden_size"),
    ("opt", {"activation_function": "gelu"}, "activation_function = 'gelu'"),
    ("opt", {"num_attention_heads": 7}, "hidden_size = 4096: is not a multiple of num_attention_heads"),
    ("mamba", {"intermediate_size": 100}, "intermediate_size = 100: is not 8192, which is expand × hidden_size"),
    ("mamba", {"time_step_rank": "all"}, "time_step_rank = 'all'"),
    ("mamba", {"expand": 1.5}, r"expand = 1\.5: is not an integer"),
    ("mamba", {"residual_in_fp32": "yes"}, "residual_in_fp32 = 'yes'"),
    ("mamba2", {"num_heads": 100}, "num_heads = 100: times head_dim = 64"),
    ("mamba2", {"n_groups": 7}, "n_groups = 7: does not divide num_heads = 128"),
    ("mamba2", {"time_step_limit": [0.5, 0.1]}, "time_step_limit"),
    ("mamba2", {"time_step_limit": 0.5}, "time_step_limit = 0.5: is not a pair"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_a_config_the_network_would_not_compute_is_refused_by_name(
    family: str, changes: dict[str, Any], message: str
) -> None:
    check_config("config.json", raw_config(family))
    with pytest.raises(InputRefused, match=message):
        check_config("config.json", raw_config(family, **changes))


JUNK: list[Any] = [[], {}, "x", "", -1, 0, True, 1.5, 10**40, float("inf"), [None], {"rope_type": []}, {"a": [1]}]


@pytest.mark.parametrize("family", NEW)
def test_junk_in_any_key_is_accepted_or_refused_but_never_breaks(family: str) -> None:
    raw = raw_config(family)
    keys = {*check_config("config.json", raw)[0], "rope_scaling", "rope_theta", "time_step_rank", "intermediate_size"}
    for key in sorted(keys | {"word_embed_proj_dim", "sliding_window_pattern", "rope_local_base_freq"}):
        refused = 0
        for junk in JUNK:
            try:
                check_config("config.json", raw | {key: junk})
            except InputRefused:
                refused += 1
        assert refused or key not in check_config("config.json", raw)[0] or key == "pad_token_id", key


@pytest.mark.parametrize("family", NEW)
def test_every_size_that_has_no_default_is_asked_for(family: str) -> None:
    for key in [key for key in raw_config(family) if key != "model_type"]:
        raw = raw_config(family)
        del raw[key]
        with pytest.raises(InputRefused, match=f"{key}: is missing"):
            check_config("config.json", raw)


@pytest.mark.parametrize(
    ("family", "changes", "head_dim"),
    [("mixtral", {}, 128), ("gpt_oss", {}, 64), ("gemma2", {}, 256), ("qwen3_moe", {"head_dim": 96}, 96)],
)
def test_the_head_dimension_is_written_out(family: str, changes: dict[str, Any], head_dim: int) -> None:
    assert check_config("config.json", raw_config(family, **changes))[0]["head_dim"] == head_dim


def test_notes_name_the_blocks_that_see_only_a_window() -> None:
    notes = check_config("config.json", raw_config("gemma3_text", sliding_window=512))[1]
    assert notes == ("attention reaches back 512 tokens in 7 of 8 blocks (sliding_window, layer_types)",)
