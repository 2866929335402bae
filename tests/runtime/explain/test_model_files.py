"""Which files a path means, and how they want to be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputRefused, UsageError
from qtool.runtime.explain import model_files


def configure(folder: Path, decoder: dict[str, Any], **model: Any) -> None:
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder, **model}}))


def test_a_builder_folder_is_loaded_as_its_configuration_says(tmp_path: Path) -> None:
    options = {"log_id": "x", "graph_optimization_level": "ORT_ENABLE_BASIC", "session.disable_quant_qdq": "1"}
    decoder = {"filename": "model.onnx", "head_size": 48, "session_options": options}
    configure(tmp_path, decoder, context_length=2048)
    (file,) = model_files(tmp_path)
    assert (file.path, file.context, file.head_size) == (tmp_path / "model.onnx", 2048, 48)
    assert file.settings.level == "basic"
    assert file.settings.config == {"session.disable_quant_qdq": "1"}
    (tmp_path / "model.onnx").touch()
    assert model_files(tmp_path / "model.onnx") == [file]
    (tmp_path / "other.onnx").touch()
    assert [found.path.name for found in model_files(tmp_path)] == ["model.onnx", "other.onnx"]
    (other,) = model_files(tmp_path / "other.onnx")
    assert (other.settings.level, dict(other.settings.config)) == ("all", {})


def test_a_pipeline_is_all_its_stages(tmp_path: Path) -> None:
    stages = [
        {"prefill": {"filename": "prefill.onnx", "session_options": {"session.x": "1"}}},
        {"decode": {"filename": "decode.onnx"}},
    ]
    configure(tmp_path, {"pipeline": stages, "session_options": {"session.y": "2"}})
    prefill, decode = model_files(tmp_path)
    assert prefill.path.name == "prefill.onnx"
    assert prefill.settings.config == {"session.x": "1", "session.y": "2"}
    assert decode.settings.config == {"session.y": "2"}


def test_a_hub_folder_is_every_variant(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in ("model_q4.onnx", "model.onnx", "model_quantized.onnx", "model.onnx_data"):
        (tmp_path / "onnx" / name).touch()
    names = [file.path.name for file in model_files(tmp_path)]
    assert names == ["model.onnx", "model_q4.onnx", "model_quantized.onnx"]


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        model_files(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"holds no \.onnx file"):
        model_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "is not an onnxruntime-genai"),
        ("{", "is not an onnxruntime-genai"),
        ('{"model": {"decoder": {}}}', "is not an onnxruntime-genai"),
        ('{"model": {"decoder": {"filename": "../model.onnx"}}}', "keep the model inside"),
    ],
)
def test_a_broken_configuration_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(text)
    with pytest.raises(InputRefused, match=words):
        model_files(tmp_path)
