"""The built-in corpus: text that every machine with CPython already has, split so that its halves share nothing.

Whole families of documents (a topic, a package) go to one half or the other by a hash of their name. A paragraph that
stands in both halves (the reference repeats itself) is taken out of the calibration half. Sections of all documents
take turns, three parts prose to two parts code, so that the first tokens already see many of them. Another Python
version gives other text: what was read is recorded by its sha256.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import zip_longest
from typing import Literal

from qtool.errors import EnvironmentFault
from qtool.quantize.inputs.corpus_documents import Document, documents

Split = Literal["calibration", "scoring"]
PROSE_SHARE = 0.6
SCORING_SHARE = 0.25
SECTION_CHARS = 3000
MIN_WORDS = 8
MIN_CHARS = 100_000
_WORD = re.compile(r"\w+")


@cache
def builtin_text(split: Split) -> str:
    """One half of the corpus; the same for every call on one Python version.

    Raises:
        EnvironmentFault: this Python came without its library's sources.
    """
    text = "\n\n".join(_mix(**sections(split)))
    if len(text) < MIN_CHARS:
        why = "is too small: this Python came without pydoc_data or its library's sources"
        raise EnvironmentFault("the built-in text", why, "give a text with --text")
    return text


def sections(split: Split) -> dict[str, list[str]]:
    """One half's sections by kind, "prose" and "code"; the calibration half lacks what the scoring half has."""
    found = sorted(documents(), key=lambda document: document.order)
    seen: set[str] = set()
    halves: dict[Split, dict[str, list[str]]] = {}
    for half in ("scoring", "calibration"):  # scoring first: what it holds, calibration may not
        mine = [document for document in found if half_of(document) == half]
        halves[half] = {kind: _turns(mine, kind, seen) for kind in ("prose", "code")}
    return halves[split]


def half_of(document: Document) -> Split:
    """Which half a document belongs to, by the name of its family alone."""
    value = int.from_bytes(hashlib.sha256(document.family.encode()).digest()[:4], "big")
    return "scoring" if value < SCORING_SHARE * 2**32 else "calibration"


def _turns(mine: Iterable[Document], kind: str, seen: set[str]) -> list[str]:
    """Sections of all documents of a kind: first sections first, then second ones, and so on."""
    columns = [list(_sections(document.text, seen)) for document in mine if document.kind == kind]
    return [section for row in zip_longest(*columns) for section in row if section is not None]


def _sections(text: str, seen: set[str]) -> Iterator[str]:
    """Paragraphs not seen before, gathered into sections of about SECTION_CHARS; short ones may repeat."""
    section: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = _WORD.findall(paragraph)
        key = " ".join(words)
        if len(words) >= MIN_WORDS and key in seen:
            continue
        seen.add(key)
        section.append(paragraph)
        if sum(map(len, section)) >= SECTION_CHARS:
            yield "\n\n".join(section)
            section = []
    if section:
        yield "\n\n".join(section)


def _mix(prose: list[str], code: list[str]) -> Iterator[str]:
    """Sections by turns, holding PROSE_SHARE of the characters, until one kind runs out."""
    counts = {"prose": 0, "code": 0}
    streams = {"prose": iter(prose), "code": iter(code)}
    while True:
        kind = "prose" if counts["prose"] * (1 - PROSE_SHARE) <= counts["code"] * PROSE_SHARE else "code"
        section = next(streams[kind], None)
        if section is None:
            return
        counts[kind] += len(section)
        yield section
