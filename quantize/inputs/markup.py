"""Text as web pages write it: headings and paragraphs in tags, some names emphasised or linked."""

from __future__ import annotations

import re
from itertools import count

EMPHASISED_EVERY = 3
HEADING_CHARS = 80  # a shorter paragraph is a heading
_NAME = re.compile(r" ([A-Z][a-z]{2,})")
_WAYS = (" <b>{0}</b>", " <i>{0}</i>", " <em>{0}</em>", ' <a href="/wiki/{0}">{0}</a>')


def as_html(text: str) -> str:
    """Paragraphs, a blank line between two, as a piece of HTML; every third name stands in a tag of its own."""
    turn = count(1)

    def tagged(name: re.Match[str]) -> str:
        place, rest = divmod(next(turn), EMPHASISED_EVERY)
        return name[0] if rest else _WAYS[place % len(_WAYS)].format(name[1])

    paragraphs = (_NAME.sub(tagged, paragraph) for paragraph in text.split("\n\n"))
    return "\n".join(f"<h2>{p}</h2>" if len(p) < HEADING_CHARS else f"<p> {p} </p>" for p in paragraphs)
