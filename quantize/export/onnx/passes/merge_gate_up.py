"""One node for an MLP's gate and up projections: they read the same input, and one large node streams better."""

from __future__ import annotations

import onnx_ir as ir

from qtool.quantize.export.onnx.linears import KindOf, Linear, emit_linear, find_linears, node_path, packed_name

PAIR = ("gate_proj", "up_proj")


class MergeGateUp(ir.passes.InPlacePass):
    """Pack gate and up into one linear with a Split behind it, where both are of one kind."""

    def __init__(self, kind_of: KindOf) -> None:
        super().__init__()
        self._kind_of = kind_of

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        pairs = [pair for pair in _pairs(model.graph) if self._kind_of(pair[0].name) == self._kind_of(pair[1].name)]
        for gate, up in pairs:
            _merge(model.graph, gate, up)
        return ir.passes.PassResult(model, bool(pairs))


def _pairs(graph: ir.Graph) -> list[tuple[Linear, Linear]]:
    by_input: dict[ir.Value, dict[str, Linear]] = {}
    for linear in find_linears(graph):
        by_input.setdefault(linear.x, {})[linear.name.rpartition(".")[2]] = linear
    pairs = [(found[PAIR[0]], found[PAIR[1]]) for found in by_input.values() if all(leaf in found for leaf in PAIR)]
    return [(gate, up) for gate, up in pairs if gate.rows == up.rows and len(gate.biases) == len(up.biases)]


def _merge(graph: ir.Graph, gate: Linear, up: Linear) -> None:
    nodes, out = emit_linear(gate.x, (*gate.weights, *up.weights), (*gate.biases, *up.biases))
    path = node_path(packed_name((*gate.modules, *up.modules)))
    split = ir.node("Split", [out], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{path}/Split")
    ir.convenience.replace_nodes_and_values(
        graph,
        gate.nodes[-1],
        (*gate.nodes, *up.nodes),
        [*nodes, split],
        [gate.output, up.output],
        list(split.outputs),
    )
