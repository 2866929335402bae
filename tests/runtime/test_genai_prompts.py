"""A graph for prompts that answers by itself: onnxruntime-genai's pipeline runs both graphs as qtool's session does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qtool.errors import UsageError
from qtool.quantize.export.onnx.package import export_package
from qtool.runtime.ort import OrtSession
from qtool.runtime.reference.int8_cache import cache_scales
from qtool.runtime.session import last_logits
from qtool.runtime.verify import verify_export

OPTIONS: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": lambda *_: None}
OPTIONS |= {"last_logits": True, "prefill": "w8a8", "prefill_logits": True}
Made = tuple[Path, Any, dict[str, Any]]


@pytest.fixture(scope="session")
def made(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    checkpoint = make_checkpoint("W4A8", family="llama", group_size=32)
    folder = tmp_path_factory.mktemp("answers") / "package"
    folder.mkdir()
    return folder, checkpoint, export_package(checkpoint, folder, **OPTIONS)


def test_configuration_names_what_both_graphs_take_and_hand_out(made: Made) -> None:
    folder, _, details = made
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert model["type"] == "decoder-pipeline" and "filename" not in model["decoder"]
    stages = {name: stage for entry in model["decoder"]["pipeline"] for name, stage in entry.items()}
    asked = ("filename", "run_on_prompt", "run_on_token_gen")
    assert [stages["prompt"][key] for key in asked] == ["fill.onnx", True, False]
    assert [stages["step"][key] for key in asked] == ["model.onnx", False, True]
    for stage in stages.values():
        graph = onnx.load(folder / stage["filename"], load_external_data=False).graph
        assert {*stage["inputs"]} == {value.name for value in graph.input} - {"logits_from"}
        assert {*stage["outputs"]} == {value.name for value in graph.output}
    assert details["prefill"]["logits"]


def test_the_head_s_second_copy_counts(made: Made, tmp_path: Path) -> None:
    _, checkpoint, details = made
    (tmp_path / "without").mkdir()
    other = export_package(checkpoint, tmp_path / "without", **OPTIONS | {"prefill_logits": False})
    head = details["prefill"]["memory_bytes"] - other["prefill"]["memory_bytes"]
    rows, columns = checkpoint.config["vocab_size"], checkpoint.config["hidden_size"]
    without = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    last_layer = sum(n * (k + 8) for n, k in (checkpoint.shapes[f"model.layers.1.{leaf}"] for leaf in without))
    assert head == last_layer + rows * (columns // 32) * (16 + 8)


def test_genai_answers_what_the_session_answers(made: Made, tokens: np.ndarray) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder, prompt = made[0], tokens[0, :24]
    parameters = genai.GeneratorParams(model := genai.Model(str(folder)))
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    with OrtSession(folder, threads=1, max_length=64) as session:

        def same(logits: np.ndarray) -> None:
            np.testing.assert_allclose(generator.get_output("logits")[0, -1], logits[0], atol=1e-4)

        generator.append_tokens(prompt.astype(np.int32))
        logits = session.prefill_last(prompt[None])
        same(logits)
        token = logits.argmax(-1)
        generator.generate_next_token()
        for _ in range(5):
            assert generator.get_sequence(0)[-1] == token[0]
            generator.generate_next_token()  # runs on the token before, and takes the next
            logits = session.decode(token)
            same(logits)
            token = logits.argmax(-1)
    with OrtSession(folder, threads=1, max_length=64, fill=False) as plain:
        assert np.abs(plain.prefill_last(prompt[None])[0] - model_answer(folder, prompt)).max() > 1e-3


def model_answer(folder: Path, prompt: np.ndarray) -> np.ndarray:
    with OrtSession(folder, threads=1, max_length=64) as session:
        return last_logits(session, prompt[None])[0].copy()


def test_rows_are_what_a_prompt_that_ends_there_is_answered(made: Made, tokens: np.ndarray) -> None:
    row = tokens[:1, :40]
    with OrtSession(made[0], threads=1, max_length=64) as session:
        scored = session.prefill(row)
        for length in (2, 17, 40):
            session.reset()
            np.testing.assert_allclose(session.prefill_last(row[:, :length])[0], scored[0, length - 1], atol=1e-4)
        session.reset()
        alone = session.prefill_last(row[:, :1])[0]
        with OrtSession(made[0], threads=1, max_length=64, fill=False) as plain:
            assert np.array_equal(plain.prefill_last(row[:, :1])[0], alone)  # one token is a step


def test_verification_covers_both_graphs(made: Made, tokens: np.ndarray) -> None:
    folder, checkpoint, details = made
    result = verify_export(folder, checkpoint, details, tokens, progress=lambda *_: None, threads=1)
    assert result.passed, result.failure
    assert {check.name for check in result.checks} >= {"prompt nodes", "prompts", "genai"}
    assert any("lm_head" in name for name in details["prefill"]["nodes"])


def test_an_int8_cache_is_refused(made: Made, tokens: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(UsageError, match="one cache for both"):
        export_package(made[1], tmp_path / "p", cache_scales=cache_scales(made[1], tokens), **OPTIONS)
