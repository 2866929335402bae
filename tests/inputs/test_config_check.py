"""config.json in the forms that real models have, reduced to one canonical form."""

from __future__ import annotations

from typing import Any

import pytest

from qtool.quantize.inputs.config import check_config

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def checked(**changes: Any) -> dict[str, Any]:
    return check_config("config.json", SIZES | changes)[0]


def test_defaults_are_written_out() -> None:
    config = checked()
    assert config["num_key_value_heads"] == 4 and config["head_dim"] == 16
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert config["tie_word_embeddings"] is False and config["rms_norm_eps"] == 1e-6
    assert config["max_position_embeddings"] == 2048 and config["hidden_act"] == "silu"


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"), [("mistral", 8, 4), ("qwen2", 32, 2), ("qwen3", 32, 128), ("llama", 64, 2)]
)
def test_an_absent_size_means_what_the_family_says(family: str, kv_heads: int, head_dim: int) -> None:
    config = checked(model_type=family, num_attention_heads=64, hidden_size=128 if family != "mistral" else 256)
    assert (config["num_key_value_heads"], config["head_dim"]) == (kv_heads, head_dim)


@pytest.mark.parametrize(
    "form",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500000, "factor": 4.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    ],
)
def test_rotary_parameters_of_both_styles_come_out_equal(form: dict[str, Any]) -> None:
    assert checked(**form)["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def test_llama3_scaling_keeps_its_numbers() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert checked(rope_theta=5e5, rope_scaling=scaling)["rope_parameters"] == {"rope_theta": 5e5, **scaling}


def test_several_end_tokens_and_a_meaningless_pad_token() -> None:
    config = checked(eos_token_id=[7, 8], bos_token_id=None, pad_token_id=-1)
    assert config["eos_token_id"] == [7, 8]
    assert config["bos_token_id"] is None and config["pad_token_id"] is None


def test_a_window_is_kept_where_the_family_has_one_and_dropped_where_it_is_off() -> None:
    assert checked(model_type="mistral", num_key_value_heads=4)["sliding_window"] == 4096
    assert checked(model_type="mistral", num_key_value_heads=4, sliding_window=None)["sliding_window"] is None
    off = checked(model_type="qwen2", num_key_value_heads=4, use_sliding_window=False, sliding_window=4096)
    assert "sliding_window" not in off


def test_a_bias_switch_the_family_lacks_is_dropped() -> None:
    assert "mlp_bias" not in checked(model_type="qwen3", num_key_value_heads=4, mlp_bias=False)
    assert checked(attention_bias=True)["attention_bias"] is True
