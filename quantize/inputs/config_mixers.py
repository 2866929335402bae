"""Sizes of experts and state spaces that must fit each other or follow from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import architecture_of
from qtool.quantize.architectures.symbols import time_step_rank
from qtool.quantize.inputs.config_numbers import CHECK, positive_int

MAX_ALL_EXPERTS = 2**16


def derived_sizes(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from the config's sizes.

    Args:
        label: how messages name the file.
        raw: config.json as it came.
        config: the canonical config so far, each of its values checked by itself.

    Raises:
        InputRefused: naming the two values that contradict each other.
    """
    check = _CHECKS.get(config["model_type"])
    row = architecture_of(config)
    if row.experts_key and config["num_experts_per_tok"] > config[row.experts_key]:
        why = f"is more than {row.experts_key} = {config[row.experts_key]}"
        raise InputRefused(f"{label}: num_experts_per_tok = {config['num_experts_per_tok']}", why, CHECK)
    if row.experts_key and config["num_hidden_layers"] * config[row.experts_key] > MAX_ALL_EXPERTS:
        why = f"in each of {config['num_hidden_layers']} blocks are more than any model has"
        raise InputRefused(f"{label}: {row.experts_key} = {config[row.experts_key]}", why, CHECK)
    return check(label, raw, config) if check else {}


def _mamba(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config["expand"] * config["hidden_size"]
    _agree(label, raw, "intermediate_size", inner, "expand × hidden_size")
    return {"intermediate_size": inner, "time_step_rank": _rank(label, raw, config)}


def _mamba2(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config["expand"] * config["hidden_size"]
    _agree(label, raw, "intermediate_size", inner, "expand × hidden_size")
    if config["num_heads"] * config["head_dim"] != inner:
        why = f"times head_dim = {config['head_dim']} is not expand × hidden_size = {inner}"
        raise InputRefused(f"{label}: num_heads = {config['num_heads']}", why, CHECK)
    if config["num_heads"] % config["n_groups"]:
        why = f"does not divide num_heads = {config['num_heads']}"
        raise InputRefused(f"{label}: n_groups = {config['n_groups']}", why, CHECK)
    return {"time_step_rank": _rank(label, raw, config)}


def _opt(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    _agree(label, raw, "word_embed_proj_dim", config["hidden_size"], "hidden_size; projections are not supported")
    return {"word_embed_proj_dim": config["hidden_size"]}


def _agree(label: str, raw: Mapping[str, Any], key: str, wanted: int, what: str) -> None:
    value = raw.get(key)
    if value is not None and positive_int(f"{label}: {key}", value, at_most=2**24) != wanted:
        raise InputRefused(f"{label}: {key} = {value}", f"is not {wanted}, which is {what}", CHECK)


def _rank(label: str, raw: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    rank = raw.get("time_step_rank")
    if rank is None or rank == "auto":
        return time_step_rank(config)
    return positive_int(f"{label}: time_step_rank", rank, at_most=2**17)


_CHECKS: Mapping[str, Callable[[str, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "mamba": _mamba,
    "mamba2": _mamba2,
    "opt": _opt,
}
