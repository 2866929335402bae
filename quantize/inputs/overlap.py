"""Does a scoring text share passages with a calibration text? Found by fingerprints, so that only those are kept.

The calibration text is cut into consecutive windows of 24 words; the smallest 20,000 of their 64-bit fingerprints are
kept (a fixed sample, uniform because fingerprints are). The scoring text is fingerprinted at *every* word, so a shared
passage of 47 words or more is found wherever it starts. Case, punctuation and line breaks do not matter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused

WINDOW_WORDS = 24
MAX_WINDOWS = 20_000
LIMIT = 0.01

# Scripts written without spaces count one word a character.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
Fingerprints = npt.NDArray[np.uint64]


def overlap_windows(text: str) -> tuple[str, ...]:
    """Fingerprints of a calibration text's windows: 16 hex digits each, sorted, unique, at most MAX_WINDOWS.

    A text shorter than one window has none.
    """
    prints = np.unique(_fingerprints(text)[::WINDOW_WORDS])[:MAX_WINDOWS]
    return tuple(f"{int(value):016x}" for value in prints)


def refuse_overlap(calibration_windows: Sequence[str], scoring_text: str) -> None:
    """Refuse a scoring text that shares passages with the calibration text.

    Two shares are looked at: of the calibration windows, how many occur in the scoring text (catches a calibration
    text that is a part of the scoring text), and of the scoring text's words, how many lie in such windows, scaled up
    where the windows are a sample (catches a scoring text that is a part of the calibration text).

    Args:
        calibration_windows: from `overlap_windows`.
        scoring_text: the text to be scored.

    Raises:
        InputRefused: when either share is above LIMIT.
    """
    windows = np.array([int(window, 16) for window in calibration_windows], dtype=np.uint64)
    scoring = _fingerprints(scoring_text)
    if not len(windows) or not len(scoring):
        return
    of_calibration = float(np.isin(windows, scoring).mean())
    kept = (float(windows.max()) + 1) / 2**64 if len(windows) >= MAX_WINDOWS else 1.0
    words = len(scoring) + WINDOW_WORDS - 1
    of_scoring = float(np.isin(scoring, windows).sum()) * WINDOW_WORDS / kept / words
    if max(of_calibration, of_scoring) > LIMIT:
        why = (
            f"overlaps the calibration text: it holds {of_calibration:.1%} of the calibration windows, and "
            f"{min(of_scoring, 1.0):.1%} of it is calibration text"
        )
        raise InputRefused("scoring text", why, "score text that calibration did not see")


def _fingerprints(text: str) -> Fingerprints:
    """The fingerprint of the window that starts at each word, [words − WINDOW_WORDS + 1] uint64."""
    known: dict[str, int] = {}
    words = np.fromiter((_hash_word(word, known) for word in _WORD.findall(text.casefold())), dtype=np.uint64)
    if len(words) < WINDOW_WORDS:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(len(words) - WINDOW_WORDS + 1, dtype=np.uint64)
    for offset in range(WINDOW_WORDS):  # a polynomial in the words' hashes, modulo 2**64
        total *= _MULTIPLIER
        total += words[offset : len(words) - WINDOW_WORDS + 1 + offset]
    total ^= total >> np.uint64(29)
    total *= np.uint64(0xBF58476D1CE4E5B9)
    total ^= total >> np.uint64(32)
    return total


def _hash_word(word: str, known: dict[str, int]) -> int:
    value = known.get(word)
    if value is None:
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = known[word] = int.from_bytes(digest, "little")
    return value
