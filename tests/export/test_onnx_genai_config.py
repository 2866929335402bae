"""genai_config.json: token ids, sizes and search defaults from the model's own files."""

from __future__ import annotations

from qtool.quantize.export.onnx.genai_config import genai_config

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 131072,
    "eos_token_id": 2,
}


def test_defaults_for_a_bare_config():
    data = genai_config(CONFIG, {})
    model, decoder = data["model"], data["model"]["decoder"]
    assert model["eos_token_id"] == [2] and model["pad_token_id"] == 2 and "bos_token_id" not in model
    assert model["context_length"] == 131072 and data["search"]["max_length"] == 4096
    assert decoder["head_size"] == 16 and decoder["num_key_value_heads"] == 4
    assert data["search"]["do_sample"] is False


def test_generation_config_wins():
    generation = {"eos_token_id": [5, 6], "pad_token_id": 0, "bos_token_id": 1, "top_k": 20, "top_p": None}
    data = genai_config({**CONFIG, "head_dim": 32, "num_key_value_heads": 2}, generation)
    model = data["model"]
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ([5, 6], 0, 1)
    assert model["decoder"]["head_size"] == 32 and model["decoder"]["num_key_value_heads"] == 2
    assert data["search"]["top_k"] == 20 and data["search"]["top_p"] == 1.0
