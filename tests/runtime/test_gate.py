"""The gate, by simulation: noise passes, a loss of 1 % does not, and nothing passes for want of data."""

from __future__ import annotations

import base64
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from qtool.errors import InputRefused
from qtool.runtime.evaluate import Evaluation, Softmax
from qtool.runtime.gate import Limits, compare, kl_lower_bound
from qtool.runtime.paired import paired_mean, student_quantile
from qtool.runtime.report import EvaluationReport

SHA = "0" * 64
ONE_PERCENT = math.log1p(0.01)
# Per-token loss differences between two runs of one W4A8 model have a spread of about sqrt(2 × KL) = 0.09 nats.
NOISE = 0.09


def report(losses: np.ndarray, logits: np.ndarray | None = None, **changes: Any) -> EvaluationReport:
    shape = losses.shape
    if logits is None:
        logits = np.tile(np.linspace(3, 0, 40), (*shape, 1))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    flat = logprobs.reshape(-1, logits.shape[-1])
    ids, top = Softmax.of(flat, "the subject").top(flat)
    evaluation = Evaluation(
        losses=losses.astype(np.float32),
        top_ids=ids.reshape(*shape, -1),
        top_logprobs=top.reshape(*shape, -1),
        tokens_sha256=SHA,
        vocab_size=logits.shape[-1],
    )
    fields = {"subject": "x", "subject_digest": SHA, "text_sha256": SHA, "tokenizer_sha256": SHA, **changes}
    return EvaluationReport.of(evaluation, **fields)


