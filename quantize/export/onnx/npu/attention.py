"""Attention over a cache of fixed size, of rank 4 throughout: the query heads that share a key head are stacked along
the tokens, so that nothing is repeated."""

from __future__ import annotations

from qtool.quantize.artifacts.static_graphs import (
    KEY_AXIS,
    MASK,
    VALUE_AXIS,
    StaticShapes,
    past_name,
    present_name,
)
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph
from qtool.quantize.export.onnx.npu.rotary import KEY, QUERY, write_rotation

SCORES, MASKED_SCORES, PROBABILITIES = "scores", "masked_scores", "probabilities"
HEADS_FIRST, COLUMNS_FIRST = [0, 2, 1, 3], [0, 1, 3, 2]


def heads_first(graph: PlainGraph, output: str, x: str) -> str:
    """[1, T, heads, D] as [1, heads, T, D]."""
    return graph.op("Transpose", output, x, perm=HEADS_FIRST)


def write_attention(
    graph: PlainGraph,
    path: str,
    layer: int,
    qkv: tuple[str, str, str],
    shape: ModelShape,
    static: StaticShapes,
    width: int,
) -> str:
    """From heads to the output projection's input.

    Args:
        graph: is appended to.
        path: of the attention module, "model.layers.3.self_attn".
        layer: its number.
        qkv: queries, keys and values [1, T, heads, D].
        shape, static: sizes.
        width: T.

    Returns:
        The tensor `{path}.o_proj.input` [1, T, H · D].
    """
    heads, groups, size = shape.heads, shape.groups, shape.head_dim
    q, k, v = (heads_first(graph, f"{path}.{name}", x) for name, x in zip("qkv", qkv, strict=True))
    q = write_rotation(graph, f"{path}.q_rope_scaled", q, QUERY, shape)
    k = write_rotation(graph, f"{path}.k_rope", k, KEY, shape)
    stacked = graph.reshape(f"{path}.queries", q, 1, shape.kv_heads, groups * width, size)
    new_keys = graph.op("Transpose", f"{path}.new_keys", k, perm=COLUMNS_FIRST)
    keys = _append(graph, f"{path}.keys", layer, "key", new_keys, static, width)
    values = _append(graph, f"{path}.values", layer, "value", v, static, width)
    scores = graph.op("MatMul", f"{path}.{SCORES}", stacked, keys)
    by_head = graph.reshape(f"{path}.{SCORES}.heads", scores, 1, heads, width, static.context)
    masked = graph.op("Add", f"{path}.{MASKED_SCORES}", by_head, MASK)
    shares = graph.op("Softmax", f"{path}.{PROBABILITIES}", masked, axis=-1)
    stacked_shares = graph.reshape(
        f"{path}.{PROBABILITIES}.stacked", shares, 1, shape.kv_heads, groups * width, static.context
    )
    mixed = graph.op("MatMul", f"{path}.mixed", stacked_shares, values)
    apart = graph.reshape(f"{path}.mixed.heads", mixed, 1, heads, width, size)
    rows = heads_first(graph, f"{path}.mixed.rows", apart)
    return graph.reshape(f"{path}.o_proj.input", rows, 1, width, heads * size)


def _append(
    graph: PlainGraph, output: str, layer: int, part: str, new: str, static: StaticShapes, width: int
) -> str:
    past = past_name(layer, part)
    graph.past[past] = static.past(part, width)
    graph.outputs[present_name(layer, part)] = new
    return graph.op("Concat", output, past, new, axis=KEY_AXIS if part == "key" else VALUE_AXIS)
