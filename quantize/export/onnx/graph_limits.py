"""What the graph does not compute although its config asks for it: refused by name instead of exported wrong.

Each row was found by comparing an exported model with transformers; the rest of a config is covered by the same
comparison in the tests, and by the verification of every package.
"""

from __future__ import annotations

from typing import Any

from qtool.errors import InputRefused

# Rotary tables are baked into the file, so scalings that depend on the running length cannot be right.
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
HEAD_SIZE_MULTIPLE = 16


def refuse_uncomputable(config: Any) -> None:
    """Check a transformers config.

    Raises:
        InputRefused: naming the field that has no equal in the graph.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise _refused(f"rope_type {kind!r}", "depends on the length of the text; the graph's tables are fixed")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("partial_rotary_factor", "GroupQueryAttention rotates whole heads only")
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise _refused("layer_types", "the graph has one kind of attention for all layers")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head % HEAD_SIZE_MULTIPLE:
        raise _refused(f"head size {head}", f"GroupQueryAttention wants a multiple of {HEAD_SIZE_MULTIPLE}")


def _refused(what: str, why: str) -> InputRefused:
    return InputRefused(f"config.json: {what}", why, "this model cannot be exported; evaluate it as a checkpoint")
