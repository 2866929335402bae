"""The plain float graph of a dense decoder for one width: 1 token, or a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qtool.quantize.artifacts.network import EMBEDDING, FINAL_NORM, HEAD
from qtool.quantize.artifacts.static_graphs import IDS, LOGITS, MASK, POSITIONS, StaticShapes
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.export.onnx.npu.attention import write_attention
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.npu.norm import Norm, write_norm
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph
from qtool.quantize.export.onnx.npu.rotary import write_tables

TABLE_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What both graphs are written from.

    Attributes:
        source: the weights.
        shape, static: sizes.
        tables: rotary cos and sin [context, D].
        norm: which form norms take.
    """

    source: WeightSource
    shape: ModelShape
    static: StaticShapes
    tables: tuple[FloatArray, FloatArray]
    norm: Norm

    def graph(self, width: int) -> PlainGraph:
        """The graph that reads `width` tokens."""
        graph = PlainGraph()
        context = self.static.context
        graph.inputs |= {IDS: ("int32", (1, width)), POSITIONS: ("int32", (1, width))}
        graph.inputs[MASK] = ("float32", (1, 1, width, context))
        rows = graph.table(f"{EMBEDDING}.table", self._embedding, (self.shape.vocab_size, self.shape.hidden))
        hidden = graph.op("Gather", f"{EMBEDDING}.output", rows, IDS, axis=0)
        write_tables(graph, self.tables, self.shape, width)
        for layer in range(self.shape.layers):
            hidden = self._block(graph, layer, hidden, width)
        final = self._norm(graph, FINAL_NORM, f"{FINAL_NORM}.output", hidden, self.shape.hidden)
        graph.outputs[LOGITS] = self._linear(graph, HEAD, final, self.shape.hidden, self.shape.vocab_size)
        return graph

    def _block(self, graph: PlainGraph, layer: int, hidden: str, width: int) -> str:
        shape, path = self.shape, f"model.layers.{layer}"
        attention = f"{path}.self_attn"
        normed = self._norm(graph, f"{path}.input_layernorm", f"{attention}.q_proj.input", hidden, shape.hidden)
        heads = []
        for name, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            module = f"{attention}.{name}_proj"
            flat = self._linear(graph, module, normed, shape.hidden, count * shape.head_dim)
            apart = graph.reshape(f"{module}.heads", flat, 1, width, count, shape.head_dim)
            if shape.head_norms and name != "v":
                normed_head = f"{attention}.{name}_norm"
                apart = self._norm(graph, normed_head, f"{normed_head}.output", apart, shape.head_dim)
            heads.append(apart)
        mixed = write_attention(graph, attention, layer, (heads[0], heads[1], heads[2]), shape, self.static, width)
        out = self._linear(graph, f"{attention}.o_proj", mixed, shape.heads * shape.head_dim, shape.hidden)
        hidden = graph.op("Add", f"{path}.residual", hidden, out)
        return graph.op("Add", f"{path}.output", hidden, self._mlp(graph, path, hidden))

    def _mlp(self, graph: PlainGraph, path: str, hidden: str) -> str:
        shape, mlp = self.shape, f"{path}.mlp"
        norm = f"{path}.post_attention_layernorm"
        normed = self._norm(graph, norm, f"{mlp}.gate_proj.input", hidden, shape.hidden)
        gate = self._linear(graph, f"{mlp}.gate_proj", normed, shape.hidden, shape.intermediate)
        up = self._linear(graph, f"{mlp}.up_proj", normed, shape.hidden, shape.intermediate)
        share = graph.op("Sigmoid", f"{mlp}.sigmoid", gate)
        activated = graph.op("Mul", f"{mlp}.act_fn.output", gate, share)
        product = graph.op("Mul", f"{mlp}.down_proj.input", activated, up)
        return self._linear(graph, f"{mlp}.down_proj", product, shape.intermediate, shape.hidden)

    def _norm(self, graph: PlainGraph, module: str, output: str, x: str, width: int) -> str:
        read: Callable[[], FloatArray] = lambda: self.source.read(f"{module}.weight")  # noqa: E731
        return write_norm(graph, self.norm, (module, output), x, read, width=width, epsilon=self.shape.epsilon)

    def _linear(self, graph: PlainGraph, module: str, x: str, columns: int, rows: int) -> str:
        name = f"{module}.bias"
        bias = (lambda: self.source.read(name)) if name in self.source.names() else None
        return graph.linear(module, x, (columns, rows), bias)

    def _embedding(self) -> Iterator[FloatArray]:
        for start in range(0, self.shape.vocab_size, TABLE_ROWS):
            stop = min(start + TABLE_ROWS, self.shape.vocab_size)
            yield self.source.read_rows(f"{EMBEDDING}.weight", start, stop)
