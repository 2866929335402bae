"""The residual stream of one model: a family's `Stream` with the config's numbers and every block's names in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qtool.quantize.architectures import Edge, architecture_of, expert_count, symbol_sizes


@dataclass(frozen=True, kw_only=True)
class NormPlace:
    """A norm that reads the residual stream.

    Attributes:
        norm: its module.
        readers: the linears that read what it hands out.
    """

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EdgePlace:
    """Two linears joined channel by channel.

    Attributes:
        kind: "values" (through attention) or "inner" (through the middle of the MLP).
        block: the decoder block.
        writer: the linear whose rows start … stop make the channels.
        reader: the linear whose columns take them.
        repeats: columns of the reader per row of the writer: query heads per head of values; 1 for "inner".
        head_dim: channels of a head; 0 for "inner".
    """

    kind: Literal["values", "inner"]
    block: int
    writer: str
    reader: str
    start: int
    stop: int
    repeats: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What offline transforms touch, as full module names.

    Attributes:
        norms: in order, the final norm last.
        writers: the linears that add to the stream.
        embeddings: the modules whose rows start the stream.
        edges: where scales may move between two linears.
    """

    norms: tuple[NormPlace, ...]
    writers: tuple[str, ...]
    embeddings: tuple[str, ...]
    edges: tuple[EdgePlace, ...]


def wiring_of(config: Mapping[str, Any]) -> Wiring:
    """The wiring of the model with this validated config."""
    row = architecture_of(config)
    stream, spine = row.stream, row.spine
    norms: list[NormPlace] = []
    writers: list[str] = []
    edges: list[EdgePlace] = []
    for block in range(config["num_hidden_layers"]):
        prefix = f"{spine.blocks}.{block}."
        for norm, readers in zip(row.norms, stream.readers, strict=True):
            if readers:
                norms.append(NormPlace(norm=prefix + norm, readers=_full(config, prefix, readers)))
        writers.extend(_full(config, prefix, stream.writers))
        edges.extend(_edges(config, block, prefix))
    norms.append(NormPlace(norm=spine.final_norm, readers=(spine.head,)))
    embeddings = (spine.embedding, stream.positions) if stream.positions else (spine.embedding,)
    return Wiring(norms=tuple(norms), writers=tuple(writers), embeddings=embeddings, edges=tuple(edges))


def _edges(config: Mapping[str, Any], block: int, prefix: str) -> list[EdgePlace]:
    row = architecture_of(config)
    sizes: Mapping[str, int] = {str(symbol): number for symbol, number in symbol_sizes(config, row).items()}
    found: list[EdgePlace] = []
    kinds: tuple[tuple[Literal["values", "inner"], Edge | None], ...] = (
        ("values", row.stream.values),
        ("inner", row.stream.inner),
    )
    for kind, edge in kinds:
        if edge is None:
            continue
        width, head_dim, repeats = _channels(kind, edge, sizes, config)
        start = sum(sizes[symbol] for symbol in edge.parts[: edge.part])
        writers, readers = _full(config, prefix, (edge.writer,)), _full(config, prefix, (edge.reader,))
        found.extend(
            EdgePlace(
                kind=kind, block=block, writer=writer, reader=reader, start=start, stop=start + width,
                repeats=repeats, head_dim=head_dim,
            )
            for writer, reader in zip(writers, readers, strict=True)
        )  # fmt: skip
    return found


def _channels(kind: str, edge: Edge, sizes: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(channels of the writer, head_dim, repeats)."""
    if kind == "values":
        return sizes["kv"], sizes["head_dim"], sizes["q"] // sizes["kv"]
    row = architecture_of(config)
    shapes = {template.name: template.shape for template in row.block}
    return sizes[shapes[f"{edge.reader}.weight"][1]], 0, 1


def _full(config: Mapping[str, Any], prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    experts = range(expert_count(config))
    return tuple(
        prefix + name.format(expert=expert) for name in names for expert in (experts if "{expert}" in name else (None,))
    )
