"""Which elements share one scale.

Shape symbols: weights are [N, K] (out_features, in_features), activations [M, K] (tokens, in_features).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    name = "per_tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per output channel of a weight: [N, 1]."""

    name = "per_channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per output channel and group of `group_size` along K: [N, ceil(K / group_size)].

    The last group of a K that does not divide is short; it is padded with zeros where a layout needs it.
    """

    group_size: int
    name = "per_group"


@dataclass(frozen=True)
class PerToken:
    """One scale per token (row) of an activation, found at run time: [M, 1]."""

    name = "per_token"


@dataclass(frozen=True)
class PerTokenGroup:
    """One scale per token and block of `group_size` along K, found at run time: [M, ceil(K / group_size)].

    This is what ONNX Runtime's MatMulNBits computes at accuracy_level 4, with group_size equal to its block_size.
    """

    group_size: int
    name = "per_token_group"


Granularity = PerTensor | PerChannel | PerGroup | PerToken | PerTokenGroup

_PLAIN: dict[str, Granularity] = {g.name: g for g in (PerTensor(), PerChannel(), PerToken())}
_GROUPED: dict[str, type[PerGroup] | type[PerTokenGroup]] = {g.name: g for g in (PerGroup, PerTokenGroup)}


def group_size_of(granularity: Granularity) -> int | None:
    """The group size along K, or None where one scale spans all of K."""
    return granularity.group_size if isinstance(granularity, PerGroup | PerTokenGroup) else None


def granularity_from(name: str, group_size: int | None) -> Granularity:
    """The granularity with this name; the inverse of `.name` and `group_size_of`. Unknown names raise KeyError."""
    if group_size is None:
        return _PLAIN[name]
    return _GROUPED[name](group_size)
