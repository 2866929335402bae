"""JSON as the standard means it: no duplicate keys, no NaN, no infinity, no bomb."""

from __future__ import annotations

import json
import math
from typing import Any

from qtool.errors import InputRefused


def parse_json(label: str, data: bytes, *, infinity: bool = False) -> Any:
    """Parse UTF-8 JSON.

    Args:
        label: how messages name the file.
        data: the whole file.
        infinity: let the word Infinity through, which some models' config.json uses for "no limit".

    Raises:
        InputRefused: for anything a strict reader must not accept: bad UTF-8, duplicate keys, NaN, infinity, numbers
            that overflow, nesting deeper than the interpreter's stack.
    """
    try:
        text = data.decode("utf-8")
        constant = _infinity if infinity else _no_constant
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        why = f"is not UTF-8 text (byte {error.start})"
    except json.JSONDecodeError as error:
        why = f"is not JSON ({error.msg} in line {error.lineno}, column {error.colno})"
    except ValueError as error:
        why = f"is not acceptable JSON ({str(error)[:120]})"
    except RecursionError:
        why = "is not acceptable JSON (nested too deeply)"
    raise InputRefused(label, why, "check the file, or download it again")


def parse_json_object(label: str, data: bytes, *, infinity: bool = False) -> dict[str, Any]:
    """As `parse_json`, for a file that must hold an object."""
    value = parse_json(label, data, infinity=infinity)
    if not isinstance(value, dict):
        raise InputRefused(label, f"holds a JSON {type(value).__name__}, not an object", "check the file")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key!r:.80}")
            seen.add(key)
    return result


def _infinity(text: str) -> float:
    return math.inf if text == "Infinity" else _no_constant(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} overflows")
    return value

