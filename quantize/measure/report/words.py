"""Numbers and foreign text as people read them: on a page, in Markdown and inside a figure."""

from __future__ import annotations

import math
import re
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font

LONGEST_TEXT = 24
EXACT_DB = 200.0
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# What Markdown would act on; an underscore inside a word and a colon before a space are left readable.
_MARKDOWN = re.compile(r"[\\`*\[\]#|$~@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=\S)|(?<=[Ww]{3})\.")


def number(value: float, digits: int = 3) -> str:
    """Three significant digits: 0.0123, 12.3, 12,300, 1.23×10⁷; "–" for what is not finite."""
    if not math.isfinite(value):
        return "–"
    if value < 0:
        return f"−{number(-value, digits)}"
    if value == 0:
        return "0"
    if not 1e-3 <= value < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    places = digits - 1 - math.floor(math.log10(value))
    return f"{round(value, places):,.{max(places, 0)}f}"


def count(value: int, noun: str = "") -> str:
    """ "1 token", "12,345 tokens"; without a noun just the number."""
    shown = f"{value:,}"
    return f"{shown} {noun}{'' if value == 1 else 's'}" if noun else shown


def share(value: float) -> str:
    """A share as per cent."""
    percent = 100 * value
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.5 <= percent < 100:
        return f"{min(percent, 99.9):.1f} %"
    return f"{percent:.1f} %" if 0 < percent < 10 else f"{percent:.0f} %"


def decibel(value: float) -> str:
    """One decimal; "exact" where hardly an error is left; "–" for what is not finite."""
    if not math.isfinite(value):
        return "–"
    return "exact" if value >= EXACT_DB else f"{value:.1f}".replace("-", "−")


def listed(items: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def visible(text: str, longest: int = LONGEST_TEXT) -> str:
    """A text on one line with nothing hidden: control, format and unassigned characters as escapes, then shortened."""
    shown = "".join(_visible(char) for char in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _visible(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char == " " or unicodedata.category(char)[0] not in "CZ":
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


@cache
def _font() -> FT2Font:
    return FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"))


def drawable(text: str, longest: int = LONGEST_TEXT) -> str:
    """A visible text in which characters that the figures' font lacks are code points: "⟨U+4E2D⟩"."""
    shown = visible(text, longest)
    return "".join(char if _font().get_char_index(ord(char)) else f"⟨U+{ord(char):04X}⟩" for char in shown)


def token(text: str, number_of: int | None = None) -> str:
    """A token's text in quotation marks, nothing hidden; with its id where the text alone does not tell which."""
    vague = number_of is not None and (not text or "\ufffd" in text)
    return f"“{visible(text)}” (id {number_of})" if vague else f"“{visible(text)}”"


def markdown(text: str) -> str:
    """A text as Markdown that shows exactly this text on one line: no markup, link, mathematics or HTML in it."""
    shown = " ".join(text.split("\n")).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", shown)
