"""The gate: is this model worse than the stored baseline, on the same text, by more than noise and more than allowed?

Three outcomes, decided by an estimate with its 95 % interval (runtime/paired.py) against a limit:

    pass          estimate ≤ limit, and the interval excludes SAFETY × limit
    regression    estimate > limit, and the interval excludes no change at all
    inconclusive  anything else: too little text to tell, or a number that is not finite

Only "pass" passes, so a gate never passes for want of data; the remedy for "inconclusive" is more text. With the
default limit of 0.5 % a true increase of 1 % lies one limit above the threshold, and an unchanged model one below
it. Two runs of one model on different machines differ by the noise of 8-bit rounding, 0.09 nats a token (up to 0.15
for coarse quantization); at 4096 tokens each is then more than three standard errors (two) away. On one machine
the same package gives the same losses, and the noise is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused
from qtool.runtime.paired import PairedMean, paired_mean
from qtool.runtime.report import EvaluationReport

SAFETY = 2.0
Outcome = Literal["pass", "regression", "inconclusive", "information"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is allowed.

    Attributes:
        perplexity_increase: relative, 0.005 is 0.5 %.
        kl_nats: KL(baseline || current) per token, a lower bound from the stored likeliest ids; 8-bit activation
            rounding alone gives 0.004 to 0.01 between two runs on different machines.
    """

    perplexity_increase: float = 0.005
    kl_nats: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.perplexity_increase < math.inf or not 0 < self.kl_nats < math.inf:
            raise ValueError("limits are positive and finite")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of a verdict. `difference` lies in [low, high]; a row without a limit is information only."""

    metric: str
    baseline: float | None
    current: float | None
    difference: float
    low: float
    high: float
    limit: float | None
    outcome: Outcome
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The gate's answer."""

    rows: tuple[Row, ...]
    tokens: int
    baseline_digest: str
    current_digest: str

    @property
    def passed(self) -> bool:
        """True when every row with a limit passes."""
        return any(row.limit is not None for row in self.rows) and not self._failed()

    @property
    def failure(self) -> str:
        """The rows that did not pass, in a phrase; empty when the verdict is a pass."""
        return "; ".join(
            f"{row.metric} {row.outcome}: {row.difference:+.4g} in [{row.low:.4g}, {row.high:.4g}], limit {row.limit:g}"
            for row in self._failed()
        )

    @property
    def remedy(self) -> str:
        """What to do about the first row that did not pass."""
        return next((row.remedy for row in self._failed()), "")

    def _failed(self) -> list[Row]:
        return [row for row in self.rows if row.limit is not None and row.outcome != "pass"]

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become null."""
        return {
            "passed": self.passed,
            "tokens": self.tokens,
            "baseline": self.baseline_digest,
            "current": self.current_digest,
            "rows": [{name: _plain(value) for name, value in vars(row).items()} for row in self.rows],
        }

    def to_junit(self) -> str:
        """A JUnit XML document, one test case per limited row."""
        limited = [row for row in self.rows if row.limit is not None]
        failures = str(len(self._failed()))
        suite = ElementTree.Element(
            "testsuite", name="qtool check", tests=str(len(limited)), failures=failures, errors="0"
        )
        for row in limited:
            case = ElementTree.SubElement(suite, "testcase", classname="qtool.check", name=row.metric)
            text = f"difference {row.difference:.6g} [{row.low:.6g}, {row.high:.6g}], limit {row.limit:.6g}"
            if row.outcome != "pass":
                failure = ElementTree.SubElement(case, "failure", type=row.outcome, message=f"{row.outcome}: {text}")
                failure.text = row.remedy
            else:
                ElementTree.SubElement(case, "system-out").text = text
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def compare(baseline: EvaluationReport, current: EvaluationReport, limits: Limits | None = None) -> Verdict:
    """Compare two reports of the same tokens.

    Raises:
        InputRefused: when they were made on another text, tokenizer, shape or vocabulary.
    """
    limits = limits or Limits()
    _check_comparable(baseline, current)
    losses, old = current.loss_array().astype(np.float64), baseline.loss_array().astype(np.float64)
    perplexity = _judge(
        "perplexity",
        (baseline.perplexity, current.perplexity),
        paired_mean(losses - old),
        limits.perplexity_increase,
        math.expm1,
    )
    kl = _judge("kl_nats (lower bound)", (None, None), paired_mean(kl_lower_bound(baseline, current)), limits.kl_nats)
    same = baseline.top_id_array()[..., 0] == current.top_id_array()[..., 0]
    agreement = paired_mean(same.astype(np.float64))
    top1 = Row(
        metric="top1_agreement",
        baseline=None,
        current=None,
        difference=agreement.mean,
        low=agreement.low,
        high=agreement.high,
        limit=None,
        outcome="information",
    )
    return Verdict(
        rows=(perplexity, kl, top1),
        tokens=losses.size,
        baseline_digest=baseline.subject_digest,
        current_digest=current.subject_digest,
    )


def kl_lower_bound(baseline: EvaluationReport, current: EvaluationReport) -> npt.NDArray[np.float64]:
    """Per token [B, P] a lower bound of KL(baseline || current), nats.

    Both distributions are coarsened to the ids that both reports kept and one bucket for the rest; coarsening
    never increases a KL divergence.
    """
    ids, other = baseline.top_id_array(), current.top_id_array()
    shared = ids[..., :, None] == other[..., None, :]
    ours, theirs = _shares(baseline.top_logprob_array()), _shares(current.top_logprob_array())
    kept = shared.any(axis=-1)
    p = np.where(kept, ours[..., :-1], 0)
    q = np.where(kept, (shared * theirs[..., None, :-1]).sum(axis=-1), 0)
    p_rest = ours[..., -1] + np.where(kept, 0, ours[..., :-1]).sum(axis=-1)
    q_rest = theirs[..., -1] + np.where(shared.any(axis=-2), 0, theirs[..., :-1]).sum(axis=-1)
    terms = _relative_entropy(p, q).sum(axis=-1) + _relative_entropy(p_rest, q_rest)
    bound: npt.NDArray[np.float64] = np.maximum(terms, 0)
    return bound


def _shares(logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Probabilities that sum to 1 although each was rounded to float16."""
    shares = np.exp(logprobs)
    return shares / shares.sum(axis=-1, keepdims=True)


