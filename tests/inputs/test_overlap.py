"""A shared passage is found wherever it lies; different texts pass."""

from __future__ import annotations

import random

import pytest

from qtool.errors import InputRefused
from qtool.quantize.inputs import overlap, overlap_windows, refuse_overlap


def words(count: int, seed: int, vocabulary: int = 5000) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(vocabulary)}" for _ in range(count)]


CALIBRATION = words(20_000, 1)
OTHER = words(20_000, 2)


def text(parts: list[str]) -> str:
    return " ".join(parts)


@pytest.mark.parametrize(
    "scoring",
    [
        CALIBRATION,
        CALIBRATION[1000:1100],
        CALIBRATION[7007:9000],
        OTHER[:3000] + CALIBRATION[111:411] + OTHER[3000:6000],
        OTHER + CALIBRATION + OTHER,
    ],
    ids=["equal", "short part", "part at an odd place", "a part inside other text", "the whole inside other text"],
)
def test_shared_passages_are_refused(scoring: list[str]) -> None:
    with pytest.raises(InputRefused, match="overlaps"):
        refuse_overlap(overlap_windows(text(CALIBRATION)), text(scoring))


def test_a_small_calibration_text_inside_a_large_scoring_text_is_refused() -> None:
    part = OTHER[5000:5200]
    with pytest.raises(InputRefused, match="overlaps"):
        refuse_overlap(overlap_windows(text(part)), text(words(300_000, 3) + OTHER))


def test_a_sample_of_windows_still_finds_a_small_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 of 46,000 scored words are calibration text: 2 %, of which the kept quarter of the windows shows 0.7 %."""
    monkeypatch.setattr(overlap, "MAX_WINDOWS", 2000)
    calibration = words(200_000, 6)
    windows = overlap_windows(text(calibration))
    assert len(windows) == 2000
    with pytest.raises(InputRefused, match="overlaps"):
        refuse_overlap(windows, text(words(45_000, 4) + calibration[4000:5000]))


def test_case_punctuation_and_line_breaks_do_not_hide_it() -> None:
    disguised = "\n".join(f"{word.upper()}," for word in CALIBRATION[:500])
    with pytest.raises(InputRefused, match="overlaps"):
        refuse_overlap(overlap_windows(text(CALIBRATION)), disguised)


def test_a_script_without_spaces_has_windows_too() -> None:
    rng = random.Random(0)
    chinese = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(3000))
    assert len(overlap_windows(chinese)) == 125
    with pytest.raises(InputRefused, match="overlaps"):
        refuse_overlap(overlap_windows(chinese), chinese[100:400])


@pytest.mark.parametrize(
    "scoring", [OTHER, OTHER[:10], [], OTHER + CALIBRATION[:40], CALIBRATION[:20] * 0 + words(50_000, 5)]
)
def test_other_texts_pass(scoring: list[str]) -> None:
    refuse_overlap(overlap_windows(text(CALIBRATION)), text(scoring))


def test_no_windows_no_refusal() -> None:
    assert overlap_windows("too short") == ()
    refuse_overlap((), text(OTHER))


def test_windows_are_canonical() -> None:
    windows = overlap_windows(text(CALIBRATION))
    assert list(windows) == sorted(set(windows))
    assert all(len(w) == 16 and int(w, 16) >= 0 for w in windows)
    assert overlap_windows("same line of a few words and more\n" * 2000) == overlap_windows(
        "same line of a few words and more\n" * 2000
    )
