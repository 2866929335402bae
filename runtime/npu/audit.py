"""Do the ranges of an NPU package hold on text it was not calibrated on?

Every tensor in front of a QuantizeLinear is looked at while the package is simulated: how many of its values lie
outside what the codes can say, how much room is left, and whether later positions need more than early ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.static_graphs import MASK, PREFILL_FILE, run_static
from qtool.runtime.evaluate import Progress
from qtool.runtime.npu.session import SETTINGS_FILE, load_graph, open_cache, read_prefix, read_shapes
from qtool.runtime.session import IntArray, check_tokens

# First match names the kind; the patterns are of our own tensors' names.
KINDS: tuple[tuple[str, str], ...] = (
    ("SwiGLU product", r"\.mlp\.down_proj\.input$"),
    ("residual stream", r"(\.residual|model\.layers\.\d+\.output|embed_tokens\.output)$"),
    ("logits", r"^lm_head\.output$"),
    ("attention scores", r"scores(\.heads)?$"),
    ("attention shares", r"probabilities(\.stacked)?$"),
    ("keys and values", r"(keys|values|k_rope|v)$"),
    ("norms", r"(norm(\.unit|\.output)?|(q|gate)_proj\.input)$"),
    ("linear outputs", r"_proj\.(output|product)$"),
    ("other", r""),
)
# They reach below their range on purpose: that is how a masked score loses.
MEANT_BELOW = re.compile(r"masked_scores$")
# A share of exactly 1 lies one step outside its quantizer, which loses nothing.
BEYOND = 1.5
SUFFIX = re.compile(r"\.(float|value\d+)$")
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorAudit:
    """One quantizer.

    Attributes:
        name: of the tensor; with the type where it is quantized more than once.
        kind: one of KINDS.
        low, high: what the codes can say.
        seen_low, seen_high: what came.
        early_amax, late_amax: largest magnitude in the chunks within the calibrated length, and in those beyond it;
            None when no text was that long.
        values, saturated: how many came, and how many lie more than BEYOND steps outside.
    """

    name: str
    kind: str
    low: float
    high: float
    seen_low: float = np.inf
    seen_high: float = -np.inf
    early_amax: float = 0.0
    late_amax: float | None = None
    values: int = 0
    saturated: int = 0

    @property
    def share(self) -> float:
        """Saturated values of all."""
        return self.saturated / self.values if self.values else 0.0

    @property
    def headroom(self) -> float:
        """The room left at the tighter end, as a share of the range; negative when values lie outside."""
        ends = [self.high - self.seen_high]
        if not MEANT_BELOW.search(self.name):
            ends.append(self.seen_low - self.low)
        return min(ends) / (self.high - self.low)

    @property
    def growth(self) -> float | None:
        """Largest magnitude beyond the calibrated length over the largest within it."""
        return None if self.late_amax is None or not self.early_amax else self.late_amax / self.early_amax

    def with_values(self, values: Array, step: float, *, late: bool) -> TensorAudit:
        """Add one call's values."""
        above = values > self.high + BEYOND * step
        below = values < self.low - BEYOND * step
        outside = int(above.sum()) + (0 if MEANT_BELOW.search(self.name) else int(below.sum()))
        counted = values if not MEANT_BELOW.search(self.name) else values[~below]
        low, high = (float(counted.min()), float(counted.max())) if counted.size else (self.low, self.low)
        amax = max(-low, high)
        before = self.late_amax if self.late_amax is not None else 0.0
        return replace(
            self,
            seen_low=min(self.seen_low, low),
            seen_high=max(self.seen_high, high),
            early_amax=self.early_amax if late else max(self.early_amax, amax),
            late_amax=max(before, amax) if late else self.late_amax,
            values=self.values + values.size,
            saturated=self.saturated + outside,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        growth = self.growth
        return {
            "tensor": self.name,
            "kind": self.kind,
            "range": [self.low, self.high],
            "seen": [self.seen_low, self.seen_high],
            "values": self.values,
            "saturated": self.saturated,
            "share": self.share,
            "headroom": self.headroom,
            "growth": None if growth is None else round(growth, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Audit:
    """All quantizers of a package, in graph order."""

    tensors: tuple[TensorAudit, ...]
    sequences: int
    length: int
    calibrated_length: int

    @property
    def worst(self) -> TensorAudit:
        """The tensor with the largest saturated share; of equals the one with the least room."""
        return max(self.tensors, key=lambda found: (found.share, -found.headroom))

    def by_kind(self) -> dict[str, list[TensorAudit]]:
        """The tensors of each kind, in the order of KINDS."""
        return {kind: found for kind, _ in KINDS if (found := [t for t in self.tensors if t.kind == kind])}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "sequences": self.sequences,
            "length": self.length,
            "calibrated_length": self.calibrated_length,
            "worst": self.worst.to_json(),
            "tensors": [found.to_json() for found in self.tensors],
        }


def audit_package(
    folder: Path, tokens: IntArray, *, progress: Progress, threads: int | None = None
) -> Audit:
    """Audit every quantizer of the prefill graph.

    Args:
        folder: an NPU package.
        tokens: ids [B, T]; T is cut to whole chunks.
        progress: (sequences done, all, text).
        threads: of the runtime.

    Raises:
        UsageError: sequences shorter than a chunk or longer than the context.
        InputRefused: a package that cannot be run.
    """
    shapes = read_shapes(folder)
    check_tokens(tokens, dims=2, vocab_size=shapes.vocab_size)
    length = tokens.shape[1] // shapes.chunk * shapes.chunk
    prefix = read_prefix(folder)
    slots = shapes.context - prefix
    if not length or length > slots:
        why = f"the package reads chunks of {shapes.chunk} into {slots} slots"
        raise UsageError(f"--length {tokens.shape[1]}", why, f"use {shapes.chunk} to {slots - slots % shapes.chunk}")
    calibrated = _calibrated_length(folder)
    model = onnx.load(str(folder / PREFILL_FILE), load_external_data=False)
    quantizers = _quantizers(model)
    steps = {name: (found[1].high - found[1].low) / found[2] for name, found in quantizers.items()}
    state: dict[str, TensorAudit] = {name: found[1] for name, found in quantizers.items()}
    watched = sorted({found[0] for found in quantizers.values()})
    session = _watching(model, folder, watched, threads)
    for number, row in enumerate(tokens, start=1):
        cache = open_cache(folder, shapes, session)
        for start in range(0, length, shapes.chunk):
            part = row[start : start + shapes.chunk]
            _, calls = run_static({shapes.chunk: session}, shapes, cache, part, prefix + start, watched)
            for name, (value, _, _) in quantizers.items():
                late = start >= calibrated
                state[name] = state[name].with_values(calls[0][1][value], steps[name], late=late)
        progress(number, len(tokens), "audit")
    return Audit(
        tensors=tuple(state.values()), sequences=len(tokens), length=length, calibrated_length=calibrated
    )


def _quantizers(model: onnx.ModelProto) -> Mapping[str, tuple[str, TensorAudit, int]]:
    """By name: the float tensor in front of it, an empty audit, and its number of steps."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, tuple[str, TensorAudit, int]] = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] == MASK:
            continue
        scale = float(numpy_helper.to_array(tensors[node.input[1]]))
        zero = numpy_helper.to_array(tensors[node.input[2]])
        top, zero_point = int(np.iinfo(zero.dtype).max), int(zero)
        tensor = SUFFIX.sub("", node.input[0])
        name = f"{tensor} ({zero.dtype})" if re.search(r"\.value\d+$", node.input[0]) else tensor
        audit = TensorAudit(
            name=name,
            kind=next(kind for kind, pattern in KINDS if re.search(pattern, tensor)),
            low=-zero_point * scale,
            high=(top - zero_point) * scale,
        )
        found[name] = (node.input[0], audit, top)
    return found


def _watching(model: onnx.ModelProto, folder: Path, names: list[str], threads: int | None) -> Any:
    """A session of the graph that also hands out these tensors."""
    present = {value.name for value in model.graph.output}
    watching = onnx.ModelProto()
    watching.CopyFrom(model)
    for name in names:
        if name not in present:
            watching.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return load_graph(watching.SerializeToString(), threads=threads, folder=folder)


def _calibrated_length(folder: Path) -> int:
    try:
        return int(json.loads((folder / SETTINGS_FILE).read_bytes())["calibration"]["length"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputRefused(folder / SETTINGS_FILE, "names no calibration", "export the package again") from None
