"""The built-in corpus: enough of it, mostly prose, the same every time, and its halves share nothing."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from qtool.errors import EnvironmentFault
from qtool.quantize.inputs import builtin_text, corpus, overlap_windows, refuse_overlap
from qtool.quantize.inputs.corpus_documents import Document, documents
from qtool.quantize.inputs.overlap import _fingerprints


def test_enough_text_in_both_halves() -> None:
    assert len(builtin_text("calibration")) > 900_000
    assert len(builtin_text("scoring")) > 200_000


def test_the_halves_share_no_window_at_any_offset() -> None:
    calibration, scoring = _fingerprints(builtin_text("calibration")), _fingerprints(builtin_text("scoring"))
    assert np.isin(scoring, calibration).mean() < 1e-3
    refuse_overlap(overlap_windows(builtin_text("calibration")), builtin_text("scoring"))
    refuse_overlap(overlap_windows(builtin_text("scoring")), builtin_text("calibration"))


def test_a_family_of_documents_is_never_split() -> None:
    halves: dict[str, set[str]] = {}
    for document in documents():
        halves.setdefault(document.family, set()).add(corpus.half_of(document))
    assert all(len(found) == 1 for found in halves.values())
    assert len(halves) > 150


@pytest.mark.parametrize("split", ["calibration", "scoring"])
def test_any_beginning_is_mostly_prose(split: corpus.Split) -> None:
    code = [document.text for document in documents() if document.kind == "code"]
    lines = {line for text in code for line in text.splitlines() if len(line) > 20}
    for chars in (50_000, 200_000):
        part = [line for line in builtin_text(split)[:chars].splitlines() if len(line) > 20]
        share = sum(len(line) for line in part if line in lines) / sum(map(len, part))
        assert 0.3 < share < 0.5


def test_the_same_text_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import hashlib; from qtool.quantize.inputs import builtin_text\n"
        "print(hashlib.sha256((builtin_text('calibration') + builtin_text('scoring')).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_a_python_without_sources_is_an_environment_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "documents", lambda: iter([Document("topic:a", "prose", "short")]))
    corpus.builtin_text.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match="--text"):
            builtin_text("calibration")
    finally:
        corpus.builtin_text.cache_clear()
