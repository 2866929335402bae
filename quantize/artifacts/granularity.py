"""Which elements share one scale.

Shape symbols: weights are [N, K] (out_features, in_features), activations [M, K] (tokens, in_features).
"""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class PerTokenSmoothed:
    """Runtime Smooth: one scale per token, times one factor per block of `group_size` along K that is found from all
    tokens of the same request, each divided by its own size: [M, 1] and [K / group_size] (kernels/runtime_smooth).
    """

    group_size: int
    name = "per_token_smoothed"


@dataclass(frozen=True)
class PerTokenSmoothedAsPublished:
    """PerTokenSmoothed, its factors the plain maxima over the request."""

    group_size: int
    name = "per_token_smoothed_published"


Granularity = (
    PerTensor | PerChannel | PerGroup | PerToken | PerTokenGroup | PerTokenSmoothed | PerTokenSmoothedAsPublished
)
Grouped = PerGroup | PerTokenGroup | PerTokenSmoothed | PerTokenSmoothedAsPublished

_PLAIN: dict[str, Granularity] = {g.name: g for g in (PerTensor(), PerChannel(), PerToken())}
_GROUPED: dict[str, Callable[[int], Grouped]] = {
    g.name: g for g in (PerGroup, PerTokenGroup, PerTokenSmoothed, PerTokenSmoothedAsPublished)
}


def group_size_of(granularity: Granularity) -> int | None:
    """The group size along K, or None where one scale spans all of K."""
    return granularity.group_size if isinstance(granularity, Grouped) else None


def granularity_from(name: str, group_size: int | None) -> Granularity:
    """The granularity with this name; the inverse of `.name` and `group_size_of`. Unknown names raise KeyError."""
    if group_size is None:
        return _PLAIN[name]
    return _GROUPED[name](group_size)
