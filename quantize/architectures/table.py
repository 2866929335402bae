"""The supported families, one value each. Defaults are those of transformers' configuration classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures.architecture import Architecture
from qtool.quantize.architectures.families_dense import DENSE_ROWS
from qtool.quantize.architectures.families_experts import EXPERT_ROWS
from qtool.quantize.architectures.families_llama import LLAMA_ROWS
from qtool.quantize.architectures.families_state_space import STATE_SPACE_ROWS

ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row for row in (*LLAMA_ROWS, *EXPERT_ROWS, *DENSE_ROWS, *STATE_SPACE_ROWS)
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The family of this config.

    Raises:
        InputRefused: when the model type is missing or unknown; the message lists what is supported.
    """
    model_type = config.get("model_type")
    row = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if row is None:
        raise InputRefused(
            f"config.json: model_type = {model_type!r:.80}",
            "this architecture is not supported",
            f"supported: {', '.join(ARCHITECTURES)}",
        )
    return row


def require_quantizable(config: Mapping[str, Any]) -> Architecture:
    """The family of this config, for a command that quantizes or exports.

    Raises:
        InputRefused: when qtool can open and measure the family but not quantize it.
    """
    row = architecture_of(config)
    if not row.quantizable:
        known = ", ".join(name for name, other in ARCHITECTURES.items() if other.quantizable)
        why = f"is not quantized or exported yet (these are: {known})"
        raise InputRefused(f"model_type {row.model_type}", why, "it can be measured: qtool measure")
    return row
