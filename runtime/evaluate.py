"""How well a session predicts a text, and how far it is from another: losses, perplexity, KL, top-1 agreement.

Every position of a sequence but the last is scored on the token that follows it. One sequence's logits of the
reference and of one subject are in memory at a time; softmaxes are taken in float64, a few rows at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.session import IntArray, Session, check_tokens

TOP = 16
CHUNK_ELEMENTS = 2**18  # what stays in a core's cache
LOWEST = -60000.0
Progress = Callable[[int, int, str], None]
DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one session scored. P = T − 1 positions per sequence.

    Attributes:
        losses: [B, P] float32, nats.
        top_ids: [B, P, k] int32, the k = min(16, V − 1) likeliest ids, likeliest first.
        top_logprobs: [B, P, k + 1] float16; the last is the log probability of all other ids together.
        tokens_sha256: of the token ids scored, with their shape.
        vocab_size: V.
        kl: [B, P] float32, KL(reference || subject) in nats over the whole vocabulary; None without a reference.
        agree: [B, P] bool, whether reference and subject have the same likeliest id.
        reference_losses: [B, P] float32.
    """

    losses: FloatArray
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float16]
    tokens_sha256: str
    vocab_size: int
    kl: FloatArray | None = None
    agree: npt.NDArray[np.bool_] | None = None
    reference_losses: FloatArray | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return perplexity_of(self.losses)

    @property
    def reference_perplexity(self) -> float | None:
        """exp of the reference's mean loss."""
        return None if self.reference_losses is None else perplexity_of(self.reference_losses)

    @property
    def kl_nats(self) -> float | None:
        """Mean KL(reference || subject)."""
        return None if self.kl is None else float(self.kl.mean(dtype=np.float64))

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions with the same likeliest id."""
        return None if self.agree is None else float(self.agree.mean())


def perplexity_of(losses: FloatArray) -> float:
    """exp of the mean of losses in nats."""
    return float(np.exp(losses.mean(dtype=np.float64)))


def evaluate(
    session: Session,
    tokens: IntArray,
    *,
    reference: Session | None = None,
    by_decode: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score one session on tokens [B, T], T at least 2; see `evaluate_together`."""
    return evaluate_together(
        [session], tokens, reference=reference, by_decode=by_decode, threads=threads, progress=progress
    )[0]


