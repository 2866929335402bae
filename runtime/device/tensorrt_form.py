"""Is a graph in the form that TensorRT documents? One line per breach.

From its documents on explicit quantization: operators of the standard; symmetric Q and DQ, zero points zero;
activations per tensor and INT8 or FP8 E4M3; weights of the same type per channel of the output; INT4 for weights alone,
in blocks of 64 or 128 along the inputs; one float type, which the scales have too. A Q or DQ outside of these patterns
is a breach: it would run as a kernel of its own, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
from onnx import TensorProto

from qtool.runtime.device.graph_file import GraphFile

NEWEST_OPSET = 21
BLOCKS = (64, 128)
FORM_TYPES = {
    "int4 blocks": TensorProto.INT4,
    "fp8 per tensor": TensorProto.FLOAT8E4M3FN,
    "int8 per tensor": TensorProto.INT8,
}
# What the graphs use; each is in the parser's table of supported operators.
OPERATORS = {
    *("Add", "And", "Cast", "Concat", "DequantizeLinear", "Div", "Gather", "LessOrEqual", "MatMul", "Mul"),
    *("QuantizeLinear", "Range", "ReduceMean", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax", "Sqrt", "Sub"),
    *("Transpose", "Unsqueeze", "Where"),
}
Q, DQ = "QuantizeLinear", "DequantizeLinear"


def tensorrt_breaches(file: GraphFile, forms: Mapping[str, str]) -> list[str]:
    """All breaches.

    Args:
        file: the graph.
        forms: the form's name by module, of all linears that should be quantized.
    """
    return [*_standard(file), *_linears(file, forms)]


def _standard(file: GraphFile) -> Iterator[str]:
    for opset in file.model.opset_import:
        if opset.domain or opset.version > NEWEST_OPSET:
            name = opset.domain or "onnx"
            yield f"opset {name} {opset.version}: the parser reads the standard's operators up to {NEWEST_OPSET}"
    for node in file.nodes:
        if node.domain or node.op_type not in OPERATORS:
            yield f"{node.name}: {node.domain or 'onnx'}::{node.op_type} is not among the operators of these graphs"
    for name, tensor in file.constants.items():
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.DOUBLE) and tensor.dims:
            yield f"{name}: {_type(tensor.data_type)} among constants of float16"


def _linears(file: GraphFile, forms: Mapping[str, str]) -> Iterator[str]:
    seen: set[str] = set()
    used: set[str] = set()
    for node in file.nodes:
        weight = file.maker.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or weight.op_type != DQ:
            continue
        module = weight.output[0].removesuffix(".weight")
        seen.add(module)
        used |= {weight.name}
        expected = forms.get(module)
        if expected is None:
            yield f"{node.name}: a quantized linear that the manifest does not name"
            continue
        yield from _weight(file, weight, expected)
        pair = _input_pair(file, node)
        used |= {one.name for one in pair}
        yield from _input(file, node, pair, expected)
    yield from (f"{module}: should be {forms[module]}, and is not quantized" for module in sorted(set(forms) - seen))
    for node in file.nodes:
        if node.op_type in (Q, DQ) and node.name not in used:
            yield f"{node.name}: {node.op_type} outside of a linear's pattern"


def _weight(file: GraphFile, dq: onnx.NodeProto, form: str) -> Iterator[str]:
    codes, scale, *zero = dq.input
    if codes not in file.constants or scale not in file.constants:
        yield f"{dq.name}: codes and scales must be constants"
        return
    if (found := file.types[codes]) != FORM_TYPES[form]:
        yield f"{dq.name}: codes of {_type(found)}, not of {form}"
    if file.types[scale] != TensorProto.FLOAT16:
        yield f"{dq.name}: scales of {_type(file.types[scale])}, not of float16"
    if zero:
        yield f"{dq.name}: a zero point, where only symmetric weights are computed"
    rows, columns = file.shape(codes)
    axis, block = file.attribute(dq, "axis"), file.attribute(dq, "block_size") or 0
    if form == "int4 blocks":
        fits = axis == 0 and block in BLOCKS and rows % block == 0 and file.shape(scale) == (rows // block, columns)
        expected = f"blocks of {' or '.join(map(str, BLOCKS))} along axis 0"
    else:
        fits = axis == 1 and block == 0 and file.shape(scale) == (columns,)
        expected = "one scale a channel, axis 1"
    if not fits:
        yield f"{dq.name}: axis {axis}, block {block}, scales {list(file.shape(scale))}; wanted {expected}"


def _input_pair(file: GraphFile, product: onnx.NodeProto) -> list[onnx.NodeProto]:
    """DQ and Q in front of a product's input, as far as they are there."""
    dq = file.maker.get(product.input[0])
    if dq is None or dq.op_type != DQ:
        return []
    q = file.maker.get(dq.input[0])
    return [dq] if q is None or q.op_type != Q else [dq, q]


def _input(file: GraphFile, product: onnx.NodeProto, pair: list[onnx.NodeProto], form: str) -> Iterator[str]:
    if form == "int4 blocks":
        if pair:
            yield f"{product.name}: quantized inputs before INT4 weights"
        return
    if len(pair) != 2:
        yield f"{product.name}: inputs are not quantized and dequantized"
        return
    dq, q = pair
    if list(dq.input[1:]) != list(q.input[1:]) or len(q.input) != 3:
        yield f"{product.name}: Q and DQ of its input differ in scale or type"
        return
    scale, zero = q.input[1:]
    if scale not in file.constants or file.shape(scale) or file.types[scale] != TensorProto.FLOAT16:
        yield f"{q.name}: the scale must be one float16 constant"
    if zero not in file.constants or file.types[zero] != FORM_TYPES[form]:
        yield f"{q.name}: codes are not of {form}"
    elif float(file.array(zero)) != 0:
        yield f"{q.name}: zero point {float(file.array(zero)):g}, must be 0"


def _type(element: int) -> str:
    return str(TensorProto.DataType.Name(element)).lower()