def _relative_entropy(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    tiny = np.finfo(np.float64).tiny
    terms: npt.NDArray[np.float64] = np.where(p > 0, p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny))), 0)
    return terms


def _judge(
    metric: str,
    values: tuple[float | None, float | None],
    found: PairedMean,
    limit: float,
    scale: Callable[[float], float] = float,
) -> Row:
    difference, low, high = scale(found.mean), scale(found.low), _scaled(scale, found.high)
    outcome: Outcome = "inconclusive"
    if difference <= limit and high <= SAFETY * limit:
        outcome = "pass"
    elif difference > limit and low > 0:
        outcome = "regression"
    return Row(
        metric=metric,
        baseline=values[0],
        current=values[1],
        difference=difference,
        low=low,
        high=high,
        limit=limit,
        outcome=outcome,
        remedy=_remedy(outcome, found, limit),
    )


def _scaled(scale: Callable[[float], float], value: float) -> float:
    try:
        return scale(value)
    except OverflowError:
        return math.inf


def _remedy(outcome: Outcome, found: PairedMean, limit: float) -> str:
    if outcome == "inconclusive":
        return f"score more text: {found.blocks} blocks of tokens leave ±{found.high - found.mean:.2g} nats of doubt"
    if outcome == "regression":
        return f"worse than the baseline by more than {limit:g}; fix it, or store a new baseline on purpose"
    return ""


def _check_comparable(baseline: EvaluationReport, current: EvaluationReport) -> None:
    fields = (
        ("tokenizer_sha256", "another tokenizer"),
        ("text_sha256", "another text"),
        ("sequences", "another number of sequences"),
        ("length", "another sequence length"),
        ("vocab_size", "another vocabulary"),
        ("tokens_sha256", "other tokens"),
    )
    for name, what in fields:
        if getattr(baseline, name) != getattr(current, name):
            raise InputRefused(f"baseline: {name}", f"was scored on {what}", "score both with the same options")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
