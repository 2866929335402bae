"""Logits of the last token only unless the caller wants more: one graph, so that what is served is what is scored.

A prompt of 512 tokens needs one row of logits; the other 511 are a fifth of a small model's work. The head reads
`hidden[:, logits_from:]`, and `logits_from` is an optional input of the graph (an input with an initializer of the same
name, which the runtime leaves as it is): whoever does not know it gets the last token's, -1; scoring sets it to 0.

onnxruntime-genai expects one row exactly where the file declares one row, so the file declares one; ONNX Runtime hands
out more rows than declared where a caller asks for them and leaves their memory to the runtime.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qtool.quantize.export.onnx.linears import HEAD, add_initializer, find_linears, node_path

LOGITS_FROM = "logits_from"
_TO_THE_END = np.iinfo(np.int64).max


class LastLogits(ir.passes.InPlacePass):
    """Put the choice in front of the head. Run before the linears are lowered."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        graph = model.graph
        head = next((linear for linear in find_linears(graph) if linear.modules == (HEAD,)), None)
        if head is None or LOGITS_FROM in graph.initializers:
            return ir.passes.PassResult(model, False)
        chosen = add_initializer(graph, LOGITS_FROM, ir.tensor(np.array([-1], dtype=np.int64), name=LOGITS_FROM))
        graph.inputs.append(chosen)
        rows = ir.node(
            "Slice",
            [head.x, chosen, _constant(graph, "end", _TO_THE_END), _constant(graph, "axis", 1)],
            name=f"{node_path(HEAD)}/rows/Slice",
        )
        graph.insert_before(head.nodes[0], rows)
        _reroute(head.nodes, head.x, rows.outputs[0])
        logits = head.output
        assert logits.shape is not None
        batch, _, vocabulary = logits.shape
        logits.shape = ir.Shape([batch, 1, vocabulary])
        return ir.passes.PassResult(model, True)


def _reroute(nodes: tuple[ir.Node, ...], old: ir.Value, new: ir.Value) -> None:
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is old:
                node.replace_input_with(index, new)


def _constant(graph: ir.Graph, part: str, number: int) -> ir.Value:
    name = f"{LOGITS_FROM}.{part}"
    return add_initializer(graph, name, ir.tensor(np.array([number], dtype=np.int64), name=name))
