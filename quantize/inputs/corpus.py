"""The built-in corpus: text that qtool brings or every CPython has, split so that its halves share nothing.

The library's text goes by whole families of documents (a topic, a package) to one half or the other, by a hash of their
name. A paragraph that stands in both halves (the reference repeats itself) is taken out of the calibration half. The
scoring half is library text alone. The calibration half adds the texts written for qtool and mathematics, because
quantized weights fit the kind of text they were calibrated on. Sections of all kinds take turns by fixed shares, so
that the first tokens already see every kind. Another Python version gives other text: what was read is recorded by its
sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cache
from itertools import zip_longest
from types import MappingProxyType
from typing import Literal

from qtool.errors import EnvironmentFault
from qtool.quantize.inputs.corpus_documents import Document, documents
from qtool.quantize.inputs.domains_mathematics import mathematics_text
from qtool.quantize.inputs.markup import as_html
from qtool.quantize.inputs.texts import WRITTEN, written_text
from qtool.quantize.inputs.word_level import word_level

Split = Literal["calibration", "scoring"]
# Parts of a half's characters by kind of text, while each lasts.
SHARES: Mapping[Split, Mapping[str, int]] = MappingProxyType(
    {
        "scoring": {"reference": 60, "code": 40},
        "calibration": {
            "encyclopedia": 50,
            "prose": 13,
            "reference": 12,
            "dialogue": 10,
            "code": 8,
            "mathematics": 5,
            "scripts": 2,
        },
    }
)
# Characters that every kind counts as given from the start, so that small shares wait until they are due.
HEAD_START: Mapping[Split, int] = MappingProxyType({"scoring": 0, "calibration": 1000})
SCORING_SHARE = 0.25
SECTION_CHARS = 3000
WRITTEN_SECTION_CHARS = 1000
# Sections of the encyclopedia take turns as HTML, as they are, and with their punctuation between spaces: prompts hold
# markup, and corpora that models are scored on are written word by word.
TYPOGRAPHIES = (as_html, str, word_level)
MATHEMATICS_CHARS = 100_000
MIN_WORDS = 8
MIN_CHARS = 100_000
_WORD = re.compile(r"\w+")


@cache
def builtin_text(split: Split) -> str:
    """One half of the corpus; the same for every call on one Python version.

    Raises:
        EnvironmentFault: this Python came without its library's sources.
    """
    library = sections(split)
    if sum(len(section) for kind in library.values() for section in kind) < MIN_CHARS:
        why = "is too small: this Python came without pydoc_data or its library's sources"
        raise EnvironmentFault("the built-in text", why, "give a text with --text")
    return "\n\n".join(_turns(streams(split), SHARES[split], start=HEAD_START[split], lasting=tuple(library)))


def streams(split: Split) -> dict[str, list[str]]:
    """One half's sections by kind of text, the kinds of SHARES."""
    found = sections(split)
    if split == "calibration":
        found |= {name: _sections(written_text(name), WRITTEN_SECTION_CHARS) for name in WRITTEN}
        found["encyclopedia"] = [
            TYPOGRAPHIES[place % len(TYPOGRAPHIES)](section) for place, section in enumerate(found["encyclopedia"])
        ]
        found["mathematics"] = _sections(mathematics_text(MATHEMATICS_CHARS), WRITTEN_SECTION_CHARS)
    return {kind: found[kind] for kind in SHARES[split]}


def sections(split: Split) -> dict[str, list[str]]:
    """The library's part of a half by kind, "reference" and "code"; the calibration half lacks what scoring has."""
    found = sorted(documents(), key=lambda document: document.order)
    seen: set[str] = set()
    halves: dict[Split, dict[str, list[str]]] = {}
    for half in ("scoring", "calibration"):  # scoring first: what it holds, calibration may not
        mine = [document for document in found if half_of(document) == half]
        halves[half] = {
            "reference": _columns(mine, "prose", seen),
            "code": _columns(mine, "code", seen),
        }
    return halves[split]


def half_of(document: Document) -> Split:
    """Which half a document belongs to, by the name of its family alone."""
    value = int.from_bytes(hashlib.sha256(document.family.encode()).digest()[:4], "big")
    return "scoring" if value < SCORING_SHARE * 2**32 else "calibration"


def _columns(mine: Iterable[Document], kind: str, seen: set[str]) -> list[str]:
    """Sections of all documents of a kind: first sections first, then second ones, and so on."""
    columns = [_sections(document.text, SECTION_CHARS, seen) for document in mine if document.kind == kind]
    return [section for row in zip_longest(*columns) for section in row if section is not None]


def _sections(text: str, chars: int, seen: set[str] | None = None) -> list[str]:
    """Paragraphs gathered into sections of at least `chars`; those in `seen` are left out, short ones may repeat."""
    found: list[str] = []
    section: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        if seen is not None:
            words = _WORD.findall(paragraph)
            key = " ".join(words)
            if len(words) >= MIN_WORDS and key in seen:
                continue
            seen.add(key)
        section.append(paragraph)
        if sum(map(len, section)) >= chars:
            found.append("\n\n".join(section))
            section = []
    return [*found, "\n\n".join(section)] if section else found


def _turns(
    streams: Mapping[str, list[str]], shares: Mapping[str, int], *, start: int, lasting: tuple[str, ...]
) -> Iterator[str]:
    """Sections by turns, the kind that is furthest behind its share next, the first of equals.

    Every kind counts as having given `start` characters. One that has run out leaves its share to the others, and one
    of the lasting kinds ends the text.
    """
    left = {kind: iter(stream) for kind, stream in streams.items()}
    counts = dict.fromkeys(streams, start)
    while True:
        kind = min(left, key=lambda kind: Fraction(counts[kind], shares[kind]))
        section = next(left[kind], None)
        if section is not None:
            counts[kind] += len(section)
            yield section
        elif kind in lasting:
            return
        else:
            del left[kind]
