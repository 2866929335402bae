"""Numbers out of a config file: of the right type, finite, and of a size that a model can have."""

from __future__ import annotations

import math
from typing import Any

from qtool.errors import InputRefused

CHECK = "check the config"


def positive_int(label: str, value: Any, *, at_most: int, at_least: int = 1) -> int:
    """An int within bounds; true, 128.0 and "128" are not ints.

    Raises:
        InputRefused: naming `label` and the value.
    """
    if type(value) is not int:
        raise InputRefused(f"{label} = {_show(value)}", "is not an integer", CHECK)
    if not at_least <= value <= at_most:
        raise InputRefused(f"{label} = {_show(value)}", f"is not between {at_least} and {at_most}", CHECK)
    return value


def number(label: str, value: Any, *, above: float, at_most: float) -> float:
    """A finite float in (above, at_most]; integers are widened."""
    if type(value) not in (int, float):
        raise InputRefused(f"{label} = {_show(value)}", "is not a number", CHECK)
    if not above < value <= at_most or not math.isfinite(value):
        raise InputRefused(f"{label} = {_show(value)}", f"is not in ({above:g}, {at_most:g}]", CHECK)
    return float(value)


def boolean(label: str, value: Any) -> bool:
    """true or false, nothing that is like it."""
    if type(value) is not bool:
        raise InputRefused(f"{label} = {_show(value)}", "is not true or false", CHECK)
    return value


def _show(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "an enormous integer"
    return f"{value!r:.60}"
