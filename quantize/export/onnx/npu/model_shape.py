"""What of a config the static graphs are built from, and which configs they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.static_graphs import StaticShapes

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEAD_NORMED = ("qwen3",)
SMALLEST_CHUNK = 2


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder.

    Attributes:
        head_norms: whether queries and keys are normed by head before they are rotated.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab_size: int
    epsilon: float
    head_norms: bool

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def static(self, chunk: int, context: int) -> StaticShapes:
        """The shapes of both graphs."""
        return StaticShapes(
            chunk=chunk,
            context=context,
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
        )


def model_shape(config: Mapping[str, Any], *, chunk: int, context: int, target: str = "npu") -> ModelShape:
    """The shape of a config.

    Args:
        config: the model's config.json.
        chunk: the most tokens of a call.
        context: tokens the cache holds.
        target: whose graph it is, for messages.

    Raises:
        InputRefused: a family or setting that the static graphs do not compute.
        UsageError: a chunk or context that does not fit.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        why = f"target {target} computes dense decoders only ({', '.join(FAMILIES)})"
        raise InputRefused(f"config.json: model_type {family!r}", why, "export it with --target cpu, if it has a graph")
    refused = (
        (config.get("hidden_act", "silu") != "silu", "hidden_act", f"target {target} computes silu"),
        (_partial(config), "partial_rotary_factor", f"target {target} rotates whole heads"),
        (_reach(config) < context, "sliding_window", f"reaches back fewer than the {context} slots of the cache"),
    )
    for wrong, key, why in refused:
        if wrong:
            remedy = f"ask for --context {_reach(config)} or less" if key == "sliding_window" else "use --target cpu"
            raise InputRefused(f"config.json: {key}", why, remedy)
    longest = int(config["max_position_embeddings"])
    if not SMALLEST_CHUNK <= chunk < context:
        why = "a chunk has at least 2 tokens and fewer than the context"
        raise UsageError(f"chunk {chunk}, context {context}", why, "for example --chunk 128 --context 1024")
    if context > longest:
        why = f"the model reads at most {longest} tokens"
        raise UsageError(f"context {context}", why, f"ask for {longest} or less")
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return ModelShape(
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        layers=int(config["num_hidden_layers"]),
        vocab_size=int(config["vocab_size"]),
        epsilon=float(config["rms_norm_eps"]),
        head_norms=family in HEAD_NORMED,
    )


def _partial(config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_parameters") or {}
    return rope.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0)


def _reach(config: Mapping[str, Any]) -> int:
    window = config.get("sliding_window")
    layers = config.get("layer_types") or ()
    switched_on = config.get("use_sliding_window", True) and (not layers or "sliding_attention" in layers)
    return int(window) if window and switched_on else 2**31
