"""The key-value cache in INT8: GroupQueryAttention stores and reads codes, one fixed scale a layer, head and channel.

A quarter of the float cache's bytes, in memory and in every decode step. Scales come from calibration; what lies beyond
127 of them saturates. A runtime that reads prompts with another graph finds them among the file's metadata.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.export.onnx.linears import add_initializer

PAST, PRESENT = "past_key_values.", "present."
BITS = 8
CACHE_SCALES = "qtool.cache_scales"
# GroupQueryAttention's inputs, by position.
PAST_INPUTS = {"key": 3, "value": 4}
SCALE_INPUTS = {"key": 12, "value": 13}
_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def scales_text(scales: Mapping[str, FloatArray]) -> str:
    """A JSON object: little-endian float32 in base64 by the input's name."""
    raw = {name: np.asarray(scale, dtype="<f4").tobytes() for name, scale in scales.items()}
    return json.dumps({name: base64.b64encode(data).decode() for name, data in raw.items()}, sort_keys=True)


class Int8Cache(ir.passes.InPlacePass):
    """Make the cache of every attention INT8.

    Args:
        scales: [kv_heads × head_dim] float32 by the name of the graph's input, "past_key_values.0.key".
    """

    def __init__(self, scales: Mapping[str, FloatArray]) -> None:
        super().__init__()
        self._scales = scales

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        for node in nodes:
            self._lower(model.graph, node)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if _CACHE.fullmatch(str(value.name).replace(PRESENT, PAST, 1)):
                value.type = ir.TensorType(ir.DataType.INT8)
        return ir.passes.PassResult(model, bool(nodes))

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        node.resize_inputs(max(SCALE_INPUTS.values()) + 1)
        for part, index in SCALE_INPUTS.items():
            past = node.inputs[PAST_INPUTS[part]]
            assert past is not None and past.name is not None
            scale = np.ascontiguousarray(self._scales[past.name], dtype=np.float32)
            name = f"{past.name.removeprefix(PAST)}_scale"
            stored = add_initializer(graph, f"cache.{name}", ir.tensor(scale, name=f"cache.{name}"))
            node.replace_input_with(index, stored)
            node.attributes.add(ir.AttrString(f"{part[0]}_quant_type", "PER_CHANNEL"))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", BITS))