def text_losses(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Heavy-tailed, like the losses of a language model: many near 0, some above 10."""
    return generator.gamma(0.8, 3.5, shape)


def rounding_noise(generator: np.random.Generator, losses: np.ndarray, spread: float = NOISE) -> np.ndarray:
    """Differences between two runs of one model: heavy-tailed, larger where the loss is, correlated along the text."""
    rows, columns = losses.shape
    shared = np.repeat(generator.standard_t(4, (rows, columns // 4)), 4, axis=1)
    drawn = 0.9 * generator.standard_t(4, losses.shape) + math.sqrt(1 - 0.81) * shared
    sized = drawn * np.sqrt(losses / losses.mean())
    return sized * spread / sized.std()


def with_losses(template: EvaluationReport, losses: np.ndarray) -> EvaluationReport:
    """The same report with other losses; nothing is validated, which is most of the time a report takes."""
    encoded = base64.b64encode(losses.astype("<f4").tobytes()).decode()
    return template.model_copy(update={"losses": encoded, "perplexity": float(np.exp(losses.mean()))})


def verdicts(shape: tuple[int, int], increase: float, spread: float) -> list[str]:
    template = report(np.ones(shape))
    found = []
    for seed in range(100):
        generator = np.random.default_rng(seed)
        old = text_losses(generator, shape)
        new = np.maximum(old + increase + rounding_noise(generator, old, spread), 0)
        found.append(compare(with_losses(template, old), with_losses(template, new)).rows[0].outcome)
    return found


@pytest.mark.parametrize("shape", [(8, 512), (1, 4096), (32, 128)])
def test_noise_alone_passes_a_hundred_times(shape: tuple[int, int]) -> None:
    assert verdicts(shape, 0.0, NOISE) == ["pass"] * 100


@pytest.mark.parametrize("shape", [(8, 512), (1, 4096), (32, 128)])
def test_one_percent_of_perplexity_is_caught(shape: tuple[int, int]) -> None:
    found = verdicts(shape, ONE_PERCENT, NOISE)
    assert found.count("pass") == 0
    assert found.count("regression") >= 99


def test_a_noisy_comparison_never_lets_one_percent_through() -> None:
    found = verdicts((8, 512), ONE_PERCENT, 0.4)
    assert found.count("pass") <= 2
    assert "inconclusive" in found


def test_an_identical_model_passes_and_a_better_one_too() -> None:
    old = text_losses(np.random.default_rng(0), (8, 128))
    assert compare(report(old), report(old)).passed
    assert compare(report(old), report(old * 0.9)).passed


def test_too_little_text_is_inconclusive_even_for_an_identical_model() -> None:
    old = text_losses(np.random.default_rng(0), (2, 100))
    verdict = compare(report(old), report(old))
    assert not verdict.passed
    assert {row.outcome for row in verdict.rows if row.limit is not None} == {"inconclusive"}
    assert "score more text" in verdict.remedy
    assert "perplexity inconclusive" in verdict.failure


def test_a_drift_of_the_distribution_fails_although_the_losses_stay() -> None:
    generator = np.random.default_rng(0)
    old = text_losses(generator, (8, 128))
    logits = generator.normal(0, 2, (8, 128, 300))
    near = compare(report(old, logits), report(old, logits + generator.normal(0, 0.09, logits.shape)))
    far = compare(report(old, logits), report(old, logits + generator.normal(0, 0.5, logits.shape)))
    assert near.passed
    assert not far.passed
    assert [row.metric for row in far.rows if row.outcome == "regression"] == ["kl_nats (lower bound)"]


def test_the_stored_likeliest_ids_bound_the_kl_from_below() -> None:
    generator = np.random.default_rng(1)
    losses = text_losses(generator, (4, 64))
    logits = generator.normal(0, 2.5, (4, 64, 500))
    for spread in (0.0, 0.05, 0.3, 2.0):
        moved = logits + generator.normal(0, spread, logits.shape)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        log_q = moved - np.log(np.exp(moved).sum(-1, keepdims=True))
        true = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        bound = kl_lower_bound(report(losses, logits), report(losses, moved))
        assert (bound >= 0).all()
        assert bound.mean() <= true.mean() * 1.01 + 1e-6
        assert bound.mean() >= true.mean() * 0.3 - 1e-6


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"text_sha256": "1" * 64}, "another text"),
        ({"tokenizer_sha256": "1" * 64}, "another tokenizer"),
    ],
)
def test_another_text_or_tokenizer_is_refused(changes: dict[str, str], word: str) -> None:
    old = text_losses(np.random.default_rng(0), (8, 128))
    with pytest.raises(InputRefused, match=word) as caught:
        compare(report(old), report(old, **changes))
    assert caught.value.exit_code == 3


def test_another_shape_or_vocabulary_is_refused() -> None:
    old = text_losses(np.random.default_rng(0), (8, 128))
    for other in (report(old[:4]), report(old[:, :100]), report(old, np.zeros((8, 128, 50)))):
        with pytest.raises(InputRefused, match="baseline"):
            compare(report(old), other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_never_pass(bad: float) -> None:
    old = text_losses(np.random.default_rng(0), (8, 128))
    spoiled = old.copy()
    spoiled[3, 7] = bad
    with pytest.raises(ValueError, match="validation error"):
        report(spoiled)
    # Even past the reader's checks the comparison itself must fail, on whichever side the number stands.
    good = report(old)
    broken = with_losses(good, spoiled)
    with np.errstate(invalid="ignore"):
        assert not compare(good, broken).passed
        assert not compare(broken, good).passed


def test_junit_and_json_tell_the_same_story() -> None:
    old = text_losses(np.random.default_rng(0), (8, 128))
    verdict = compare(report(old), report(old + 0.02), Limits(perplexity_increase=0.005))
    suite = ElementTree.fromstring(verdict.to_junit())
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["perplexity"]
    assert failed == [row["metric"] for row in verdict.to_json()["rows"] if row["outcome"] == "regression"]
    assert verdict.to_json()["passed"] is False


def test_limits_are_numbers_that_limit() -> None:
    for value in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            Limits(perplexity_increase=value)


def test_the_interval_covers_the_truth_in_correlated_text() -> None:
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        shared = np.repeat(generator.normal(0, 1, (4, 16)), 32, axis=1)
        values = shared + generator.normal(0, 1, shared.shape)
        found = paired_mean(values)
        covered += found.low <= 0 <= found.high
    assert covered >= 400 * 0.92


@pytest.mark.parametrize(("freedom", "exact"), [(7, 2.3646), (15, 2.1314), (63, 1.9983), (10**6, 1.95997)])
def test_students_quantile(freedom: int, exact: float) -> None:
    assert student_quantile(freedom) == pytest.approx(exact, rel=5e-3)
