"""Which linears of a graph for prompts are INT8, where a user limits the memory that the graph may take.

A session packs its own copy of every weight, also of one that another session has packed from the same file. So a
linear left in its stored form costs memory as well: bits / 8 + 8 / block bytes a weight (a scale and a sum a block),
0.625 at 4 bits in groups of 64, against 1 in INT8. Measured on SmolLM2-135M (ONNX Runtime 1.31): with all linears in
INT8 the session of fill.onnx takes 110 MB, with down_proj left in 4 bits 101 MB; this counts 105 and 95, and not what
every session takes.

In a prompt every linear is bound by arithmetic: the time that INT8 saves follows the products, hence the weights, for
all linears alike (2.2 to 3.3 ns a weight at 512 tokens, from 576 × 576 to 4096 × 14336). So the choice that reads the
most weights in INT8 is the fastest within a limit. Kinds of linear are chosen whole (all linears that read one input of
a layer), so that every layer computes in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import onnx_ir as ir

from qtool.errors import UsageError
from qtool.quantize.artifacts.granularity import PerGroup
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.export.onnx.linears import HEAD, Linear, SchemeOf, find_linears

# A scale and the sum of its codes, float32 each: of a channel in INT8, of a block otherwise.
SCALE_AND_SUM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PromptKind:
    """All linears of a graph for prompts that read the same input of their layers.

    Attributes:
        leaves: what they are called in their layers, ("gate_proj", "up_proj").
        weights: how many, of all layers.
        int8_bytes, stored_bytes: what a session's copy takes, in INT8 and in the checkpoint's own form.
    """

    leaves: tuple[str, ...]
    weights: int
    int8_bytes: int
    stored_bytes: int


def prompt_kinds(graph: ir.Graph, outputs: Sequence[ir.Value], scheme_of: SchemeOf) -> list[PromptKind]:
    """The kinds of quantized linears that some outputs of a graph need, largest first.

    Args:
        graph: not lowered yet.
        outputs: what the graph for prompts hands out.
        scheme_of: the checkpoint's own scheme of a module, None for float.
    """
    needed = _behind(outputs)
    by_input: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(graph):
        quantized = all(scheme_of(module) is not None for module in linear.modules)
        if linear.modules != (HEAD,) and quantized and linear.nodes[-1] in needed:
            by_input.setdefault(linear.x, []).append(linear)
    found: dict[tuple[str, ...], list[PromptKind]] = {}
    for linears in by_input.values():
        leaves = tuple(module.rpartition(".")[2] for linear in linears for module in linear.modules)
        found.setdefault(leaves, []).append(_kind(leaves, linears, scheme_of))
    kinds = [_sum(parts) for parts in found.values()]
    return sorted(kinds, key=lambda kind: (-kind.weights, kind.leaves))


def choose_int8(
    kinds: Sequence[PromptKind], limit_bytes: int | None, beside_bytes: int = 0
) -> tuple[PromptKind, ...]:
    """The kinds that are INT8; the others stay in their stored form.

    Args:
        kinds: all of a graph.
        limit_bytes: of the session's copies of all of them; None for no limit.
        beside_bytes: what else counts: the head's copy, where there is one.

    Raises:
        UsageError: when even the smallest choice exceeds the limit, with the smallest limit that does not.
    """
    if limit_bytes is None:
        return tuple(kinds)
    choices = [part for count in range(1, len(kinds) + 1) for part in combinations(kinds, count)]
    within = [choice for choice in choices if memory_bytes(kinds, choice) + beside_bytes <= limit_bytes]
    if not within:
        least = min((memory_bytes(kinds, choice) for choice in choices), default=0) + beside_bytes
        why = f"is less than a graph for prompts takes: {least / 1e6:.1f} MB with the fewest weights in INT8"
        remedy = f"allow {-(-least // 10**6)}MB, or leave out --prefill"
        raise UsageError(f"--prefill-memory {limit_bytes / 1e6:.1f}MB", why, remedy)
    return max(within, key=lambda choice: (sum(kind.weights for kind in choice), -memory_bytes(kinds, choice)))


def memory_bytes(kinds: Iterable[PromptKind], chosen: Iterable[PromptKind]) -> int:
    """What a session's copies of all linears take, the chosen ones in INT8."""
    int8 = set(chosen)
    return sum(kind.int8_bytes if kind in int8 else kind.stored_bytes for kind in kinds)


def head_bytes(graph: ir.Graph, scheme_of: SchemeOf) -> int:
    """What a session's copy of the head takes, in its stored form; a float one is packed as it is."""
    head = next(linear for linear in find_linears(graph) if linear.modules == (HEAD,))
    scheme, rows = scheme_of(HEAD), sum(head.rows)
    return rows * (4 * head.columns if scheme is None else _row_bytes(scheme, head.columns))


def _kind(leaves: tuple[str, ...], linears: Sequence[Linear], scheme_of: SchemeOf) -> PromptKind:
    weights = int8 = stored = 0
    for linear in linears:
        for module, rows in zip(linear.modules, linear.rows, strict=True):
            scheme = scheme_of(module)
            assert scheme is not None
            weights += rows * linear.columns
            int8 += rows * (linear.columns + SCALE_AND_SUM_BYTES)
            stored += rows * _row_bytes(scheme, linear.columns)
    return PromptKind(leaves=leaves, weights=weights, int8_bytes=int8, stored_bytes=stored)


def _sum(parts: Sequence[PromptKind]) -> PromptKind:
    return PromptKind(
        leaves=parts[0].leaves,
        weights=sum(part.weights for part in parts),
        int8_bytes=sum(part.int8_bytes for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
    )


def _row_bytes(scheme: LayerScheme, columns: int) -> int:
    weight = scheme.weight
    block = weight.granularity.group_size if isinstance(weight.granularity, PerGroup) else columns
    return -(-columns // block) * (block * weight.format.bits // 8 + SCALE_AND_SUM_BYTES)


def _behind(outputs: Sequence[ir.Value]) -> set[ir.Node]:
    """Every node that some values are made by."""
    nodes: set[ir.Node] = set()
    waiting = [value.producer() for value in outputs]
    while waiting:
        node = waiting.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return nodes
