"""Declare the operator sets that the oldest supported runtime loads, after checking that the graph keeps to them.

Opset 23 and IR 11: the first with a standard RMSNormalization, so that onnx.checker accepts every node. (The
other spelling, SimplifiedLayerNormalization in the default domain, loads from opset 22 on but is no ONNX operator.)
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qtool.errors import InputRefused

OPSET, CONTRIB_OPSET, IR_VERSION = 23, 1, 11
CONTRIB_DOMAIN = "com.microsoft"


class PinOpset(ir.passes.InPlacePass):
    """Set opset imports and IR version.

    Raises:
        InputRefused: for an operator or attribute that the pinned opset does not have.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        for node in model.graph:
            _check(node)
            node.version = None
        model.graph.opset_imports.clear()
        model.graph.opset_imports.update({"": OPSET, CONTRIB_DOMAIN: CONTRIB_OPSET})
        model.ir_version = IR_VERSION
        return ir.passes.PassResult(model, True)


def _check(node: ir.Node) -> None:
    if node.domain == CONTRIB_DOMAIN:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    except onnx.defs.SchemaError:
        raise _refused(node, "is no operator of") from None
    unknown = sorted(set(node.attributes) - set(schema.attributes))
    if unknown:
        raise _refused(node, f"has an attribute {unknown[0]} unknown to")


def _refused(node: ir.Node, problem: str) -> InputRefused:
    what = f"graph node {node.name} ({node.domain or 'onnx'}::{node.op_type})"
    return InputRefused(what, f"{problem} opset {OPSET}", "report this model type")
