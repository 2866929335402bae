"""What ONNX Runtime's CUDA provider computes: 4- and 8-bit integer weights behind float16 inputs, as MatMulNBits.

Its kernel dequantizes the weight and multiplies in float16; it reads `accuracy_level` and does nothing with it, so that
a scheme with quantized inputs would silently run as another one. Such schemes are refused here, with the layer's name.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.artifacts.granularity import PerChannel, PerGroup
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.export.onnx.cpu_target import NBits

# Weights with one scale a channel are stored in blocks that all have it.
CHANNEL_BLOCK = 128
BLOCK_SIZES = (16, 32, 64, 128, 256)
WEIGHT_ONLY = "quantize with --scheme W4A16 or W8A16, or export with --target cpu"
FP8_ELSEWHERE = "quantize with --scheme W4A16, or export with --target tensorrt or --format compressed-tensors"


def nbits_for(module: str, scheme: LayerScheme) -> NBits:
    """The MatMulNBits that computes this scheme on CUDA.

    Raises:
        UsageError: naming the layer, why the CUDA target does not compute its scheme, and what it does compute.
    """
    weight, act = scheme.weight, scheme.input
    if weight.format.kind != "int" or (act is not None and act.format.kind != "int"):
        why = "has no FP8 or FP4 product: the provider would dequantize it to floats at every call"
        raise _refused(module, scheme, why, FP8_ELSEWHERE)
    if act is not None:
        why = f"multiplies float16 inputs: it would ignore the INT{act.format.bits} inputs that were scored"
        raise _refused(module, scheme, why, WEIGHT_ONLY)
    granularity = weight.granularity
    block = granularity.group_size if isinstance(granularity, PerGroup) else CHANNEL_BLOCK
    if block not in BLOCK_SIZES or not isinstance(granularity, PerGroup | PerChannel):
        raise _refused(module, scheme, f"has no blocks of {block}", "quantize with --group-size 64")
    return NBits(bits=weight.format.bits, block_size=block, accuracy_level=0)


def in_blocks(tensor: QuantizedTensor) -> QuantizedTensor:
    """A weight with one scale a channel as one with the same scale for each of its blocks; others as they are."""
    scheme = tensor.scheme
    if isinstance(scheme.weight.granularity, PerGroup):
        return tensor
    blocks = -(-tensor.shape[1] // CHANNEL_BLOCK)

    def repeated(values: Tensor) -> Tensor:
        return values.expand(-1, blocks).contiguous()

    weight = replace(scheme.weight, granularity=PerGroup(CHANNEL_BLOCK))
    return replace(
        tensor,
        scale=repeated(tensor.scale),
        zero_point=None if tensor.zero_point is None else repeated(tensor.zero_point),
        scheme=replace(scheme, weight=weight),
    )


def _refused(module: str, scheme: LayerScheme, why: str, remedy: str) -> UsageError:
    return UsageError(f"{module} ({scheme})", f"target cuda {why}", remedy)
