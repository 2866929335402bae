"""Readable, stable names: "/model/layers.3/self_attn/GroupQueryAttention", values "{node}/output_0".

Linears carry their module's name already. The others take it from what they read: a norm from its weight,
attention from its cache, the rest from the name mobius-onnx gave them.
"""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from qtool.quantize.export.onnx.linears import node_path

_CACHE = re.compile(r"past_key_values\.(\d+)\.key")
_COUNTER = re.compile(r"_node_\d+$")


class NodeNames(ir.passes.InPlacePass):
    """Name every node and every value between nodes; repeated names get _2, _3, …"""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        seen: Counter[str] = Counter()
        for node in model.graph:
            name = _readable(node)
            seen[name] += 1
            node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
            for index, value in enumerate(node.outputs):
                if value.name and not value.is_graph_output():
                    value.name = f"{node.name}/output_{index}"
        return ir.passes.PassResult(model, True)


def _readable(node: ir.Node) -> str:
    name = node.name or ""
    if name.startswith("/"):
        return name
    inputs = [value.name or "" for value in node.inputs if value is not None]
    for text in inputs:
        if cache := _CACHE.fullmatch(text):
            return f"/model/layers.{cache.group(1)}/self_attn/{node.op_type}"
    if node.op_type.endswith("Normalization"):
        weight = next((text for text in inputs if text.endswith(".weight")), "")
        return f"{node_path(weight.removesuffix('.weight'))}/{node.op_type}"
    return "/" + _COUNTER.sub("", name)
