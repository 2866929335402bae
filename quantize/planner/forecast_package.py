"""How many bytes of weights an ONNX package will hold. Torch-free.

The graph computes in float32, so that is what scales, biases and everything left in float become; linears lie in whole
blocks (export/onnx/nbits_layout.py), those that read one input and have one scheme as one, and a tied, quantized head
serves the embedding with the same bytes. Every tensor begins on a page; small ones lie in the graph's own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.planner.forecast_size import BLOCKS, HEAD, FloatModel

PAGE_BYTES, INLINE_BELOW_BYTES = 4096, 1024  # as export/onnx/external_data.py


def package_weights(model: FloatModel, assignments: Mapping[str, Assignment]) -> int | None:
    """Bytes of model.onnx.data, or None where ONNX Runtime's CPU provider computes no such scheme.

    Args:
        model: what is quantized.
        assignments: what each linear gets.
    """
    quantized = {module: a for module, a in assignments.items() if a.scheme is not None}
    if not all(_plain(assignment) for assignment in quantized.values()):
        return None
    tensors = [_rotary(model)] * 2
    for together in _together(model, quantized):
        shapes = [model.matrix(module) for module in together]
        tensors += _linear(sum(rows for rows, _ in shapes), shapes[0][1], quantized[together[0]])
        tensors.append(4 * sum(rows for m, (rows, _) in zip(together, shapes, strict=True) if _has_bias(model, m)))
    named = {model.weight_of(m) for m in quantized} | {f"{m}.bias" for m in quantized}
    tensors += [4 * prod(shape) for name, shape in model.shapes.items() if name not in named]
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in tensors if size >= INLINE_BELOW_BYTES)


def _together(model: FloatModel, quantized: Mapping[str, Assignment]) -> list[list[str]]:
    """The quantized linears, those that become one node together."""
    found = [[HEAD]] if HEAD in quantized else []
    for index in range(model.blocks):
        for group in model.groups:
            names = [f"{BLOCKS}{index}.{path}" for path in group]
            mine = [name for name in names if name in quantized]
            whole = len(mine) == len(names) and len({quantized[name].scheme for name in mine}) == 1
            found += [mine] if whole else [[name] for name in mine]
    return found


def _plain(assignment: Assignment) -> bool:
    assert assignment.scheme is not None
    weight, given = assignment.scheme.weight, assignment.scheme.input
    grouped = weight.format.kind == "int" and group_size_of(weight.granularity) is not None
    extras = assignment.transform is not None or assignment.low_rank > 0 or assignment.frozen_smooth
    return grouped and not extras and (given is None or given.granularity.name == "per_token_group")


def _linear(rows: int, columns: int, assignment: Assignment) -> Sequence[int]:
    """Codes, scales and zero points of one node."""
    assert assignment.scheme is not None
    weight = assignment.scheme.weight
    group = group_size_of(weight.granularity)
    assert group is not None
    blocks = -(-columns // group)
    zeros = 0 if weight.symmetric else -(-blocks * weight.format.bits // 8)
    return rows * blocks * group * weight.format.bits // 8, 4 * rows * blocks, rows * zeros


def _has_bias(model: FloatModel, module: str) -> bool:
    return f"{module}.bias" in model.shapes


def _rotary(model: FloatModel) -> int:
    """The table of cosines, or of sines: [positions, head_dim / 2] float32."""
    config = model.config
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * int(config["max_position_embeddings"]) * int(head)
