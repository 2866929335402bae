"""What ONNX Runtime's CPU provider computes: schemes in groups as MatMulNBits, INT8 per token and channel as
MatMulIntegerToFloat, and only those.

A layer is lowered to exactly the arithmetic it was quantized and scored with. Everything else is refused here,
with the layer's name: silently running other arithmetic is the one thing an export must never do.
"""

from __future__ import annotations

from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.quantize.artifacts.formats import INT8
from qtool.quantize.artifacts.granularity import PerChannel, PerGroup, PerToken, PerTokenGroup
from qtool.quantize.artifacts.scheme import LayerScheme

MINIMUM_ONNXRUNTIME = "1.28"
# Only tried with this one: earlier ones may lack the kernel.
MINIMUM_FOR_INT8_CACHE = "1.31"

# accuracy_level by (weight bits, INT8 activations): 1 computes with float32 activations, 4 with INT8 ones per row
# and block. 8-bit weights with float activations take a path that is 70 times slower and are not offered.
ACCURACY_LEVELS: dict[tuple[int, bool], int] = {(4, False): 1, (4, True): 4, (8, True): 4}


@dataclass(frozen=True, kw_only=True)
class NBits:
    """The attributes of one MatMulNBits node."""

    bits: int
    block_size: int
    accuracy_level: int


def per_token_int8(scheme: LayerScheme | None) -> bool:
    """Whether a scheme is one symmetric INT8 scale a channel of the weight and one a token of its input."""
    if scheme is None or scheme.input is None:
        return False
    weight, act = scheme.weight, scheme.input
    formats = weight.format is INT8 and act.format is INT8
    scales = weight.granularity == PerChannel() and act.granularity == PerToken()
    return formats and scales and weight.symmetric and act.dynamic and act.clip == 1.0


def nbits_for(module: str, scheme: LayerScheme) -> NBits:
    """The MatMulNBits that computes this scheme.

    Raises:
        UsageError: naming the layer, why the CPU target does not compute its scheme, and the options that it does.
    """
    weight, act = scheme.weight, scheme.input
    if not isinstance(weight.granularity, PerGroup):
        remedy = "quantize with a group size, for example --group-size 64 --activation per_token_group"
        raise _refused(module, scheme, "computes weights with one scale per group only", remedy)
    group = weight.granularity.group_size
    if act is not None and act.format is not INT8:
        raise _refused(module, scheme, "computes INT8 activations only", "quantize with --scheme W4A8")
    if act is not None and act.granularity != PerTokenGroup(group):
        remedy = f"quantize with --activation per_token_group --group-size {group}"
        raise _refused(module, scheme, "computes INT8 activations per token and group only", remedy)
    level = ACCURACY_LEVELS.get((weight.format.bits, act is not None))
    if level is None or weight.format.kind != "int":
        raise _refused(module, scheme, "has no fast path for these formats", "use W4A16, W4A8 or W8A8")
    return NBits(bits=weight.format.bits, block_size=group, accuracy_level=level)


def _refused(module: str, scheme: LayerScheme, why: str, remedy: str) -> UsageError:
    return UsageError(f"{module} ({scheme})", f"target cpu {why}", remedy)
