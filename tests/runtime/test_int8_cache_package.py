"""Packages with an INT8 cache: ONNX Runtime's codes are the reference's, and verification knows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.package import export_package
from qtool.runtime import verify as verify_module
from qtool.runtime.evaluate import evaluate
from qtool.runtime.ort import OrtSession
from qtool.runtime.ort.cache_copies import PROPERTY, CacheCopies
from qtool.runtime.reference import ReferenceSession
from qtool.runtime.reference import int8_cache as module
from qtool.runtime.reference.int8_cache import StaticInt8Cache, cache_error, cache_scales
from qtool.runtime.verify import verify_export

OPTIONS: dict[str, Any] = {"tokenizer_files": {}, "recipe_yaml": None, "progress": lambda *_: None}


@pytest.fixture(scope="session")
def made(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, dict[str, Any], dict[str, np.ndarray]]:
    checkpoint = make_checkpoint("W4A16", family="qwen2", group_size=32)
    scales = cache_scales(checkpoint, tokens)
    folder = tmp_path_factory.mktemp("cache") / "package"
    folder.mkdir()
    details = export_package(checkpoint, folder, last_logits=True, cache_scales=scales, **OPTIONS)
    return folder, checkpoint, details, scales


def test_graph_keeps_codes(made: Any) -> None:
    folder, _, details, scales = made
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert {t for name, t in types.items() if name.startswith(("past", "present"))} == {onnx.TensorProto.INT8}
    assert set(scales) == {name for name in types if name.startswith("past")} and details["kv"] == "int8 per channel"
    assert all(scale.shape == (2 * 16,) and scale.dtype == np.float32 for scale in scales.values())
    onnx.checker.check_model(str(folder / "model.onnx"))


def test_the_error_of_the_codes_is_that_of_two_models(made: Any, tokens: np.ndarray) -> None:
    _, checkpoint, _, scales = made
    found = cache_error(checkpoint, scales, tokens, threads=1, progress=lambda *_: None)
    coarse = {name: 16 * scale for name, scale in scales.items()}
    worse = cache_error(checkpoint, coarse, tokens, threads=1, progress=lambda *_: None)
    assert 0 < found.kl_nats < worse.kl_nats / 20 and found.tokens == tokens[:, 1:].size
    with (
        ReferenceSession(checkpoint) as floats,
        ReferenceSession(checkpoint, new_cache=partial(StaticInt8Cache, coarse)) as codes,
    ):
        alone = evaluate(codes, tokens, reference=floats, threads=1)
    assert alone.kl_nats == worse.kl_nats and alone.reference_perplexity is not None
    assert worse.perplexity_increase == alone.perplexity / alone.reference_perplexity - 1


def test_logits_equal_the_reference_with_the_same_codes(made: Any, tokens: np.ndarray) -> None:
    folder, checkpoint, _, scales = made
    row = tokens[:1]
    with ReferenceSession(checkpoint) as floats:
        unrounded = floats.prefill(row)
    with ReferenceSession(checkpoint, new_cache=lambda config: StaticInt8Cache(scales, config)) as reference:
        wanted = reference.prefill(row)
    with OrtSession(folder, threads=1, max_length=64) as session:
        got = session.prefill(row)
        session.reset()
        first = session.prefill(row[:, :20])
        steps = np.stack([session.decode(row[:, t]).copy() for t in range(20, row.shape[1])], axis=1)
    size = np.abs(wanted - unrounded).mean()
    assert size > 1e-3  # the codes matter here
    assert np.abs(got - wanted).mean() < 0.1 * size
    assert np.abs(np.concatenate([first, steps], axis=1) - wanted).mean() < 0.1 * size


def test_scales_cover_what_was_seen(made: Any, tokens: np.ndarray) -> None:
    _, checkpoint, _, scales = made
    with ReferenceSession(checkpoint) as session:
        session.prefill(tokens)
        keys = session.cache.layers[1].keys.abs().amax(dim=(0, 2)).flatten().numpy()
    np.testing.assert_allclose(scales["past_key_values.1.key"], keys * 1.1 / 127, rtol=1e-4)


def test_codes_saturate(made: Any) -> None:
    scales = {name: np.full(8, 0.5, np.float32) for name in ("past_key_values.0.key", "past_key_values.0.value")}
    cache = StaticInt8Cache(scales, made_config())
    x = torch.tensor([0.1, 0.3, 63.4, 63.6, 200, -64, -200, 0.0]).reshape(1, 2, 1, 4)
    keys, values = cache.update(x, -x, 0)
    assert keys.flatten().tolist() == [0, 0.5, 63.5, 63.5, 63.5, -64, -64, 0]
    assert values.flatten().tolist()[4:7] == [-64, 63.5, 63.5]


def made_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=8)


def test_verification_passes_and_catches_other_scales(
    made: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")
    folder, checkpoint, details, scales = made
    quiet: dict[str, Any] = {"progress": lambda *_: None, "threads": 1}
    result = verify_export(folder, checkpoint, details, tokens, scales=scales, **quiet)
    assert result.passed, result.failure
    wrong = {name: scale * (4 if name.endswith("0.key") else 1) for name, scale in scales.items()}
    assert "model" in verify_export(folder, checkpoint, details, tokens, scales=wrong, **quiet).failure


def test_both_graphs_of_a_package_with_prompts(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "genai_generates", lambda *_: "pass")
    checkpoint = make_checkpoint("W4A8", family="llama", group_size=32)
    scales, folder = cache_scales(checkpoint, tokens), tmp_path / "package"
    folder.mkdir()
    details = export_package(checkpoint, folder, last_logits=True, prefill="w8a8", cache_scales=scales, **OPTIONS)
    with OrtSession(folder, threads=1, max_length=64) as session:
        scored = session.prefill(tokens[:1, :40])
        session.reset()
        assert np.array_equal(session.prefill_last(tokens[:1, :40])[0], scored[0, -1])
        # While tokens are decoded no floats are kept; the next prompt is read behind what the codes stand for.
        assert session._fill is not None
        assert all(floats[0, :, :39].any() for floats in session._fill.cache.values())
        for token in tokens[1, :3]:
            session.decode(np.array([token]))
        if sys.platform == "linux":
            assert not any(floats.any() for floats in session._fill.cache.values())
        session.prefill_last(tokens[2:3, :18])
        for name, scale in scales.items():
            floats, codes = session._fill.cache[name], session._model.cache[name]
            assert floats.dtype == np.float32 and codes.dtype == np.int8
            stood_for = codes[0, :, :43] * scale.reshape(2, 1, 16)
            np.testing.assert_allclose(floats[0, :, :43], stood_for, rtol=1e-6)
            rounded = np.rint(floats[0, :, 43:60] / scale.reshape(2, 1, 16)).clip(-128, 127)
            assert np.array_equal(codes[0, :, 43:60], rounded)
    quiet: dict[str, Any] = {"progress": lambda *_: None, "threads": 1}
    result = verify_export(folder, checkpoint, details, tokens, scales=scales, **quiet)
    assert result.passed, result.failure


def test_a_cache_without_scales_is_refused(made: Any) -> None:
    caches = {"past_key_values.0.key": np.zeros((1, 2, 8, 16), np.float32)}
    for properties in ({}, {PROPERTY: "{}"}, {PROPERTY: '{"past_key_values.0.key": "AAAA"}'}, {PROPERTY: "["}):
        with pytest.raises(InputRefused, match="INT8 cache"):
            CacheCopies(properties, caches, caches, lambda: None)


def test_genai_runs_it(made: Any, tokens: np.ndarray) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder, *_ = made
    with OrtSession(folder, threads=1, max_length=64) as session:
        wanted = session.prefill_last(tokens[:1, :12])
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=20)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens[0, :12].astype(np.int32))
    np.testing.assert_allclose(generator.get_output("logits")[0], wanted, atol=1e-4)
    generator.generate_next_token()


def test_what_is_not_finite_is_refused(
    make_checkpoint: Callable[..., Any], tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(ReferenceSession):
        def prefill(self, tokens: np.ndarray) -> np.ndarray:
            out = super().prefill(tokens)
            self.cache.layers[1].values = self.cache.layers[1].values * torch.nan
            return out

    monkeypatch.setattr(module, "ReferenceSession", Broken)
    with pytest.raises(InputRefused, match=r"past_key_values\.1\.value.*not finite"):
        cache_scales(make_checkpoint("W4A16", family="qwen2", group_size=32), tokens)
