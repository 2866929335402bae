"""Failures of the tokenizers library as refusals; its panics are no Exceptions and slip past `except Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qtool.errors import InputRefused, QtoolError

_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, QtoolError)


@contextmanager
def refuse_failures(what: str, remedy: str) -> Iterator[None]:
    """Turn every failure of a library call on foreign data into InputRefused; interrupts pass through.

    Args:
        what: what the data is, for the message.
        remedy: what the user can do.
    """
    try:
        yield
    except _NOT_OURS:
        raise
    except BaseException as error:
        raise InputRefused(what, f"the tokenizers library refuses it ({error!s:.160})", remedy) from None