def evaluate_together(
    subjects: Sequence[Session],
    tokens: IntArray,
    *,
    reference: Session | None = None,
    by_decode: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Score several sessions on the same tokens, running the reference once per sequence.

    Args:
        subjects: sessions; each is reset before every sequence. The reference may be one of them.
        tokens: ids [B, T], T at least 2.
        reference: what KL and agreement are measured against.
        by_decode: feed the subjects token by token instead of by prefill.
        threads: for the softmaxes; None: all cores. The results do not depend on it.
        progress: (sequences done, total, text).

    Raises:
        InputRefused: when a session's logits are not finite or its vocabulary differs from the reference's.
    """
    vocab_size = subjects[0].vocab_size
    check_tokens(tokens, dims=2, vocab_size=vocab_size)
    if tokens.shape[1] < 2:
        raise InputRefused("the text", "leaves no token to predict", "score more text")
    for other in (*subjects, *([reference] if reference else [])):
        if other.vocab_size != vocab_size:
            raise InputRefused(other.description, "has another vocabulary", "compare models with one tokenizer")
    columns = [_Columns() for _ in subjects]
    with ThreadPoolExecutor(threads or _cores()) as pool:
        for i, row in enumerate(tokens):
            against = None if reference is None else _logits(reference, row, by_decode=False)
            for subject, column in zip(subjects, columns, strict=True):
                column.add(_logits(subject, row, by_decode=by_decode), row[1:], against, subject.description, pool)
            if progress is not None:
                progress(i + 1, len(tokens), "scoring")
    digest = tokens_digest(tokens)
    return [column.evaluation(digest, vocab_size) for column in columns]


def tokens_digest(tokens: IntArray) -> str:
    """sha256 (hex) of token ids and their shape."""
    header = f"int64 {list(tokens.shape)}\n".encode()
    return hashlib.sha256(header + tokens.astype("<i8").tobytes()).hexdigest()


@dataclass
class _Columns:
    """Per-sequence results of one subject, as they come."""

    losses: list[FloatArray] = field(default_factory=list)
    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    logprobs: list[npt.NDArray[np.float16]] = field(default_factory=list)
    kl: list[FloatArray] = field(default_factory=list)
    agree: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    reference_losses: list[FloatArray] = field(default_factory=list)

    def add(
        self, logits: FloatArray, targets: IntArray, reference: FloatArray | None, who: str, pool: ThreadPoolExecutor
    ) -> None:
        rows = max(1, CHUNK_ELEMENTS // logits.shape[1])

        def scored(start: int) -> tuple[npt.NDArray[Any], ...]:
            part = slice(start, min(start + rows, len(targets)))
            against = None if reference is None else reference[part]
            return _score(logits[part], targets[part], against, who)

        pieces = list(pool.map(scored, range(0, len(targets), rows)))
        lists: tuple[list[Any], ...] = (
            self.losses,
            self.ids,
            self.logprobs,
            self.kl,
            self.agree,
            self.reference_losses,
        )
        for values, column in zip(zip(*pieces, strict=True), lists, strict=False):
            column.append(np.concatenate(values))

    def evaluation(self, digest: str, vocab_size: int) -> Evaluation:
        compared = bool(self.kl)
        return Evaluation(
            losses=np.stack(self.losses),
            top_ids=np.stack(self.ids),
            top_logprobs=np.stack(self.logprobs),
            tokens_sha256=digest,
            vocab_size=vocab_size,
            kl=np.stack(self.kl) if compared else None,
            agree=np.stack(self.agree) if compared else None,
            reference_losses=np.stack(self.reference_losses) if compared else None,
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _logits(session: Session, row: IntArray, *, by_decode: bool) -> FloatArray:
    session.reset()
    if not by_decode:
        return session.prefill(row[None])[0, :-1]
    first = session.prefill(row[None, :1])[0]
    return np.concatenate([first, *(session.decode(row[t : t + 1]).copy() for t in range(1, len(row) - 1))])


def _score(
    logits: FloatArray, targets: IntArray, reference: FloatArray | None, who: str
) -> tuple[npt.NDArray[Any], ...]:
    """Columns of a few rows [R, V], in the order of `_Columns`."""
    subject = Softmax.of(logits, who)
    columns: tuple[npt.NDArray[Any], ...] = (subject.losses(targets),)
    if reference is not None:
        other = Softmax.of(reference, "the reference")
        kl = np.einsum("rv,rv->r", other.shares, other.logprobs - subject.logprobs) / other.total
        agree = reference.argmax(axis=1) == logits.argmax(axis=1)
        columns = (*columns, kl.astype(np.float32), agree, other.losses(targets))
    return (columns[0], *subject.top(logits), *columns[1:])


@dataclass(frozen=True)
class Softmax:
    """Rows [R, V] in float64: log probabilities, and probabilities before they are divided by their sum [R]."""

    logprobs: DoubleArray
    shares: DoubleArray
    total: DoubleArray

    @classmethod
    def of(cls, logits: FloatArray, who: str) -> Softmax:
        if not np.isfinite(logits).all():
            raise InputRefused(who, "gives logits that are not finite", "verify the artifact")
        logprobs = logits.astype(np.float64)
        logprobs -= logprobs.max(axis=1, keepdims=True)
        shares = np.exp(logprobs)
        total = shares.sum(axis=1)
        logprobs -= np.log(total)[:, None]
        return cls(logprobs, shares, total)

    def losses(self, targets: IntArray) -> FloatArray:
        return -np.take_along_axis(self.logprobs, targets[:, None], axis=1)[:, 0].astype(np.float32)

    def top(self, logits: FloatArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
        """The likeliest ids (ties to the smaller id), their log probabilities, and that of all the rest together."""
        count = min(TOP, logits.shape[1] - 1)
        top = np.argpartition(logits, -count, axis=1)[:, -count:]
        values = np.take_along_axis(self.logprobs, top, axis=1)
        likeliest = np.lexsort((top, -values), axis=1)
        top, values = np.take_along_axis(top, likeliest, axis=1), np.take_along_axis(values, likeliest, axis=1)
        rest = self.shares.copy()  # added up by itself: 1 − the likeliest would cancel
        np.put_along_axis(rest, top, 0, axis=1)
        with np.errstate(divide="ignore"):  # below e⁻⁷⁴⁵ it is stored as LOWEST
            others = np.log(rest.sum(axis=1) / self.total)
        stored = np.concatenate([values, others[:, None]], axis=1).clip(LOWEST, 0)
        return top.astype(np.int32), stored.astype(np.float16)
