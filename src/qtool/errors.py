"""Every refusal qtool makes on purpose, as one small tree with exit codes.

    QtoolError
    ├── UsageError        2   a wrong option, path or recipe
    ├── InputRefused      3   a checkpoint, text, artifact or baseline that must not be used
    ├── EnvironmentFault  4   disk, memory, permission, lock, missing package or device
    └── GateFailed        5   a measured regression, or an export that does not equal what was scored

Exit code 1 is Python's own for an uncaught exception and therefore never used on purpose:
it always means a bug in qtool.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_MESSAGE_CHARS = 400


def escape(text: object) -> str:
    """Make text that came out of a file safe to print: control and non-printable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase naming the known names closest to `name`, for use as a remedy."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(choices)}"


class QtoolError(Exception):
    """A refusal with one clear line: what, why, and a remedy.

    Args:
        what: the thing refused, with file and field.
        why: the reason.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: object, why: object, remedy: object = "") -> None:
        self.what, self.why, self.remedy = escape(what), escape(why), escape(remedy)
        super().__init__(self.line())

    def line(self) -> str:
        """The message on one line, cut to MAX_MESSAGE_CHARS with the remedy kept whole."""
        tail = f"; {self.remedy}" if self.remedy else ""
        head = f"{self.what}: {self.why}"
        room = max(MAX_MESSAGE_CHARS - len(tail), 80)
        return (head if len(head) <= room else head[: room - 1] + "…") + tail


class UsageError(QtoolError):
    """A wrong option, path or recipe (exit code 2, click's own)."""

    exit_code = 2


class InputRefused(QtoolError):
    """A checkpoint, text, artifact or baseline that must not be used (exit code 3)."""

    exit_code = 3


class EnvironmentFault(QtoolError):
    """Disk, memory, permission, lock, or a missing package or device (exit code 4)."""

    exit_code = 4


class GateFailed(QtoolError):
    """A measured regression, or an artifact that does not equal what was scored (exit code 5)."""

    exit_code = 5
