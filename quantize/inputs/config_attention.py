"""How a family's blocks attend: heads, the window, and which blocks look through it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import Architecture
from qtool.quantize.inputs.config_numbers import CHECK, given_or, positive_int
from qtool.quantize.inputs.config_rope import FULL, SLIDING

MAX_HEAD_DIM = 2**13
MAX_CONTEXT = 2**27


def attention(label: str, raw: Mapping[str, Any], row: Architecture, sizes: Mapping[str, int]) -> dict[str, Any]:
    """num_key_value_heads, head_dim, sliding_window and layer_types, as far as the family has them.

    Args:
        label: how messages name the file.
        raw: config.json as it came.
        row: the family.
        sizes: its sizes, checked.

    Raises:
        InputRefused: sizes that do not fit each other, or blocks that attend in a way the family's network does not.
    """
    if row.attention == "none":
        return {}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if hidden % heads:
        why = f"is not a multiple of num_attention_heads = {heads}"
        raise InputRefused(f"{label}: hidden_size = {hidden}", why, CHECK)
    if row.attention == "positions":
        return {}
    kv_heads = given_or(raw, "num_key_value_heads", row.kv_heads_default or heads)
    positive_int(f"{label}: num_key_value_heads", kv_heads, at_most=heads)
    if heads % kv_heads:
        why = f"is not a multiple of num_key_value_heads = {kv_heads}"
        raise InputRefused(f"{label}: num_attention_heads = {heads}", why, CHECK)
    head_dim = given_or(raw, "head_dim", row.head_dim_default or hidden // heads)
    positive_int(f"{label}: head_dim", head_dim, at_most=MAX_HEAD_DIM)
    if head_dim % 2:
        raise InputRefused(f"{label}: head_dim = {head_dim}", "is odd, rotary positions need pairs", CHECK)
    window = _mixed_window if row.full_every else _window
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **window(label, raw, row, sizes["num_hidden_layers"]),
    }


def _window(label: str, raw: Mapping[str, Any], row: Architecture, layers: int) -> dict[str, Any]:
    """The sliding window: one for all blocks, or none. Blocks that differ are refused."""
    kinds = raw.get("layer_types")
    if raw.get("use_sliding_window") or (isinstance(kinds, list) and any(kind != FULL for kind in kinds)):
        raise InputRefused(f"{label}: use_sliding_window", "blocks that attend differently are not supported", "")
    if not row.windowed:
        return {}
    window = raw.get("sliding_window", row.window_default)
    if window is not None:
        window = positive_int(f"{label}: sliding_window", window, at_most=MAX_CONTEXT)
    return {"sliding_window": window}


def _mixed_window(label: str, raw: Mapping[str, Any], row: Architecture, layers: int) -> dict[str, Any]:
    """The window and, written out, the blocks that look through it."""
    kinds = raw.get("layer_types")
    if kinds is None:
        period = raw.get(row.period_key) if row.period_key else None
        every = row.full_every
        if period is not None:
            every = positive_int(f"{label}: {row.period_key}", period, at_most=1024)
        kinds = [SLIDING if (index + 1) % every else FULL for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        why = f"is not a list of one kind for each of the {layers} blocks"
        raise InputRefused(f"{label}: layer_types", why, CHECK)
    for kind in kinds:
        if kind not in (FULL, SLIDING):
            why = f"{kind!r:.40} is not a kind of attention of {row.model_type}"
            raise InputRefused(f"{label}: layer_types", why, f"supported: {FULL}, {SLIDING}")
    window = given_or(raw, "sliding_window", row.window_default)
    return {
        "sliding_window": positive_int(f"{label}: sliding_window", window, at_most=MAX_CONTEXT),
        "layer_types": kinds,
    }
