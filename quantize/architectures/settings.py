"""What a family reads from config.json beyond its shapes, as data: keys, defaults and what is allowed.

Defaults are those of transformers' configuration classes. A null value means the same as an absent key, except where
a setting says that null turns something off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Size:
    """A positive integer.

    Attributes:
        key: its name in config.json.
        at_most: the largest value that a model can have.
        default: what an absent key means; None: the key must be there.
        other_names: older or newer names of the same key.
    """

    key: str
    at_most: int
    default: int | None = None
    other_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Number:
    """A float in (above, at_most]; default None: absent and null both mean "off"; `off_by_null`: only null does."""

    key: str
    at_most: float
    above: float = 0.0
    default: float | None = None
    off_by_null: bool = False


@dataclass(frozen=True, kw_only=True)
class Range:
    """A pair of floats, low and high, 0 <= low < high; infinity is written as the largest float32."""

    key: str
    default: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """true or false."""

    key: str
    default: bool


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several words; `allowed` maps every spelling to the one that is kept."""

    key: str
    default: str
    allowed: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A key with one supported value, which an absent key means too; `why` explains the refusal of any other."""

    key: str
    value: Any
    why: str


Setting = Size | Number | Range | Switch | Choice | Fixed


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of a family.

    Attributes:
        theta: what an absent rope_theta means.
        types: the supported kinds.
        absent: the parameters that an absent set of parameters means, without theta.
        partial: a part of each head may be rotated (partial_rotary_factor).
        local_theta: for a family whose sliding blocks have parameters of their own, their default theta.
    """

    theta: float = 10000.0
    types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    absent: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    local_theta: float | None = None


ROTARY = Rope()
VOCABULARY = Size(key="vocab_size", at_most=2**22)
HIDDEN = Size(key="hidden_size", at_most=2**17)
INTERMEDIATE = Size(key="intermediate_size", at_most=2**20)
LAYERS = Size(key="num_hidden_layers", at_most=1024)
HEADS = Size(key="num_attention_heads", at_most=4096)
SIZES = (VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS)

SILU = Choice(key="hidden_act", default="silu", allowed={"silu": "silu", "swish": "silu"})


def rms_epsilon(default: float, key: str = "rms_norm_eps") -> Number:
    """The norms' epsilon."""
    return Number(key=key, default=default, at_most=0.1)


RMS_EPSILON = rms_epsilon(1e-6)
