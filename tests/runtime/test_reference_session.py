"""The reference: equal to transformers on floats, to the scheme's arithmetic on quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.errors import UsageError
from qtool.runtime import session as session_module
from qtool.runtime.reference import ReferenceSession, load_reference
from qtool.runtime.session import last_logits


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_a_float_model_equals_transformers(
    make_source: Callable[..., Any], tokens: np.ndarray, family: str, tied: bool
) -> None:
    source = make_source(family, tied=tied)
    network = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = network(torch.from_numpy(tokens)).logits.numpy()
    with ReferenceSession(source) as session:
        np.testing.assert_allclose(session.prefill(tokens), wanted, rtol=0, atol=1e-4)


def test_prefill_in_chunks_and_decode_continue(make_checkpoint: Callable[..., Any], tokens: np.ndarray) -> None:
    with ReferenceSession(make_checkpoint("W4A16", group_size=32)) as session:
        whole = session.prefill(tokens)
        session.reset()
        parts = [session.prefill(tokens[:, :10]), session.prefill(tokens[:, 10:40])]
        parts += [session.decode(tokens[:, t])[:, None] for t in range(40, tokens.shape[1])]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=2e-4)


def test_only_chunks_of_a_long_prompt_have_logits(
    make_source: Callable[..., Any], tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 20)
    with ReferenceSession(make_source()) as session:
        last = session.prefill(tokens)[:, -1]
        session.reset()
        prefill, sizes = session.prefill, list[int]()
        monkeypatch.setattr(session, "prefill", lambda part: sizes.append(part.shape[1]) or prefill(part))
        np.testing.assert_allclose(last_logits(session, tokens), last, rtol=0, atol=2e-4)
    assert sizes == [20, 20, 8]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("W4A16", {"group_size": 64}),
        ("W4A8", {"group_size": 64, "symmetric": False}),
        ("W8A8", {}),
        ("W8A8", {"activation": "per_tensor"}),
        ("FP8_DYNAMIC", {}),
    ],
)
def test_quantized_linears_take_the_place_of_float_ones(
    make_checkpoint: Callable[..., Any], scheme: str, options: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(scheme, family="qwen2", tied=False, **options)
    network = load_reference(checkpoint)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    layer = network.get_submodule("model.layers.1.self_attn.k_proj")
    weight = torch.from_numpy(checkpoint.read("model.layers.1.self_attn.k_proj.weight"))
    bias = torch.from_numpy(checkpoint.read("model.layers.1.self_attn.k_proj.bias"))
    in_float = x @ weight.T + bias
    difference = (layer(x) - in_float).abs().max() / in_float.abs().max()
    assert difference < (1e-6 if scheme == "W4A16" else 0.1)
    assert scheme == "W4A16" or difference > 1e-4, "the input was not quantized"


def test_a_tied_quantized_head_serves_the_embedding(make_checkpoint: Callable[..., Any]) -> None:
    checkpoint = make_checkpoint("W4A8", group_size=32)
    network = load_reference(checkpoint)
    rows = checkpoint.quantized("lm_head").dequantize()
    assert torch.equal(network.model.embed_tokens(torch.arange(320)), rows)
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_the_float_weight_of_a_quantized_linear_is_never_read(
    make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint("W4A8", group_size=32)
    read, names = checkpoint.read, []
    monkeypatch.setattr(checkpoint, "read", lambda name: names.append(name) or read(name))
    load_reference(checkpoint)
    assert names and not [n for n in names if "_proj.weight" in n or "embed" in n]


def test_noise_is_seeded_and_small(make_checkpoint: Callable[..., Any], tokens: np.ndarray) -> None:
    with ReferenceSession(make_checkpoint("W4A16", group_size=32)) as session:
        quiet = session.prefill(tokens)
        one, same, other = session.perturbed(1), session.perturbed(1), session.perturbed(2)
        noisy = one.prefill(tokens)
        assert np.array_equal(noisy, same.prefill(tokens))
        assert not np.array_equal(noisy, other.prefill(tokens))
        assert 0 < np.abs(noisy - quiet).max() < 1e-2


def test_ids_outside_the_vocabulary_are_refused(make_source: Callable[..., Any]) -> None:
    with ReferenceSession(make_source()) as session, pytest.raises(UsageError, match="320"):
        session.prefill(np.array([[1, 320]]))
