"""Scales and zero points of a graph's tensors, from their ranges.

Tensors that only move values share one range. A few ranges are known without text: shares, sigmoids, the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qtool.errors import InputRefused
from qtool.quantize.artifacts.static_graphs import MASK
from qtool.quantize.export.onnx.npu.activation_types import ActivationTypes
from qtool.quantize.export.onnx.npu.attention import MASKED_SCORES, SCORES
from qtool.quantize.export.onnx.npu.plain_graph import MOVEMENT, PlainGraph
from qtool.quantize.export.onnx.npu.ranges import Range

# Scores this far below the smallest one have no share that 16 bits can hold, over any context: e⁻¹⁶ is 1e-7.
MASKED_BELOW = 16.0
SMALLEST_SCALE = 1e-10
# Outputs from 0 to 1. The QNN execution provider replaces any other output scale of a 16-bit Sigmoid by 2⁻¹⁶.
UNIT_OPS = ("Sigmoid", "Softmax")
UNIT = 65535 / 65536
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """value = scale × (code − zero_point), codes unsigned with `bits` bits."""

    scale: float
    zero_point: int
    bits: int

    def codes(self, values: Array) -> Array:
        """Unsigned codes of floats."""
        top = (1 << self.bits) - 1
        found = np.clip(np.rint(values / np.float32(self.scale)) + self.zero_point, 0, top)
        codes: Array = found.astype(np.uint8 if self.bits == 8 else np.uint16)
        return codes


def scale_of(found: Range, bits: int) -> Scale:
    """The scale that holds a range and zero."""
    top = (1 << bits) - 1
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    step = np.float32(max((high - low) / top, SMALLEST_SCALE))
    return Scale(scale=float(step), zero_point=int(np.clip(np.rint(-low / step), 0, top)), bits=bits)


class SharedRanges:
    """The range of every tensor, constant and cache input of a graph.

    Args:
        graph: any width.
        measured: by tensor; the derived ones need not be among them.
        constants: of vectors and tables.
        headroom: by which share the measured ranges of 16-bit tensors are widened; 8 bits have no codes to spare.
    """

    def __init__(
        self, graph: PlainGraph, measured: Mapping[str, Range], constants: Mapping[str, Range], headroom: float
    ) -> None:
        self._parent: dict[str, str] = {}
        for node in graph.nodes:
            if node.op in MOVEMENT:
                for name in node.inputs if node.op == "Concat" else node.inputs[:1]:
                    self._parent[self.root(name)] = self.root(node.output)
        self._ranges = {
            bits: self._together(graph, {name: found.widened(share) for name, found in measured.items()}, constants)
            for bits, share in ((16, headroom), (8, 0.0))
        }

    def _together(
        self, graph: PlainGraph, measured: Mapping[str, Range], constants: Mapping[str, Range]
    ) -> dict[str, Range]:
        derived = _derived(graph, measured)
        ranges: dict[str, Range] = {}
        for name, found in (*measured.items(), *constants.items()):
            root = self.root(name)
            ranges[root] = found if root not in ranges else ranges[root].merge(found)
        return ranges | {self.root(name): found for name, found in derived.items()}

    def root(self, name: str) -> str:
        """The tensor that stands for all that share this one's range."""
        while name in self._parent and self._parent[name] != name:
            name = self._parent[name]
        return name

    def seen(self, name: str) -> Range | None:
        """The range of a tensor as it was measured, None where it was not."""
        return self._ranges[8].get(self.root(name))

    def find(self, name: str, bits: int) -> Range:
        """The range of a tensor that is stored in so many bits.

        Raises:
            InputRefused: when nothing is known of it.
        """
        found = self._ranges[bits].get(self.root(name))
        if found is None:
            raise InputRefused(name, "has no range", "calibrate again with text")
        return found


def too_coarse(
    graph: PlainGraph,
    types: ActivationTypes,
    ranges: SharedRanges,
    fixed: Mapping[tuple[str, int], Scale],
    largest_error: float,
) -> dict[str, float]:
    """Nodes whose 8-bit activations lose too much: output tensor → the rounding's share of the tensor's own rms.

    Args:
        graph, ranges: with root mean squares of what was measured.
        types: before.
        fixed: scales that a checkpoint was scored with; they are not judged again.
        largest_error: step / √12 over rms that still passes.
    """
    found: dict[str, float] = {}
    for node in graph.nodes:
        if types.bits(node) != 8:
            continue
        names = [node.output, *(name for name in node.inputs if (name, 8) not in fixed)]
        errors = [_rounding_error(ranges.seen(name)) for name in names if name not in graph.constants]
        if max(errors) > largest_error:
            found[node.output] = max(errors)
    return found


def _rounding_error(found: Range | None) -> float:
    if found is None or found.rms is None:
        return 0.0
    return scale_of(found, 8).scale / 12**0.5 / found.rms


def wanted_ranges(graph: PlainGraph) -> list[str]:
    """The tensors to measure: one of each group that shares a range, but for those that are derived."""
    shared = SharedRanges(graph, {}, {}, 0.0)
    derived = {shared.root(name) for name in _derived_names(graph)}
    tables = {shared.root(name) for name, constant in graph.constants.items() if constant.kind == "table"}
    chosen: dict[str, str] = {}
    for node in graph.nodes:
        root = shared.root(node.output)
        if root not in derived and root not in tables:
            chosen.setdefault(root, node.output)
    return list(chosen.values())


def _derived_names(graph: PlainGraph) -> list[str]:
    units = [node.output for node in graph.nodes if node.op in UNIT_OPS]
    return [MASK, *units, *(node.output for node in graph.nodes if node.output.endswith(f".{MASKED_SCORES}"))]


def _derived(graph: PlainGraph, measured: Mapping[str, Range]) -> dict[str, Range]:
    derived = {node.output: Range(low=0.0, high=UNIT) for node in graph.nodes if node.op in UNIT_OPS}
    deepest = 0.0
    for node in graph.nodes:
        if not node.output.endswith(f".{MASKED_SCORES}"):
            continue
        scores = measured.get(node.output.removesuffix(MASKED_SCORES) + SCORES)
        if scores is None:
            continue
        low = min(scores.low, 0.0) - MASKED_BELOW
        derived[node.output] = Range(low=low, high=scores.high)
        deepest = min(deepest, low - max(scores.high, 0.0))
    if deepest:
        derived[MASK] = Range(low=deepest, high=0.0)
    return derived
