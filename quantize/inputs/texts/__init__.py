"""Text written for qtool, one file a kind: paragraphs between blank lines, none of them from elsewhere.

It is read for its form, not for what it says: in the encyclopedia invented people and places stand beside real ones.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

WRITTEN = ("encyclopedia", "prose", "dialogue", "scripts")


@cache
def written_text(name: str) -> str:
    """One of WRITTEN, the same everywhere."""
    return (files(__name__) / f"{name}.txt").read_text(encoding="utf-8")
