"""Leave optional outputs that nothing reads unnamed, so that the runtime does not allocate them."""

from __future__ import annotations

import onnx_ir as ir

OPTIONAL_OUTPUTS = {"SkipSimplifiedLayerNormalization"}


class DropUnusedOutputs(ir.passes.InPlacePass):
    """Unname unread outputs of the operators in OPTIONAL_OUTPUTS, and cut those at the end."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        changed = False
        for node in model.graph:
            if node.op_type in OPTIONAL_OUTPUTS:
                changed |= _drop(node)
        return ir.passes.PassResult(model, changed)


def _drop(node: ir.Node) -> bool:
    read = [bool(value.uses()) or value.is_graph_output() for value in node.outputs]
    unread = [value for value, keep in zip(node.outputs, read, strict=True) if not keep and value.name]
    for value in unread:
        value.name, value.shape, value.type = "", None, None
    node.resize_outputs(max((index + 1 for index, keep in enumerate(read) if keep), default=1))
    return bool(unread)
