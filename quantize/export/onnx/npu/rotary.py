"""Rotary positions from tables: x · cos + swap(x) · sin, where swap exchanges a head's halves.

The sign of the first half lies in the sine table, and the queries' tables hold attention's 1 / √head_dim too: no
negation, no scaling of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from qtool.quantize.artifacts.network import build_on_meta
from qtool.quantize.artifacts.static_graphs import POSITIONS
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph

QUERY, KEY = "query", "key"


def rotary_tables(source: WeightSource, context: int) -> tuple[FloatArray, FloatArray]:
    """cos and sin [context, head_dim] of a model, from transformers' own module."""
    rotary = build_on_meta(source).base_model.rotary_emb
    positions = torch.arange(context)[None]
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, context, 1), positions)
    return cos[0].numpy(), sin[0].numpy()


def write_tables(graph: PlainGraph, tables: tuple[FloatArray, FloatArray], shape: ModelShape, width: int) -> None:
    """Look the rows of all positions up once for the whole graph: `rope.{query|key}.{cos|sin}` [1, 1, T, D]."""
    cos, sin = tables
    signed = np.concatenate([-sin[:, : shape.head_dim // 2], sin[:, shape.head_dim // 2 :]], axis=1)
    for who, factor in ((QUERY, shape.head_dim**-0.5), (KEY, 1.0)):
        for name, values in (("cos", cos), ("sin", signed)):
            rows = (values * np.float32(factor)).astype(np.float32)
            table = graph.table(f"rope.{who}.{name}.table", partial(_once, rows), rows.shape)
            found = graph.op("Gather", f"rope.{who}.{name}.rows", table, POSITIONS, axis=0)
            graph.reshape(f"rope.{who}.{name}", found, 1, 1, width, shape.head_dim)


def write_rotation(graph: PlainGraph, output: str, x: str, who: str, shape: ModelShape) -> str:
    """Rotate x [1, heads, T, D]."""
    half, whole = shape.head_dim // 2, shape.head_dim
    second = _slice(graph, x, f"{output}.second", half, whole)
    first = _slice(graph, x, f"{output}.first", 0, half)
    swapped = graph.op("Concat", f"{output}.swapped", second, first, axis=-1)
    straight = graph.op("Mul", f"{output}.cos", x, f"rope.{who}.cos")
    across = graph.op("Mul", f"{output}.sin", swapped, f"rope.{who}.sin")
    return graph.op("Add", output, straight, across)


def _slice(graph: PlainGraph, x: str, output: str, start: int, stop: int) -> str:
    return graph.op("Slice", output, x, graph.index(start), graph.index(stop), graph.index(3))


def _once(rows: FloatArray) -> Iterator[FloatArray]:
    yield rows
