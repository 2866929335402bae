"""What a config asks for: every tensor with its shape, and every linear in the order it runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtool.quantize.architectures.architecture import Architecture, TensorTemplate
from qtool.quantize.architectures.symbols import shape_of, size
from qtool.quantize.architectures.table import architecture_of


@dataclass(frozen=True)
class Expected:
    """One tensor that a config asks for.

    Attributes:
        name: its full name.
        template: what it was made from.
        prefix: what precedes the template's name, "" or "model.layers.3.".
        expert: the expert it belongs to.
        shape: its dimensions.
    """

    name: str
    template: TensorTemplate
    prefix: str
    expert: int | None
    shape: tuple[int, ...]


def tensor_templates(config: Mapping[str, Any]) -> Iterator[tuple[TensorTemplate, int | None]]:
    """Every template that exists under this config, with its block's index (None outside the blocks), in file order."""
    row = architecture_of(config)
    for template in row.outer:
        if _exists(template, config, row):
            yield template, None
    for index in range(config["num_hidden_layers"]):
        for template in row.block:
            if _exists(template, config, row):
                yield template, index


def expected_tensors(config: Mapping[str, Any]) -> Iterator[Expected]:
    """Every tensor that exists under this config, each expert's included, in file order.

    Args:
        config: a validated config; sizes that are absent take their family's default.
    """
    row = architecture_of(config)
    every_expert = range(expert_count(config))
    shapes = {template.name: shape_of(template.shape, config, row) for template in (*row.outer, *row.block)}
    for template, index in tensor_templates(config):
        prefix = "" if index is None else f"{row.spine.blocks}.{index}."
        for expert in every_expert if template.per_expert else (None,):
            name = prefix + template.name.format(expert=expert)
            yield Expected(name, template, prefix, expert, shapes[template.name])


def gguf_name(template: TensorTemplate, index: int | None) -> str:
    """The GGUF name of a tensor in block `index`."""
    return template.gguf if index is None else f"blk.{index}.{template.gguf}"


def tensor_name(row: Architecture, template: TensorTemplate, index: int | None) -> str:
    """The name of a tensor in block `index` that belongs to no expert."""
    return template.name if index is None else f"{row.spine.blocks}.{index}.{template.name}"


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor the config asks for; with tied embeddings the head is not among them.

    Args:
        config: a validated config; sizes that are absent take their family's default.
    """
    return {tensor.name: tensor.shape for tensor in expected_tensors(config)}


def expert_count(config: Mapping[str, Any]) -> int:
    """How many experts a block has; 0 for a dense family."""
    row = architecture_of(config)
    return size(config, row, row.experts_key) if row.experts_key else 0


def block_linears(architecture: Architecture) -> tuple[str, ...]:
    """A block's linears in the order they run, without the block's prefix and without experts."""
    return tuple(name for group in architecture.linear_groups for name in group)


def linear_names(config: Mapping[str, Any]) -> list[str]:
    """All linear modules in forward order: the blocks' ("model.layers.3.mlp.down_proj"), in each block those of its
    experts last and expert by expert ("model.layers.3.mlp.experts.0.down_proj"), then the head ("lm_head")."""
    row = architecture_of(config)
    of_expert = [name for group in row.expert_groups for name in group]
    experts = [f"{row.experts}.{expert}.{name}" for expert in range(expert_count(config)) for name in of_expert]
    linears = (*block_linears(row), *experts)
    blocks = range(config["num_hidden_layers"])
    return [f"{row.spine.blocks}.{index}.{name}" for index in blocks for name in linears] + [row.spine.head]


def _exists(template: TensorTemplate, config: Mapping[str, Any], row: Architecture) -> bool:
    if template.needs is None:
        return True
    if template.needs == "untied":
        return not config.get("tie_word_embeddings", row.tied_default)
    return bool(config.get(template.needs, template.needs in row.flags_on))
