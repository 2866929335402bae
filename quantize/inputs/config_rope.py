"""Rotary position parameters, as transformers 4 wrote them (rope_theta, rope_scaling) or 5 does (rope_parameters)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures.settings import Rope
from qtool.quantize.inputs.config_numbers import number, positive_int

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
FULL, SLIDING = "full_attention", "sliding_attention"


def rope_parameters(label: str, config: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    """The one form that the rest of qtool sees: {"rope_type": …, "rope_theta": …, and what that type needs}; for a
    family whose sliding blocks differ, one such form under "full_attention" and one under "sliding_attention".

    Args:
        label: how messages name the file.
        config: config.json as it came.
        rope: the family's rule.

    Raises:
        InputRefused: an unknown or unsupported type, a missing or senseless number, or two places that disagree.
    """
    if rope.local_theta is not None:
        return _by_layer_type(label, config, rope, rope.local_theta)
    given = _mapping(label, config, "rope_parameters") | _mapping(label, config, "rope_scaling")
    if set(given) <= {"rope_theta", "partial_rotary_factor"}:
        given = {**rope.absent, **given}
    result = _one(label, "rope_parameters", given, [("rope_theta", config.get("rope_theta"))], rope.theta, rope)
    if rope.partial:
        result["partial_rotary_factor"] = _partial(label, config, given)
    else:
        _refuse_partial(label, config, given)
    return result


def _by_layer_type(label: str, config: Mapping[str, Any], rope: Rope, local_theta: float) -> dict[str, Any]:
    nested = config.get("rope_parameters") or {}
    if not isinstance(nested, dict) or not set(nested) <= {FULL, SLIDING}:
        why = f"is not one set of parameters for {FULL} and one for {SLIDING}"
        raise InputRefused(f"{label}: rope_parameters", why, "check the config")
    scaling = _mapping(label, config, "rope_scaling")
    result = {}
    for kind, theta_key, theta in ((SLIDING, "rope_local_base_freq", local_theta), (FULL, "rope_theta", rope.theta)):
        given = _mapping(label, nested, kind) | (scaling if kind == FULL else {})
        _refuse_partial(label, config, given)
        outside = [(theta_key, config.get(theta_key))]
        result[kind] = _one(label, f"rope_parameters.{kind}", given, outside, theta, rope)
    return result


def _one(
    label: str, name: str, given: Mapping[str, Any], outside: list[tuple[str, Any]], default: float, rope: Rope
) -> dict[str, Any]:
    where = f"{label}: {name}"
    thetas = [(key, value) for key, value in [("rope_theta", given.get("rope_theta")), *outside] if value is not None]
    if len({repr(value) for _, value in thetas}) > 1:
        why = f"is given twice, as {thetas[0][1]} and {thetas[1][1]}"
        raise InputRefused(f"{label}: {thetas[-1][0]}", why, "keep one")
    rope_type = given.get("rope_type") or given.get("type") or "default"
    if not isinstance(rope_type, str) or rope_type not in rope.types:
        raise InputRefused(f"{where}.rope_type = {rope_type!r:.60}", "not supported", f"known: {', '.join(rope.types)}")
    key, value = thetas[0] if thetas else ("rope_theta", default)
    result: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": number(f"{label}: {key}", value, above=0.0, at_most=1e12),
    }
    for key in _REQUIRED[rope_type]:
        result[key] = _value(where, key, given.get(key))
    for key in _OPTIONAL.get(rope_type, ()):
        if given.get(key) is not None:
            result[key] = _value(where, key, given[key])
    return result


def _mapping(label: str, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputRefused(f"{label}: {key}", "is not one plain set of parameters", "check the config")
    if value.get("rope_type", value.get("type")) in ("longrope", "su"):
        why = "tables of factors that change with the length of the text are not supported"
        raise InputRefused(f"{label}: {key}: longrope", why, "give the model's short-context version")
    if any(isinstance(item, (dict, list)) for item in value.values()):
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


def _partial(label: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    factors = [source[key] for source in (given, config) if (key := "partial_rotary_factor") in source]
    factors = [factor for factor in factors if factor is not None] or [1.0]
    if any(factor != factors[0] for factor in factors):
        raise InputRefused(f"{label}: partial_rotary_factor", "is given twice with different values", "keep one")
    return number(f"{label}: partial_rotary_factor", factors[0], above=0.0, at_most=1.0)


def _refuse_partial(label: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for source in (config, given):
        if source.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise InputRefused(f"{label}: partial_rotary_factor", "only 1.0 is supported for this family", "")
