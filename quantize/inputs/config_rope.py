"""Rotary position parameters, as transformers 4 wrote them (rope_theta, rope_scaling) or 5 does (rope_parameters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.inputs.config_numbers import number, positive_int

DEFAULT_THETA = 10000.0
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": (
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def rope_parameters(label: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The one form that the rest of qtool sees: {"rope_type": …, "rope_theta": …, and what that type needs}.

    Raises:
        InputRefused: an unknown or unsupported type, a missing or senseless number, or two places that disagree.
    """
    given = _mapping(label, config, "rope_parameters") | _mapping(label, config, "rope_scaling")
    where = f"{label}: rope_parameters"
    thetas = [source["rope_theta"] for source in (given, config) if source.get("rope_theta") is not None]
    if len({repr(theta) for theta in thetas}) > 1:
        raise InputRefused(f"{label}: rope_theta", f"is given twice, as {thetas[0]} and {thetas[1]}", "keep one")
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in _REQUIRED:
        raise InputRefused(f"{where}.rope_type = {rope_type!r:.60}", "not supported", f"known: {', '.join(_REQUIRED)}")
    theta = number(f"{label}: rope_theta", thetas[0] if thetas else DEFAULT_THETA, above=0.0, at_most=1e12)
    result: dict[str, Any] = {"rope_type": rope_type, "rope_theta": theta}
    for key in _REQUIRED[rope_type]:
        result[key] = _value(where, key, given.get(key))
    for key in _OPTIONAL.get(rope_type, ()):
        if given.get(key) is not None:
            result[key] = _value(where, key, given[key])
    _check_partial(label, config, given)
    return result


def _mapping(label: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or any(isinstance(item, (dict, list)) for item in value.values()):
        raise InputRefused(f"{label}: {key}", "is not one plain set of parameters", "check the config")
    return value


def _value(where: str, key: str, value: Any) -> Any:
    if key == "truncate":
        if not isinstance(value, bool):
            raise InputRefused(f"{where}.{key} = {value!r:.40}", "is not true or false", "check the config")
        return value
    if key == "original_max_position_embeddings":
        return positive_int(f"{where}.{key}", value, at_most=2**27)
    return number(f"{where}.{key}", value, above=0.0, at_most=1e6)


def _check_partial(label: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for source in (config, given):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise InputRefused(f"{label}: partial_rotary_factor", "only 1.0 is supported for this family", "")
