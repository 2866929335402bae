"""A text the user names, read strictly: regular, UTF-8, and really text."""

from __future__ import annotations

from pathlib import Path

from qtool.errors import InputRefused, UsageError
from qtool.quantize.inputs.regular_file import open_regular, read_small

MAX_TEXT_BYTES = 2**29
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UsageError: the path leads to no regular file.
        InputRefused: empty, blank, binary, or not UTF-8; the message names byte and line.
        EnvironmentFault: no permission.
    """
    if not path.is_file():
        raise UsageError(path, "is not a file" if path.exists() else "does not exist", "give a UTF-8 text file")
    return decode_text(str(path), read_small(open_regular(path), MAX_TEXT_BYTES))


def decode_text(label: str, data: bytes) -> str:
    """Bytes to text; see `read_text`."""
    if data[:2] in _UTF16_MARKS:
        raise InputRefused(label, "is UTF-16", "convert it to UTF-8")
    zero = data.find(b"\0")
    if zero >= 0:
        raise InputRefused(label, f"is binary (a zero byte at {zero}, line {_line(data, zero)})", "give a text file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise InputRefused(label, f"is not UTF-8 (byte {at}, line {_line(data, at)})", "convert it to UTF-8") from None
    if not text.strip():
        raise InputRefused(label, "is blank", "give a text with words in it")
    return text


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
