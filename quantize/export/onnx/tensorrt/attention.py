"""Attention over a past of any length in standard operators, of rank 4 throughout: query heads that share a key head
are stacked along the tokens, so that nothing is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qtool.quantize.artifacts.static_graphs import past_name, present_name
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.tensorrt.graph import HALF, StandardGraph, once

IDS, POSITIONS, SEEN = "input_ids", "position_ids", "attention_mask"
BATCH, TOKENS, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
# Far below every score, and near enough to zero that a score added to it stays finite in float16.
MASKED = -30000.0
HEADS_FIRST, COLUMNS_FIRST = [0, 2, 1, 3], [0, 1, 3, 2]
QUERY, KEY = "query", "key"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What all layers share.

    Attributes:
        graph: is appended to.
        shape: sizes.
    """

    graph: StandardGraph
    shape: ModelShape

    def write_mask(self) -> None:
        """`mask` [B, 1, T, S]: a token sees itself, what is before it, and of that what attention_mask says."""
        graph = self.graph
        total = graph.op("Gather", "mask.total", graph.op("Shape", "mask.seen_shape", SEEN), graph.integer(1))
        tokens = graph.op("Gather", "mask.tokens", graph.op("Shape", "mask.ids_shape", IDS), graph.integer(1))
        past = graph.op("Sub", "mask.past", total, tokens)
        columns = graph.op("Range", "mask.columns", graph.integer(0), total, graph.integer(1))
        rows = graph.op("Range", "mask.rows", past, total, graph.integer(1))
        below = graph.op("Unsqueeze", "mask.rows_column", rows, graph.integers(1))
        causal = graph.op("LessOrEqual", "mask.causal", columns, below)
        given = graph.op("Unsqueeze", "mask.given", SEEN, graph.integers(1, 2))
        allowed = graph.op("And", "mask.allowed", causal, graph.op("Cast", "mask.seen", given, to=TensorProto.BOOL))
        nothing, masked = graph.number("mask.nothing", 0.0), graph.number("mask.masked", MASKED)
        graph.op("Where", "mask", allowed, nothing, masked)

    def write_tables(self, tables: tuple[FloatArray, FloatArray]) -> None:
        """`rope.{query|key}.{cos|sin}` [B, 1, T, D] of all positions; the queries' hold 1 / √D, the sines' first half
        the rotation's sign."""
        cos, sin = tables
        size = self.shape.head_dim
        signed = np.concatenate([-sin[:, : size // 2], sin[:, size // 2 :]], axis=1)
        for who, factor in ((QUERY, size**-0.5), (KEY, 1.0)):
            for name, values in (("cos", cos), ("sin", signed)):
                rows = (values * np.float32(factor)).astype(np.float32)
                self._rotary(f"rope.{who}.{name}", rows)

    def write(
        self, layer: int, path: str, heads: tuple[str, str, str], norm: Callable[[str, str], str] | None
    ) -> str:
        """From the projections' outputs to the input of o_proj, [B, T, H · D].

        Args:
            layer: number.
            path: of the module, "model.layers.0.self_attn".
            heads: outputs of the query, key and value projections.
            norm: of a head, called with ("q" or "k", tensor [B, T, heads, D]); None: no such norms.
        """
        graph, shape = self.graph, self.shape
        size = shape.head_dim
        apart = {}
        for name, x, count in zip("qkv", heads, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True):
            x = graph.reshape(f"{path}.{name}.heads", x, 0, 0, count, size)
            x = norm(name, x) if norm is not None and name != "v" else x
            apart[name] = graph.op("Transpose", f"{path}.{name}", x, perm=HEADS_FIRST)
        queries = self._rotate(f"{path}.q_rope", apart["q"], QUERY)
        new_keys = self._rotate(f"{path}.k_rope", apart["k"], KEY)
        keys, values = self._append(layer, "key", new_keys), self._append(layer, "value", apart["v"])
        stacked = graph.reshape(f"{path}.queries", queries, 0, shape.kv_heads, -1, size)
        across = graph.op("Transpose", f"{path}.keys", keys, perm=COLUMNS_FIRST)
        scores = graph.op("MatMul", f"{path}.scores", stacked, across)
        by_head = graph.reshape(f"{path}.scores.heads", scores, 0, shape.heads, -1, 0)
        masked = graph.op("Add", f"{path}.masked_scores", by_head, "mask")
        shares = graph.op("Softmax", f"{path}.probabilities", masked, axis=-1)
        together = graph.reshape(f"{path}.probabilities.stacked", shares, 0, shape.kv_heads, -1, 0)
        mixed = graph.op("MatMul", f"{path}.mixed", together, values)
        rows = graph.reshape(f"{path}.mixed.heads", mixed, 0, shape.heads, -1, size)
        back = graph.op("Transpose", f"{path}.mixed.rows", rows, perm=HEADS_FIRST)
        return graph.reshape(f"{path}.o_proj.input", back, 0, 0, shape.heads * size)

    def _rotary(self, name: str, rows: FloatArray) -> None:
        table = self.graph.halves(f"{name}.table", rows.shape, lambda: once(rows))
        found = self.graph.op("Gather", f"{name}.rows", table, POSITIONS, axis=0)
        self.graph.op("Unsqueeze", name, found, self.graph.integers(1))

    def _rotate(self, output: str, x: str, who: str) -> str:
        graph, size = self.graph, self.shape.head_dim
        second = graph.op("Slice", f"{output}.second", x, *map(graph.integers, (size // 2, size, 3)))
        first = graph.op("Slice", f"{output}.first", x, *map(graph.integers, (0, size // 2, 3)))
        swapped = graph.op("Concat", f"{output}.swapped", second, first, axis=-1)
        straight = graph.op("Mul", f"{output}.cos", x, f"rope.{who}.cos")
        return graph.op("Add", output, straight, graph.op("Mul", f"{output}.sin", swapped, f"rope.{who}.sin"))

    def _append(self, layer: int, part: str, new: str) -> str:
        past, present = past_name(layer, part), present_name(layer, part)
        sizes = (self.shape.kv_heads, self.shape.head_dim)
        self.graph.input(past, HALF, (BATCH, sizes[0], PAST, sizes[1]))
        self.graph.output(present, HALF, (BATCH, sizes[0], TOTAL, sizes[1]))
        return self.graph.op("Concat", present, past, new, axis=2)
