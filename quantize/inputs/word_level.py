"""Text as word-level corpora write it: punctuation stands between spaces, as a word of its own."""

from __future__ import annotations

import re

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'(?<=\w)([.,;:?!%)\]"])(?=[\s.,;:?!%)\]"]|$)', r" \1"),
        (r'(?<=[%)\]"])([.,;:?!)"])(?=[\s.,;:?!)"]|$)', r" \1"),
        (r'(?<![^\s("])([(\["$])(?=[\w(\["$])', r"\1 "),
        (r"(?<=\w)('s)\b", r" \1"),
    )
)


def word_level(text: str) -> str:
    """The same text with spaces before closing and after opening punctuation; decimals and abbreviations keep theirs.

    Only spaces are added.
    """
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
