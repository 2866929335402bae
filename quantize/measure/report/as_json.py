"""Findings as plain JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from qtool.quantize.measure.analysis.findings import Findings

SCHEMA = 1


def findings_json(findings: Findings) -> dict[str, Any]:
    """Every field under its name, numbers as Python's own; what is not finite is null."""
    return {"schema": SCHEMA, **_plain(findings)}


def json_text(data: Mapping[str, Any]) -> str:
    """Strict JSON with a line for each field, and for each entry of a list: small, and lines can be compared."""
    fields_shown = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            shown = "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
        else:
            shown = json.dumps(value, allow_nan=False)
        fields_shown.append(f"{json.dumps(name)}: {shown}")
    return "{\n" + ",\n".join(fields_shown) + "\n}\n"


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
