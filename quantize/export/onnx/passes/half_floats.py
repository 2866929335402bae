"""Float16 instead of float32 throughout a graph, logits apart: what GPU kernels want.

Group scales are float16 numbers in the checkpoint already; everything else is rounded once, here. The last Cast gives
float32 logits, which every consumer samples from.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from qtool.errors import InputRefused
from qtool.quantize.export.onnx.linears import HEAD, node_path

LOGITS = "logits"
LARGEST = float(np.finfo(np.float16).max)
FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class HalfFloats(ir.passes.InPlacePass):
    """Make every float32 value float16. Data is rounded when it is written, one tensor at a time.

    Raises:
        InputRefused: when the data is read, for a number that float16 does not hold.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        graph = model.graph
        for value in graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.dtype == FULL:
                read = partial(_rounded, str(value.name), tensor)
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.LazyTensor(read, dtype=HALF, shape=shape, name=value.name)
                value.type = ir.TensorType(HALF)
        for node in graph:
            _attributes(node)
            for value in node.outputs:
                _retype(value)
        for value in graph.inputs:
            _retype(value)
        _float_logits(graph)
        return ir.passes.PassResult(model, True)


def _rounded(name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = tensor.numpy()
    if not bool((np.abs(array) <= LARGEST).all()):
        why = f"has numbers beyond float16's {LARGEST:.0f}"
        raise InputRefused(name, why, "export with --target cpu, which computes in float32")
    return ir.tensor(array.astype(np.float16))


def _retype(value: ir.Value) -> None:
    if value.type is not None and value.dtype == FULL:
        value.type = ir.TensorType(HALF)


def _attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if node.op_type == "Cast" and name == "to" and attribute.as_int() == int(FULL):
            node.attributes[name] = ir.AttrInt64(name, int(HALF))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FULL:
            node.attributes[name] = ir.AttrTensor(name, _rounded(str(node.name), attribute.as_tensor()))


def _float_logits(graph: ir.Graph) -> None:
    place = next(index for index, value in enumerate(graph.outputs) if value.name == LOGITS)
    half = graph.outputs[place]
    half.name = f"{node_path(HEAD)}/half"
    cast = ir.node("Cast", [half], {"to": int(FULL)}, name=f"{node_path(HEAD)}/Cast")
    full = cast.outputs[0]
    full.name, full.shape, full.type = LOGITS, half.shape, ir.TensorType(FULL)
    graph.append(cast)
    graph.outputs[place] = full
