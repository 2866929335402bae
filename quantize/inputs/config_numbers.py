"""Numbers out of a config file: of the right type, finite, and of a size that a model can have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused

CHECK = "check the config"


def given_or(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, where null means the same as an absent key."""
    value = raw.get(key)
    return default if value is None else value


def positive_int(label: str, value: Any, *, at_most: int, at_least: int = 1) -> int:
    """An int within bounds; true, 128.0 and "128" are not ints.

    Raises:
        InputRefused: naming `label` and the value.
    """
    if type(value) is not int:
        raise InputRefused(f"{label} = {show(value)}", "is not an integer", CHECK)
    if not at_least <= value <= at_most:
        raise InputRefused(f"{label} = {show(value)}", f"is not between {at_least} and {at_most}", CHECK)
    return value


def number(label: str, value: Any, *, above: float, at_most: float) -> float:
    """A finite float in (above, at_most]; integers are widened."""
    if type(value) not in (int, float):
        raise InputRefused(f"{label} = {show(value)}", "is not a number", CHECK)
    if not above < value <= at_most or not math.isfinite(value):
        raise InputRefused(f"{label} = {show(value)}", f"is not in ({above:g}, {at_most:g}]", CHECK)
    return float(value)


def boolean(label: str, value: Any) -> bool:
    """true or false, nothing that is like it."""
    if type(value) is not bool:
        raise InputRefused(f"{label} = {show(value)}", "is not true or false", CHECK)
    return value


def show(value: Any) -> str:
    """A value as messages print it: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "an enormous integer"
    return f"{value!r:.60}"
