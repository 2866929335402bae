"""Take apart a packed linear whose modules differ in scheme or transform: one node each, and a Concat behind them."""

from __future__ import annotations

import onnx_ir as ir

from qtool.quantize.export.onnx.linears import KindOf, Linear, emit_linear, find_linears, node_path


class SplitPacked(ir.passes.InPlacePass):
    """Split every packed linear that is not uniform under `kind_of`."""

    def __init__(self, kind_of: KindOf) -> None:
        super().__init__()
        self._kind_of = kind_of

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        mixed = [linear for linear in find_linears(model.graph) if not linear.uniform(self._kind_of)]
        for linear in mixed:
            _split(model.graph, linear)
        return ir.passes.PassResult(model, bool(mixed))


def _split(graph: ir.Graph, linear: Linear) -> None:
    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    for index, weight in enumerate(linear.weights):
        part, out = emit_linear(linear.x, (weight,), linear.biases[index : index + 1])
        nodes += part
        outputs.append(out)
    nodes.append(ir.node("Concat", outputs, {"axis": -1}, name=f"{node_path(linear.name)}/Concat"))
    ir.convenience.replace_nodes_and_values(
        graph, linear.nodes[-1], linear.nodes, nodes, [linear.output], [nodes[-1].outputs[0]]
    )
