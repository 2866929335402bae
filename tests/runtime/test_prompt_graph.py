"""A package with a graph that fills the cache: what is answered, what is scored, and what verification catches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.int8_weights import Int8Weights
from qtool.quantize.artifacts.manifest import Manifest, Parent
from qtool.quantize.artifacts.store import stage
from qtool.quantize.export.onnx.package import export_package
from qtool.runtime import verify as verify_module
from qtool.runtime.ort import OrtSession
from qtool.runtime.ort import session as session_module
from qtool.runtime.reference import ReferenceSession
from qtool.runtime.reference.filled import FilledReference
from qtool.runtime.session import last_logits
from qtool.runtime.verify import verify_export, verify_package

Made = tuple[Path, Any, dict[str, Any]]


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="session")
def made(make_checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    checkpoint = make_checkpoint("W4A8", family="llama", group_size=32)
    folder = tmp_path_factory.mktemp("prompts") / "package"
    folder.mkdir()
    options: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": quiet}
    return folder, checkpoint, export_package(checkpoint, folder, last_logits=True, prefill="w8a8", **options)


def test_codes_are_the_checkpoint_s_own_weights_on_a_finer_grid(made: Made) -> None:
    weights = Int8Weights(made[1])
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        stored, rounded = made[1].quantized(module).dequantize(), weights.quantized(module)
        assert (rounded.dequantize() - stored).abs().max() <= rounded.scale.max() * 0.501
        assert str(rounded.scheme) == "W8A8 per channel act per_token"
    assert weights.schemes["lm_head"] == made[1].schemes["lm_head"]


def test_file_holds_no_head_and_shares_what_the_model_has(made: Made) -> None:
    folder, _, details = made
    graph = onnx.load(folder / "fill.onnx", load_external_data=False).graph
    assert {o.name for o in graph.output} == {f"present.{i}.{x}" for i in (0, 1) for x in ("key", "value")}
    names = {node.name for node in graph.node}
    assert not any("lm_head" in name or "layers.1/mlp" in name or "layers.1/self_attn/o_proj" in name for name in names)
    places = {t.name: t.external_data[0].value for t in graph.initializer if t.external_data}
    own = {name for name, place in places.items() if place == "fill.onnx.data"}
    assert own and all(name.endswith(".int8") for name in own)
    assert places["model.embed_tokens.codes"] == places["model.rotary_emb.cos_cache"] == "model.onnx.data"
    assert details["prefill"]["data_bytes"] == (folder / "fill.onnx.data").stat().st_size


def test_every_row_scored_is_what_a_prompt_that_ends_there_is_answered(made: Made, tokens: np.ndarray) -> None:
    row = tokens[:1, :40]
    with OrtSession(made[0], threads=1, max_length=64) as session:
        scored = session.prefill(row)
        for length in (18, 30, 40):
            session.reset()
            assert np.array_equal(last_logits(session, row[:, :length])[0], scored[0, length - 1])
        decoded = session.decode(row[0, :1])[0].copy()
    with OrtSession(made[0], threads=1, max_length=64, fill=False) as plain:
        own = plain.prefill(row)
        assert not np.allclose(own[0, -1], scored[0, -1], atol=1e-4)  # the cache was filled by other weights
        assert not np.allclose(plain.decode(row[0, :1])[0], decoded, atol=1e-4)
        plain.reset()
        assert np.array_equal(plain.prefill_last(row)[0], own[0, -1])


def test_the_session_equals_the_reference(made: Made, tokens: np.ndarray) -> None:
    def answers(session: Any) -> np.ndarray:
        """Of a prompt, two steps, and more of the prompt."""
        found = [session.prefill(tokens[:1, :24])]
        found += [session.decode(tokens[:1, t])[:, None].copy() for t in (24, 25)]
        return np.concatenate([*found, session.prefill(tokens[:1, 26:36])], axis=1)

    with FilledReference(made[1]) as reference, OrtSession(made[0], threads=1, max_length=64) as session:
        wanted, got = answers(reference), answers(session)
        other = answers(reference.perturbed(1))
    with ReferenceSession(made[1]) as unfilled:
        plain = answers(unfilled)
    scale = np.abs(wanted).max()
    for part in (slice(24), slice(24, 26), slice(26, None)):
        floor = np.median(np.abs(other - wanted)[:, part])
        assert np.median(np.abs(got - wanted)[:, part]) <= max(3 * floor, 1e-4 * scale)
        assert np.median(np.abs(plain - wanted)[:, part]) > 1e-3 * scale


def test_short_prompts_do_not_pay_for_two_graphs(
    made: Made, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tokens[:1, : session_module.FILL_ABOVE]
    with OrtSession(made[0], threads=1, max_length=64) as session:
        short = session.prefill_last(row)
        with OrtSession(made[0], threads=1, max_length=64, fill=False) as plain:
            assert np.array_equal(plain.prefill_last(row), short)
        monkeypatch.setattr(session_module, "FILL_ABOVE", 1)
        session.reset()
        assert not np.array_equal(session.prefill_last(row), short)


def test_prompts_in_chunks(made: Made, tokens: np.ndarray) -> None:
    row = tokens[:1, :40]
    with OrtSession(made[0], threads=1, max_length=64) as session:
        session.prefill_last(row[:, :20])
        answer = session.prefill_last(row[:, 20:])
        with pytest.raises(UsageError, match="64"):
            session.prefill_last(row)
        session.reset()
        assert answer.shape == (1, session.vocab_size)
        assert np.corrcoef(answer[0], session.prefill_last(row)[0])[0, 1] > 0.98  # one entry less was filled


def test_verification_covers_both_graphs(
    made: Made, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")
    folder, checkpoint, details = made
    result = verify_export(folder, checkpoint, details, tokens, progress=quiet, threads=1)
    assert result.passed, result.failure
    names = ["nodes", "model", "decode", "prompt nodes", "prompts", "genai"]
    assert [check.name for check in result.checks] == names
    with stage(tmp_path / "package") as staging:
        for path in folder.iterdir():
            shutil.copy(path, staging.path)
        data = np.fromfile(staging.path / "fill.onnx.data", dtype=np.int8)
        data[5] ^= 64
        staging.commit(_manifest(checkpoint, details))
    assert verify_package(tmp_path / "package", progress=quiet, threads=1).passed
    with stage(tmp_path / "forged") as staging:
        for path in folder.iterdir():
            shutil.copy(path, staging.path)
        data.tofile(staging.path / "fill.onnx.data")
        staging.commit(_manifest(checkpoint, details))
    forged = verify_package(tmp_path / "forged", progress=quiet, threads=1)
    assert {check.name for check in forged.checks if check.outcome == "fail"} >= {"prompt nodes"}
    with stage(tmp_path / "without") as staging:
        for path in folder.iterdir():
            if path.name != "fill.onnx":
                shutil.copy(path, staging.path)
        staging.commit(_manifest(checkpoint, details))
    with pytest.raises(InputRefused, match="graph for prompts"):
        verify_package(tmp_path / "without", progress=quiet, threads=1)


def _manifest(checkpoint: Any, details: dict[str, Any]) -> Manifest:
    return Manifest(kind="package", parents=(Parent(kind="checkpoint", digest=checkpoint.digest),), details=details)


def test_refusals(made: Made, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": quiet}
    (tmp_path / "p").mkdir()
    with pytest.raises(UsageError, match="unknown"):
        export_package(made[1], tmp_path / "p", prefill="w4a4", **options)
