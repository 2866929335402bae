"""Losses, KL and agreement against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused
from qtool.runtime import evaluate as module
from qtool.runtime.evaluate import evaluate, evaluate_together, tokens_digest
from qtool.runtime.ort import OrtSession
from qtool.runtime.reference import ReferenceSession
from qtool.runtime.throughput import measure_throughput


class Fixed:
    """A session whose logits are given: row t follows t tokens."""

    description, max_length = "fixed", None

    def __init__(self, logits: np.ndarray) -> None:
        self._logits, self._at, self.vocab_size = logits, 0, logits.shape[-1]

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._at += tokens.shape[1]
        return self._logits[None, self._at - tokens.shape[1] : self._at]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self.prefill(tokens[:, None])[:, 0]

    def reset(self) -> None:
        self._at = 0

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 4, (48, 300)).astype(np.float32)


@pytest.mark.parametrize("chunk", [1, 1000, 2**21])
@pytest.mark.parametrize("by_decode", [False, True])
def test_definitions(
    logits: np.ndarray, tokens: np.ndarray, chunk: int, by_decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    other = logits + np.random.default_rng(1).normal(0, 0.5, logits.shape).astype(np.float32)
    found = evaluate(Fixed(logits), tokens, reference=Fixed(other), by_decode=by_decode)
    subject = torch.from_numpy(logits[:-1]).double().log_softmax(-1)
    reference = torch.from_numpy(other[:-1]).double().log_softmax(-1)
    targets = torch.from_numpy(tokens[:, 1:])
    losses = torch.stack([-subject.gather(1, row[:, None])[:, 0] for row in targets])
    kl = (reference.exp() * (reference - subject)).sum(-1)
    np.testing.assert_allclose(found.losses, losses.numpy(), rtol=1e-6)
    assert found.perplexity == pytest.approx(float(losses.mean().exp()))
    assert found.kl_nats == pytest.approx(float(kl.mean()))
    assert found.kl is not None
    assert found.kl.mean(axis=1) == pytest.approx([float(kl.mean())] * 3)
    assert found.top1_agreement == pytest.approx(float((subject.argmax(-1) == reference.argmax(-1)).double().mean()))
    top = subject.topk(16, dim=-1)
    assert np.array_equal(found.top_ids[0], top.indices.numpy())
    np.testing.assert_allclose(found.top_logprobs[0, :, :16], top.values.numpy(), rtol=1e-3)
    rest = 1 - top.values.exp().sum(-1)
    np.testing.assert_allclose(np.exp(found.top_logprobs[0, :, 16].astype(float)), rest.numpy(), rtol=1e-2)


def test_threads_change_no_number(logits: np.ndarray, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    one, three = (evaluate(Fixed(logits), tokens, reference=Fixed(logits + 1), threads=n) for n in (1, 3))
    for name in ("losses", "top_ids", "top_logprobs", "kl", "agree"):
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name))


def test_a_model_against_itself(make_source: Callable[..., Any], tokens: np.ndarray) -> None:
    with ReferenceSession(make_source()) as session:
        found = evaluate(session, tokens, reference=session)
    assert found.kl_nats == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.reference_perplexity


def test_onnx_runtime_equals_the_reference_on_a_float_model(
    make_source: Callable[..., Any], float_package: Path, tokens: np.ndarray
) -> None:
    with ReferenceSession(make_source("llama")) as reference, OrtSession(float_package, threads=1) as session:
        found = evaluate(session, tokens, reference=reference)
    assert found.kl_nats is not None and abs(found.kl_nats) < 1e-9
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-5)


def test_several_subjects_share_one_pass(logits: np.ndarray, tokens: np.ndarray) -> None:
    first, second = evaluate_together([Fixed(logits), Fixed(logits * 2)], tokens, reference=Fixed(logits))
    assert first.kl_nats == 0
    assert second.kl_nats == evaluate(Fixed(logits * 2), tokens, reference=Fixed(logits)).kl_nats


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(logits: np.ndarray, tokens: np.ndarray, bad: float) -> None:
    good = Fixed(logits.copy())
    logits[5, 7] = bad
    with pytest.raises(InputRefused, match="not finite"):
        evaluate(Fixed(logits), tokens)
    with pytest.raises(InputRefused, match="reference"):
        evaluate(good, tokens, reference=Fixed(logits))


def test_another_vocabulary_and_too_little_text_are_refused(logits: np.ndarray, tokens: np.ndarray) -> None:
    with pytest.raises(InputRefused, match="vocabulary"):
        evaluate(Fixed(logits), tokens, reference=Fixed(logits[:, :299]))
    with pytest.raises(InputRefused, match="more text"):
        evaluate(Fixed(logits), tokens[:, :1])


def test_the_digest_knows_ids_and_shape(tokens: np.ndarray) -> None:
    changed = tokens.copy()
    changed[2, 3] ^= 1
    assert len({tokens_digest(t) for t in (tokens, changed, tokens.reshape(6, 24))}) == 3


def test_throughput_counts_what_it_says(float_package: Path) -> None:
    with OrtSession(float_package, threads=1) as session:
        found = measure_throughput(session, prompt_tokens=32, decode_tokens=8, rounds=3)
    for spread in (found.prefill_tokens_per_s, found.decode_tokens_per_s):
        assert 0 < spread.low <= spread.median <= spread.high
    assert found.rounds == 3
