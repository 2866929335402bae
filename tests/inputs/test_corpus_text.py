"""The built-in corpus: enough of it, every kind its share, the same every time, and its halves share nothing."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

from qtool.errors import EnvironmentFault
from qtool.quantize.inputs import builtin_text, corpus, overlap_windows, refuse_overlap
from qtool.quantize.inputs.corpus_documents import Document, documents
from qtool.quantize.inputs.markup import as_html
from qtool.quantize.inputs.overlap import _fingerprints
from qtool.quantize.inputs.texts import WRITTEN, written_text
from qtool.quantize.inputs.word_level import word_level


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


def shares_of(text: str, split: corpus.Split) -> dict[str, float]:
    """Which part of a text's characters each kind has, by the paragraphs that only it holds."""
    kind_of = {
        paragraph: kind
        for kind, sections in corpus.streams(split).items()
        for section in sections
        for paragraph in section.split("\n\n")
    }
    counts = dict.fromkeys(corpus.SHARES[split], 0)
    for paragraph in text.split("\n\n"):
        if paragraph in kind_of:  # the text's end may be half a paragraph
            counts[kind_of[paragraph]] += len(paragraph)
    return {kind: count / sum(counts.values()) for kind, count in counts.items()}


@pytest.mark.parametrize("split", ["calibration", "scoring"])
@pytest.mark.parametrize("chars", [50_000, 80_000, 140_000])
def test_any_beginning_holds_every_kind_by_its_share(split: corpus.Split, chars: int) -> None:
    wanted = corpus.SHARES[split]
    for kind, share in shares_of(builtin_text(split)[:chars], split).items():
        assert share == pytest.approx(wanted[kind] / sum(wanted.values()), abs=0.07), kind


def test_the_scoring_half_is_the_librarys_alone() -> None:
    assert set(corpus.SHARES["scoring"]) == {"reference", "code"} == set(corpus.sections("scoring"))
    assert set(corpus.SHARES["calibration"]) == {*WRITTEN, "reference", "code", "mathematics"}


def test_a_kind_that_has_run_out_leaves_its_share_and_a_lasting_one_ends_the_text() -> None:
    streams = {"a": ["a" * 10] * 2, "b": ["b" * 10] * 4, "c": ["c" * 5] * 9}
    shares = {"a": 50, "b": 25, "c": 25}

    def turns(*lasting: str, start: int = 0) -> str:
        return "".join(section[0] for section in corpus._turns(streams, shares, start=start, lasting=lasting))

    assert turns("b", "c") == "abcacbccbccbcc"
    assert turns("a", "b") == "abcac"


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


def test_the_encyclopedia_is_the_same_everywhere_and_repeats_nothing() -> None:
    text = written_text("encyclopedia")
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "8c9a0108cfbcd487c4f9ca264d9365c02d31200f4d0cd9ca2f9515ba7beba8ad"
    prints = _fingerprints(text)
    assert len(np.unique(prints)) == len(prints)
    others = [_fingerprints(written_text(name)) for name in WRITTEN if name != "encyclopedia"]
    assert not np.isin(prints, np.concatenate([*others, _fingerprints(builtin_text("scoring"))])).any()


def test_word_level_text_differs_in_spaces_alone() -> None:
    text = 'The bridge\'s arch (6.4 km), built for $1,771, was "so ("quite") poor".'
    assert word_level(text) == "The bridge 's arch ( 6.4 km ) , built for $ 1,771 , was \" so ( \" quite \" ) poor \" ."
    plain = written_text("encyclopedia")
    assert word_level(plain).replace(" ", "") == plain.replace(" ", "")


def test_the_encyclopedia_takes_turns_as_html_as_it_is_and_word_by_word() -> None:
    found = corpus.streams("calibration")["encyclopedia"]
    assert all(section.startswith("<h2>") or "<p>" in section for section in found[0::3])
    assert not any("<p>" in section for section in [*found[1::3], *found[2::3]])
    assert all(" , " in section or " ." in section for section in found[2::3])
    bare = re.sub(r"<[^>]*>", "", "".join(found))
    assert "".join(bare.split()) == "".join(written_text("encyclopedia").split())


def test_html_by_hand() -> None:
    text = "Oak Hill\n\nThe hill of Mary and John and Susan near Bath, by Avon and Kennet, rises to the north."
    assert as_html(text) == (
        "<h2>Oak Hill</h2>\n<p> The hill of Mary and <i>John</i> and Susan near Bath, by <em>Avon</em> and Kennet, "
        "rises to the north. </p>"
    )


def test_a_python_without_sources_is_an_environment_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "documents", lambda: iter([Document("topic:a", "prose", "short")]))
    corpus.builtin_text.cache_clear()
    try:
        with pytest.raises(EnvironmentFault, match="--text"):
            builtin_text("calibration")
    finally:
        corpus.builtin_text.cache_clear()
