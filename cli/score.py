"""Scoring as `evaluate` and `check` share it: open, tokenize, run, and describe in a report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtool.cli.corpus import load_tokens
from qtool.cli.options import CorpusChoice, EngineChoice
from qtool.cli.progress import progress
from qtool.cli.subject import open_subject

if TYPE_CHECKING:
    from qtool.runtime.report import EvaluationReport


def score(
    subject: str,
    reference: str | None,
    corpus: CorpusChoice,
    *,
    threads: int,
    engine: EngineChoice | None = None,
) -> tuple[EvaluationReport, tuple[str, ...]]:
    """Score a package, checkpoint or model, in its usual runtime without `engine`; returns the report and notes."""
    from qtool.runtime.evaluate import evaluate
    from qtool.runtime.report import EvaluationReport

    scored = open_subject(subject, threads=threads, length=corpus.length, engine=engine)
    tokens = load_tokens(
        "scoring",
        scored.tokenizer_files,
        corpus,
        vocab_size=scored.session.vocab_size,
        calibration_windows=scored.calibration_windows,
    )
    other = open_subject(reference, threads=threads, length=corpus.length) if reference is not None else None
    lines = scored.notes
    if other is not None and other.model_digest != scored.model_digest:
        lines += (f"{reference} is not the model that {subject} was made from",)
    with progress("evaluate") as report_progress:
        result = evaluate(
            scored.session,
            tokens.ids,
            reference=other.session if other else None,
            threads=threads,
            progress=report_progress,
        )
    report = EvaluationReport.of(
        result,
        subject=scored.description,
        subject_digest=scored.digest,
        text_sha256=tokens.text_sha256,
        tokenizer_sha256=tokens.tokenizer_sha256,
        reference=other.description if other else "",
        reference_digest=other.digest if other else None,
    )
    return report, lines


def summary(report: EvaluationReport) -> dict[str, Any]:
    """The report's numbers without its per-token arrays."""
    return report.model_dump(mode="json", exclude={"losses", "top_ids", "top_logprobs"})
