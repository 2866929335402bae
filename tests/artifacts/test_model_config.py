"""A checkpoint's config.json."""

from __future__ import annotations

import json

import pytest

from qtool.quantize.artifacts.model_config import model_config


@pytest.mark.parametrize(
    ("given", "stored", "dtype"),
    [
        ({}, "BF16", "bfloat16"),
        ({}, "F32", "float32"),
        ({}, "Q4_1", "float32"),
        ({"torch_dtype": "float16"}, "F32", "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "F32", "bfloat16"),
        ({"dtype": None}, "F16", "float16"),
    ],
)
def test_it_names_one_dtype(given: dict[str, object], stored: str, dtype: str) -> None:
    config = json.loads(model_config({"model_type": "llama", **given}, stored))
    assert config["dtype"] == dtype
    assert "torch_dtype" not in config


def test_it_is_the_model_s_with_the_words_that_name_qtool_and_its_bytes_know_no_order() -> None:
    config = {"model_type": "llama", "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "vocab_size": 320}
    data = model_config(config, "F32")
    found = json.loads(data)
    assert found.pop("quantization_config") == {"quant_method": "qtool", "schema_version": 1}
    assert found == {**config, "dtype": "float32"}
    assert data == model_config(dict(reversed(config.items())), "F32")
    assert data.endswith(b"}\n")
    assert "quantization_config" not in config
