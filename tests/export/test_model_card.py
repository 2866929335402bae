"""The model card: front matter that parses, numbers of the artifacts and no others, the same bytes twice."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from qtool.quantize.export.model_card import LAYOUT_WORDS, CardFacts, model_card

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 320,
          "torch_dtype": "float16"}  # fmt: skip
FACTS = CardFacts(
    layout="genai",
    details={
        "config": CONFIG,
        "float_modules": ["lm_head"],
        "bits_per_weight": 9.5,
        "bits_per_weight_quantized": 4.25,
        "dtype": "q4",
    },
    schemes={"model.layers.0.mlp.up_proj": "W4A16 g64", "model.layers.0.mlp.down_proj": "W8A8 g64"},
    parents=[("checkpoint", "a" * 64), ("model", "b" * 64)],
    size_bytes=12_345_678,
    verification={
        "passed": True,
        "checks": [
            {"name": "nodes", "outcome": "pass", "detail": "", "numbers": {"error": 1.5e-7}, "limits": {"error": 1e-5}}
        ],
    },
    evaluation={
        "perplexity": 30.1234,
        "sequences": 16,
        "length": 512,
        "subject": "checkpoint in the torch reference",
        "subject_digest": "c" * 64,
        "text_sha256": "d" * 64,
        "tokens_sha256": "e" * 64,
        "reference": {
            "perplexity": 28.184, "kl_nats": 0.0321, "top1_agreement": 0.912, "description": "model",
            "digest": "f" * 64,
        },
    },
    calibration_tokens=(32, 512),
    base_model="owner/name",
)  # fmt: skip


def parsed(card: bytes) -> tuple[dict, str]:
    _, head, body = card.decode().split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("layout", LAYOUT_WORDS)
def test_front_matter_parses(layout) -> None:
    head, body = parsed(model_card(replace(FACTS, layout=layout)))
    assert head["pipeline_tag"] == "text-generation" and head["base_model"] == "owner/name"
    assert head["library_name"] == LAYOUT_WORDS[layout].library and head["base_model_relation"] == "quantized"
    assert set(LAYOUT_WORDS[layout].tags) | {"w4a16", "w8a8", "qtool"} == set(head["tags"])
    assert "{" not in re.sub(r"\{ dtype: \"q4\" \}|\{ max_new_tokens: 32 \}|\{ pipeline \}", "", body)


def test_numbers_are_those_of_the_artifacts() -> None:
    _, body = parsed(model_card(FACTS))
    for words in ("| linears in W4A16 g64 | 1 |", "9.500", "4.250", "12.3 MB", "`" + "a" * 64 + "`", "30.1234",
                  "+6.88 %", "0.03210", "91.20 %", "16 sequences of 512 tokens", "32 sequences of 512 tokens",
                  "| nodes | pass | error 1.5e-07 (≤ 1e-05) |"):  # fmt: skip
        assert words in body, words


def test_what_is_not_known_is_not_said() -> None:
    bare = replace(FACTS, verification=None, evaluation=None, base_model=None, calibration_tokens=(0, 0))
    head, body = parsed(model_card(bare))
    assert "base_model" not in head and "license" not in head
    assert "--no-verify" in body and "No evaluation report was given" in body
    assert "perplexity" not in body and "calibrated" not in body


def test_packed_zero_points_load_by_dequantizing_in_transformers() -> None:
    facts = replace(FACTS, layout="compressed-tensors")
    assert "dequantize" not in model_card(facts).decode() and "torch.float16" in model_card(facts).decode()
    asymmetric = replace(facts, schemes={"lm_head": "W4A16 g64 asym"})
    assert "CompressedTensorsConfig(dequantize=True)" in model_card(asymmetric).decode()
    assert model_card(facts) == model_card(facts)
