"""The graph of a dense decoder: tokens, positions, a mask and a past go in, logits and the longer past come out.

    input_ids, position_ids     int64   [B, T]
    attention_mask              int64   [B, P + T], 1 where there is a token
    past_key_values.N.key       float16 [B, kv_heads, P, head_dim], .value alike
    logits                      float32 [B, T, V]
    present.N.key               float16 [B, kv_heads, P + T, head_dim], .value alike
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from qtool.quantize.artifacts.network import FINAL_NORM, HEAD
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.export.onnx.npu.model_shape import ModelShape
from qtool.quantize.export.onnx.tensorrt.attention import BATCH, IDS, POSITIONS, SEEN, TOKENS, TOTAL, Attention
from qtool.quantize.export.onnx.tensorrt.graph import FULL, HALF, StandardGraph, once
from qtool.quantize.export.onnx.tensorrt.linear import EMBEDDING_WEIGHT, LinearWriter

TABLE_ROWS = 4096
LOGITS = "logits"


class DecoderWriter:
    """Writes the whole graph.

    Args:
        graph: empty.
        source: a checkpoint or a float model.
        shape: its sizes.
        tables: rotary cos and sin [context, head_dim].

    Attributes:
        linears: their writer.
    """

    def __init__(
        self, graph: StandardGraph, source: WeightSource, shape: ModelShape, tables: tuple[FloatArray, FloatArray]
    ) -> None:
        self._graph, self._source, self._shape, self._tables = graph, source, shape, tables
        self.linears = LinearWriter(graph, source)

    def write(self) -> None:
        """Everything, in order."""
        graph, shape = self._graph, self._shape
        for name, last in ((IDS, TOKENS), (SEEN, TOTAL), (POSITIONS, TOKENS)):
            graph.input(name, TensorProto.INT64, (BATCH, last))
        attention = Attention(graph=graph, shape=shape)
        attention.write_mask()
        attention.write_tables(self._tables)
        table = graph.halves(EMBEDDING_WEIGHT, (shape.vocab_size, shape.hidden), self._embedding)
        hidden = graph.op("Gather", "model.embed_tokens.output", table, IDS, axis=0)
        graph.output(LOGITS, FULL, (BATCH, TOKENS, shape.vocab_size))
        for layer in range(shape.layers):
            hidden = self._block(attention, layer, hidden)
        final = self._norm(FINAL_NORM, f"{FINAL_NORM}.output", hidden, shape.hidden)
        half = self.linears.write(HEAD, final, shape.hidden, shape.vocab_size)
        graph.op("Cast", LOGITS, half, to=FULL)

    def _block(self, attention: Attention, layer: int, hidden: str) -> str:
        graph, shape, path = self._graph, self._shape, f"model.layers.{layer}"
        module, mlp = f"{path}.self_attn", f"{path}.mlp"
        normed = self._norm(f"{path}.input_layernorm", f"{module}.input", hidden, shape.hidden)
        sizes = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        q, k, v = (
            self.linears.write(f"{module}.{name}_proj", normed, shape.hidden, count * shape.head_dim)
            for name, count in sizes.items()
        )

        def head_norm(name: str, x: str) -> str:
            return self._norm(f"{module}.{name}_norm", f"{module}.{name}_norm.output", x, shape.head_dim)

        mixed = attention.write(layer, module, (q, k, v), head_norm if shape.head_norms else None)
        out = self.linears.write(f"{module}.o_proj", mixed, shape.heads * shape.head_dim, shape.hidden)
        hidden = graph.op("Add", f"{path}.residual", hidden, out)
        normed = self._norm(f"{path}.post_attention_layernorm", f"{mlp}.input", hidden, shape.hidden)
        gate = self.linears.write(f"{mlp}.gate_proj", normed, shape.hidden, shape.intermediate)
        up = self.linears.write(f"{mlp}.up_proj", normed, shape.hidden, shape.intermediate)
        activated = graph.op("Mul", f"{mlp}.act_fn.output", gate, graph.op("Sigmoid", f"{mlp}.sigmoid", gate))
        product = graph.op("Mul", f"{mlp}.down_proj.input", activated, up)
        down = self.linears.write(f"{mlp}.down_proj", product, shape.intermediate, shape.hidden)
        return graph.op("Add", f"{path}.output", hidden, down)

    def _norm(self, module: str, output: str, x: str, width: int) -> str:
        """RMS norm, its squares in float32: float16 ends at 65504, which a channel of 256 exceeds."""
        graph = self._graph
        full = graph.op("Cast", f"{module}.float", x, to=FULL)
        squares = graph.op("Mul", f"{module}.squares", full, full)
        mean = graph.op("ReduceMean", f"{module}.mean", squares, graph.integers(-1), keepdims=1)
        epsilon = graph.number("norm.epsilon", self._shape.epsilon, FULL)
        root = graph.op("Sqrt", f"{module}.root", graph.op("Add", f"{module}.raised", mean, epsilon))
        unit = graph.op("Div", f"{module}.unit", full, root)
        half = graph.op("Cast", f"{module}.half", unit, to=HALF)
        weight = f"{module}.weight"
        gamma = graph.halves(weight, (width,), lambda: once(self._source.read(weight)))
        return graph.op("Mul", output, half, gamma)

    def _embedding(self) -> Iterator[FloatArray]:
        rows = self._shape.vocab_size
        for start in range(0, rows, TABLE_ROWS):
            yield self._source.read_rows(EMBEDDING_WEIGHT, start, min(start + TABLE_ROWS, rows))
