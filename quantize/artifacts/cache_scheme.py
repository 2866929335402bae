"""What the key-value cache stores: the recipe's `kv` field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.errors import UsageError
from qtool.quantize.architectures import architecture_of, symbol_sizes, tensor_shapes
from qtool.quantize.artifacts.formats import FORMATS
from qtool.quantize.artifacts.rule import Strict

CACHED_KEY = "self_attn.k_proj"
SCALE_BITS = 16
CacheFormat = Literal["int8", "int4", "fp8_e4m3"]


@dataclass(frozen=True, kw_only=True)
class CacheCodes:
    """How the keys, or the values, of one token and head are stored.

    Attributes:
        format: of one code.
        symmetric: zero is the middle code; otherwise an offset is stored with every scale.
        group_size: channels that share a scale; None: the head's.
    """

    format: CacheFormat
    symmetric: bool
    group_size: int | None

    def __str__(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        return f"{self.format}{'' if self.symmetric else ' asym'}{group}"

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return FORMATS[self.format].bits

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one token in one head: packed codes, scales and offsets."""
        groups = head_dim // (self.group_size or head_dim)
        return -(-head_dim * self.bits // 8) + groups * (SCALE_BITS // 8) * (1 if self.symmetric else 2)


class CacheScheme(Strict):
    """How keys and values are kept, with dynamic scales per token and head, for all layers.

    Attributes:
        format: of the codes.
        values: of the values' codes where it is not the keys'; keys usually need more bits.
        symmetric: zero is the middle code; otherwise an offset is stored. None: asymmetric for int4, symmetric for the
            others.
        group_size: channels of a head that share a scale; None: all of them.
        rotate: R3, an orthonormal Hadamard transform of every head's queries and keys behind the rotary positions (and
            the heads' norms). It cancels in q · k and spreads a key's outlier channels over the head.
        before_bias: keys are quantized before k_proj's bias is added and before the rotary positions; both are applied
            to what the codes stand for.
        past_only: a token sees its own key and value in float and only earlier ones through their codes (WKVQuant,
            2402.12065); the same in prefill, position by position, as in decoding.
    """

    format: CacheFormat
    values: CacheFormat | None = None
    symmetric: bool | None = None
    group_size: Literal[16, 32, 64, 128] | None = None
    rotate: bool = False
    before_bias: bool = False
    past_only: bool = False

    def __str__(self) -> str:
        same = self.key_codes == self.value_codes
        parts = [f"KV {self.key_codes}"] if same else [f"K {self.key_codes} V {self.value_codes}"]
        parts += [name.replace("_", " ") for name in ("rotate", "before_bias", "past_only") if getattr(self, name)]
        return " ".join(parts)

    @property
    def key_codes(self) -> CacheCodes:
        """How keys are stored."""
        return self._codes(self.format)

    @property
    def value_codes(self) -> CacheCodes:
        """How values are stored."""
        return self._codes(self.values or self.format)

    def check(self) -> None:
        """Raises UsageError for a combination that means nothing."""
        if self.symmetric is False and "fp8_e4m3" in (self.format, self.values):
            raise UsageError("kv: symmetric: false", "float formats have no offset", "remove it")
        if self.rotate and self.before_bias:
            why = "a rotation cancels only behind the rotary positions, where before_bias does not quantize"
            raise UsageError("kv: rotate and before_bias", why, "choose one of them")

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Raises UsageError when a model of this config has no such cache."""
        row = architecture_of(config)
        if row.attention == "none":
            raise UsageError("kv", f"{row.model_type} has no key-value cache", "remove it")
        head_dim = _heads(config)[1]
        if self.group_size and head_dim % self.group_size:
            raise UsageError(f"kv: group_size: {self.group_size}", f"does not divide heads of {head_dim}", "remove it")
        biased = any(name.endswith(f"{CACHED_KEY}.bias") for name in tensor_shapes(config))
        if self.before_bias and (not biased or row.attention != "rotary" or row.head_norms):
            why = f"this {row.model_type} has no key bias that meets the rotary positions directly"
            raise UsageError("kv: before_bias", why, "remove it; rotate helps any model")

    def token_bytes(self, config: Mapping[str, Any]) -> int:
        """Bytes of one token in the cache of the whole model, scales and offsets counted."""
        heads, head_dim = _heads(config)
        return heads * (self.key_codes.head_bytes(head_dim) + self.value_codes.head_bytes(head_dim))

    def describe(self, config: Mapping[str, Any]) -> str:
        """The scheme, and what a token costs under it."""
        heads, head_dim = _heads(config)
        in_float = heads * 2 * head_dim * 2
        return f"{self}: {self.token_bytes(config):,} bytes per token with scales, 16-bit floats {in_float:,}"

    def _codes(self, fmt: CacheFormat) -> CacheCodes:
        symmetric = fmt != "int4" if self.symmetric is None else self.symmetric
        return CacheCodes(format=fmt, symmetric=symmetric, group_size=self.group_size)


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of keys in all layers together, and their width."""
    sizes = symbol_sizes(config, architecture_of(config))
    return int(config["num_hidden_layers"]) * (sizes["kv"] // sizes["head_dim"]), sizes["head_dim"]
