"""What a config asks for: every tensor with its shape, and every linear in the order it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qtool.quantize.architectures.architecture import Architecture, Symbol, TensorTemplate
from qtool.quantize.architectures.table import architecture_of

HEAD = "lm_head"


def tensor_templates(config: Mapping[str, Any]) -> Iterator[tuple[TensorTemplate, int | None]]:
    """Every tensor that exists under this config, with its block's index (None outside the blocks), in file order."""
    row = architecture_of(config)
    for template in row.outer:
        if _exists(template, config):
            yield template, None
    for index in range(config["num_hidden_layers"]):
        for template in row.block:
            if _exists(template, config):
                yield template, index


def tensor_name(template: TensorTemplate, index: int | None) -> str:
    """The Hugging Face name of a tensor in block `index`."""
    return template.name if index is None else f"model.layers.{index}.{template.name}"


def gguf_name(template: TensorTemplate, index: int | None) -> str:
    """The GGUF name of a tensor in block `index`."""
    return template.gguf if index is None else f"blk.{index}.{template.gguf}"


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor the config asks for; with tied embeddings the head is not among them.

    Args:
        config: a validated config; sizes that are absent take their family's default.
    """
    sizes = symbol_sizes(config, architecture_of(config))
    return {
        tensor_name(template, index): tuple(sizes[symbol] for symbol in template.shape)
        for template, index in tensor_templates(config)
    }


def block_linears(architecture: Architecture) -> tuple[str, ...]:
    """A block's linears in the order they run, without the block's prefix."""
    return tuple(name for group in architecture.linear_groups for name in group)


def linear_names(config: Mapping[str, Any]) -> list[str]:
    """All linear modules in forward order: the blocks' ("model.layers.3.mlp.down_proj"), then "lm_head"."""
    linears = block_linears(architecture_of(config))
    blocks = range(config["num_hidden_layers"])
    return [f"model.layers.{index}.{name}" for index in blocks for name in linears] + [HEAD]


def symbol_sizes(config: Mapping[str, Any], row: Architecture) -> dict[Symbol, int]:
    """The numbers behind the symbols of this family's shapes."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads") or row.kv_heads_default or heads
    head_dim: int = config.get("head_dim") or row.head_dim_default or config["hidden_size"] // heads
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "intermediate": config["intermediate_size"],
        "q": heads * head_dim,
        "kv": kv_heads * head_dim,
        "head_dim": head_dim,
    }


def _exists(template: TensorTemplate, config: Mapping[str, Any]) -> bool:
    if template.needs is None:
        return True
    if template.needs == "untied":
        return not config.get("tie_word_embeddings", False)
    return bool(config.get(template.needs, False))
