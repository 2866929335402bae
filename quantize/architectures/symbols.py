"""The numbers behind the symbols of a family's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from qtool.quantize.architectures.architecture import Architecture, Symbol
from qtool.quantize.architectures.settings import Size

Config = Mapping[str, Any]


def size(config: Config, row: Architecture, key: str) -> int:
    """A size of the config, or its family's default."""
    value = config.get(key)
    if value is not None:
        return int(value)
    defaults = {s.key: s.default for s in (*row.sizes, *row.settings) if isinstance(s, Size) and s.default is not None}
    return defaults[key]


def head_dim(config: Config, row: Architecture) -> int:
    """Channels of one attention head."""
    return config.get("head_dim") or row.head_dim_default or config["hidden_size"] // config["num_attention_heads"]


def kv_heads(config: Config, row: Architecture) -> int:
    """Heads of keys and values."""
    return config.get("num_key_value_heads") or row.kv_heads_default or config["num_attention_heads"]


def time_step_rank(config: Config) -> int:
    """Rank of a state space's time step; "auto" is a sixteenth of the channels, rounded up."""
    rank = config.get("time_step_rank", "auto")
    return math.ceil(config["hidden_size"] / 16) if rank == "auto" else int(rank)


def _q(config: Config, row: Architecture) -> int:
    return int(config["num_attention_heads"]) * head_dim(config, row)


def _kv(config: Config, row: Architecture) -> int:
    return kv_heads(config, row) * head_dim(config, row)


def _inner(config: Config, row: Architecture) -> int:
    return size(config, row, "expand") * int(config["hidden_size"])


def _conv(config: Config, row: Architecture) -> int:
    return _inner(config, row) + 2 * size(config, row, "n_groups") * size(config, row, "state_size")


SIZE_OF: Mapping[Symbol, Callable[[Config, Architecture], int]] = {
    "vocab": lambda config, row: size(config, row, "vocab_size"),
    "hidden": lambda config, row: size(config, row, "hidden_size"),
    "intermediate": lambda config, row: size(config, row, "intermediate_size"),
    "gate_up": lambda config, row: 2 * size(config, row, "intermediate_size"),
    "ffn": lambda config, row: size(config, row, "ffn_dim"),
    "moe_intermediate": lambda config, row: size(config, row, "moe_intermediate_size"),
    "heads": lambda config, row: size(config, row, "num_attention_heads"),
    "head_dim": head_dim,
    "q": _q,
    "kv": _kv,
    "qkv": lambda config, row: _q(config, row) + 2 * _kv(config, row),
    # OPT's table of positions begins with two rows that no token uses
    "positions": lambda config, row: (config.get("max_position_embeddings") or row.context_default or 0) + 2,
    "experts": lambda config, row: size(config, row, row.experts_key),
    "inner": _inner,
    "inner_pair": lambda config, row: 2 * _inner(config, row),
    "mixer_input": lambda config, row: _inner(config, row) + _conv(config, row) + size(config, row, "num_heads"),
    "conv": _conv,
    "kernel": lambda config, row: size(config, row, "conv_kernel"),
    "one": lambda config, row: 1,
    "state": lambda config, row: size(config, row, "state_size"),
    "selection": lambda config, row: time_step_rank(config) + 2 * size(config, row, "state_size"),
    "time_step": lambda config, row: time_step_rank(config),
    "ssm_heads": lambda config, row: size(config, row, "num_heads"),
}


def shape_of(shape: tuple[Symbol, ...], config: Config, row: Architecture) -> tuple[int, ...]:
    """A symbolic shape in numbers."""
    return tuple(SIZE_OF[symbol](config, row) for symbol in shape)


def symbol_sizes(config: Config, row: Architecture) -> dict[Symbol, int]:
    """The numbers behind all symbols that this family's config determines."""
    sizes: dict[Symbol, int] = {}
    for symbol, number in SIZE_OF.items():
        with suppress(KeyError):  # a size that the family does not have
            sizes[symbol] = number(config, row)
    return sizes
