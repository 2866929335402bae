"""A family's settings, read from config.json: each checked, defaults written out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from qtool.errors import InputRefused
from qtool.quantize.architectures.settings import Choice, Fixed, Number, Range, Setting, Size, Switch
from qtool.quantize.inputs.config_numbers import CHECK, boolean, number, positive_int, show

LARGEST_FLOAT = float(np.finfo(np.float32).max)


def read_setting(label: str, raw: Mapping[str, Any], setting: Setting) -> Any:
    """The value of one key, in the form that the canonical config has.

    Raises:
        InputRefused: naming the key and its value.
    """
    where = f"{label}: {setting.key}"
    value = raw.get(setting.key)
    match setting:
        case Size():
            return _size(label, raw, setting)
        case Number():
            if value is None and not (setting.off_by_null and setting.key in raw):
                value = setting.default
            return None if value is None else number(where, value, above=setting.above, at_most=setting.at_most)
        case Range():
            return _range(where, setting.default if value is None else value)
        case Switch():
            return boolean(where, setting.default if value is None else value)
        case Choice():
            return _choice(where, setting, setting.default if value is None else value)
        case Fixed():
            same = value == setting.value and isinstance(value, bool) == isinstance(setting.value, bool)
            if value is not None and not same:
                raise InputRefused(f"{where} = {show(value)}", setting.why, f"supported: {show(setting.value)}")
            return copy.deepcopy(setting.value)


def _size(label: str, raw: Mapping[str, Any], setting: Size) -> int:
    given = {key: raw[key] for key in (setting.key, *setting.other_names) if raw.get(key) is not None}
    for key, value in given.items():
        positive_int(f"{label}: {key}", value, at_most=setting.at_most)
    if len(set(given.values())) > 1:
        raise InputRefused(f"{label}: {' and '.join(given)}", "mean the same and differ", "keep one")
    if given:
        return int(next(iter(given.values())))
    if setting.default is None:
        raise InputRefused(f"{label}: {setting.key}", "is missing", CHECK)
    return setting.default


def _range(where: str, value: Any) -> list[float]:
    """Infinity in the three forms that transformers writes it: Infinity, {"__float__": "Infinity"}, a huge number."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InputRefused(f"{where} = {show(value)}", "is not a pair of numbers", CHECK)
    low, high = (_finite(item) for item in value)
    low = number(f"{where}: low", low, above=-1.0, at_most=LARGEST_FLOAT)
    if low < 0:
        raise InputRefused(f"{where}: low = {low:g}", "is negative", CHECK)
    return [low, number(f"{where}: high", high, above=low, at_most=LARGEST_FLOAT)]


def _finite(value: Any) -> Any:
    infinite = value == {"__float__": "Infinity"} or (isinstance(value, float) and value > LARGEST_FLOAT)
    return LARGEST_FLOAT if infinite else value


def _choice(where: str, setting: Choice, value: Any) -> str:
    if not isinstance(value, str) or value not in setting.allowed:
        supported = ", ".join(dict.fromkeys(setting.allowed.values()))
        raise InputRefused(f"{where} = {value!r:.40}", "not supported", f"supported: {supported}")
    return setting.allowed[value]
